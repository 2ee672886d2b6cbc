"""grpc.health.v1: whether a balancer should send requests here. Knows the names that are asked for, "" and our service's."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class Health:
    """NOT_SERVING until `set_serving`, and for good after `set_draining`."""

    def __init__(self, service_name: str):
        self._names = ("", service_name)
        self._servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]  re-exported without a type

    async def register(self, server: grpc.aio.Server) -> None:
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self) -> None:
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def set_draining(self) -> None:
        await self._servicer.enter_graceful_shutdown()
