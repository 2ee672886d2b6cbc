"""What stands around every method: bytes that do not parse, and exceptions, become the status that the proto promises.

Knows nothing of what the methods do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from jaxserve.errors import InvalidRequestError
from serve.errors import MalformedRequestError, status_of
from serve.rpc import wire

Method = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]

ABORT_TIMEOUT_S = 1.0
"""A status queues behind messages that the client does not read; it stays queued when we no longer wait for it [s]."""


def add_guarded(servicer: object, service: ServiceDescriptor, server: grpc.aio.Server, max_bytes: Mapping[str, int]) -> None:
    """Registers a service whose methods are all coroutines, streaming ones (which call context.write) included.

    In place of the generated `add_…Servicer_to_server`, whose deserialisers answer UNKNOWN, with a traceback in the log, to
    bytes that do not parse.

    Args:
        max_bytes: of the requests' fields that may be long, by name; what is longer is not even parsed.
    """
    handlers = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            _guarded(getattr(servicer, method.name)),
            request_deserializer=_tolerant(GetMessageClass(method.input_type), max_bytes),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _tolerant(
    message: type[Message], max_bytes: Mapping[str, int]
) -> Callable[[bytes], Message | InvalidRequestError | MalformedRequestError]:
    descriptor: Descriptor = message.DESCRIPTOR  # pyright: ignore[reportAssignmentType]  upb's twin of it

    def parse(data: bytes) -> Message | InvalidRequestError | MalformedRequestError:
        try:
            wire.check_sizes(descriptor, data, max_bytes)
            return message.FromString(data)
        except InvalidRequestError as error:
            return error
        except DecodeError:
            return wire.fault(descriptor, data) or MalformedRequestError(
                f"{len(data)} bytes that are no {descriptor.full_name}: cut off, or nested too deeply."
            )

    return parse


def _guarded(method: Method) -> Method:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if isinstance(request, InvalidRequestError | MalformedRequestError):
                raise request
            return await method(request, context)
        # Cancellation is not an Exception and goes through: swallowing it leaks memory with every call (grpc#43360).
        except Exception as error:
            await _end(context, error)

    return guarded


async def _end(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends the call with the error's status.

    Raises:
        grpc.aio.AbortError: always, which is how gRPC wants it; or CancelledError where the client does not read, because
            gRPC logs anything else with its traceback, and a client must not be able to fill the log.
    """
    status = rpc_status.to_status(status_of(error))
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await context.abort(status.code, status.details, status.trailing_metadata)
    except TimeoutError:
        raise asyncio.CancelledError from None
