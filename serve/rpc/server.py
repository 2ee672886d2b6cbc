"""The gRPC server: its limits, its address, and which services it offers. Knows nothing of what they do."""

import logging

import grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import ConfigError
from serve.addresses import join, listening_socket, warn_if_open
from serve.protos.jaxserve.v1 import jaxserve_pb2
from serve.rpc.guard import add_guarded
from serve.rpc.health import Health
from serve.rpc.service import GenerationService

log = logging.getLogger(__name__)

SERVICE = jaxserve_pb2.DESCRIPTOR.services_by_name["GenerationService"]

MAX_RECEIVE_BYTES = 16 * 2**20
"""What is above it gRPC itself refuses, without naming a field; 10 MB prompts happen, so they reach our own check."""

MAX_METADATA_BYTES = 16 * 2**10
MAX_STREAMS = 256
"""Of one connection [calls]."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),  # above it some, above the absolute size all calls are refused
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    # A peer that vanished without a FIN is noticed within 40 s, and its pages are freed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as we do; the default answers ENHANCE_YOUR_CALM to more than one ping in 5 minutes.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # With it two servers on one port would each get half of the connections, and neither would know.
    ("grpc.so_reuseport", 0),
)


class RpcServer:
    """A port that is taken at once, so that a clash shows before a model is loaded, and served after `start`."""

    def __init__(self, host: str, port: int):
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = Health(SERVICE.full_name)
        self._is_started = False
        address = join(host, port)
        try:
            listening_socket(host, port).close()  # gRPC's own error has no reason, and a line in its log
            self.port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "gRPC could not"
            raise ConfigError(
                f"grpc_port: {address} cannot be bound ({reason}). Stop what listens there, or change --host or --grpc-port."
            ) from None
        self.endpoint = join(host, self.port)
        log.info("gRPC listens on %s, without TLS", self.endpoint)
        warn_if_open(self.endpoint, host)

    async def start(self, service: GenerationService, *, with_reflection: bool) -> None:
        """Serves; health says SERVING from now on."""
        add_guarded(service, SERVICE, self._server, service.max_bytes)
        await self._health.register(self._server)
        if with_reflection:
            names = (SERVICE.full_name, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._is_started = True
        await self._server.start()
        await self._health.set_serving()

    async def set_draining(self) -> None:
        """Health says NOT_SERVING from now on; calls are still answered."""
        await self._health.set_draining()

    async def stop(self, grace_s: float) -> None:
        """Frees the port; calls that are open after the grace are cancelled."""
        if not self._is_started:  # grpc.aio keeps the port of a server that was never started (1.85.1)
            await self._server.start()
        await self._server.stop(grace_s)
