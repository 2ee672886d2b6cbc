"""jaxserve.v1.GenerationService: what each method does.

Owns the set of running requests. Raises jaxserve errors; `guard` turns them into statuses. Runs on one event loop; tokenization
goes to threads, because a long text takes milliseconds.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

import jaxserve
from jaxserve.async_engine import AsyncEngine
from jaxserve.config import ResolvedConfig
from jaxserve.errors import DrainingError, InvalidRequestError, OverloadedError
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request
from jaxserve.request_factory import RequestFactory
from jaxserve.tokenization.tokenizer import Tokenizer
from serve.admission import Admission
from serve.errors import DuplicateRequestError, NoTokenizerError
from serve.observability import RequestLine, request_line
from serve.protos.jaxserve.v1 import jaxserve_pb2
from serve.rpc import messages, validation

Result = TypeVar("Result")

MAX_TOKENIZING = 64
"""Most Tokenize and Detokenize calls at a time: they share their threads with Generate [calls]."""


class _Running:
    """A request that holds its id."""

    __slots__ = ("is_aborted", "is_submitted")

    def __init__(self) -> None:
        self.is_submitted = False
        self.is_aborted = False


class GenerationService:
    """The methods; each is a coroutine, to be registered with `guard.add_guarded`.

    Args:
        write_timeout_s: how long a client may leave a message unread before its request is ended [s].
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: RequestFactory,
        tokenizer: Tokenizer | None,
        config: ResolvedConfig,
        admission: Admission,
        *,
        write_timeout_s: float = 30.0,
    ):
        self._engine = engine
        self._requests = requests
        self._tokenizer = tokenizer
        self._config = config
        self._admission = admission
        self._write_timeout_s = write_timeout_s
        self._tokenizing = Admission(MAX_TOKENIZING, setting="a fixed limit")
        self._running: dict[str, _Running] = {}
        self._is_draining = False
        self._is_stopping = False

    @property
    def max_bytes(self) -> dict[str, int]:
        """No prompt that can be served has more bytes: a character has at most 4, a token id 5 and its tag 1."""
        return dict.fromkeys(("text", "token_ids"), 6 * self._requests.max_prompt_chars)

    # --- for the lifecycle ------------------------------------------------------------------------------------------

    def refuse_new(self) -> None:
        """From now on Generate is UNAVAILABLE; running streams go on."""
        self._is_draining = True

    async def wait_idle(self) -> None:
        """Returns when no stream is open."""
        await self._admission.wait_idle()

    def stop(self) -> int:
        """Ends the running streams with UNAVAILABLE; returns how many they are."""
        self._is_draining = self._is_stopping = True
        return len(self._abort(list(self._running)))

    # --- the methods ------------------------------------------------------------------------------------------------

    async def Generate(self, request: jaxserve_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        with request_line("Generate") as line:
            if self._is_draining:
                raise DrainingError("The server is shutting down and takes no new requests.")
            call = validation.generate_call(
                request,
                tuple(context.invocation_metadata() or ()),
                model_name=self._config.model_name,
                max_model_len=self._config.max_model_len,
            )
            line.request_id = call.request_id
            with self._admission.permit() as permit, self._holding(call.request_id) as running:
                engine_request = await self._make(call)
                line.num_prompt_tokens = len(engine_request.prompt_token_ids)
                permit.take_tokens(line.num_prompt_tokens)
                await context.send_initial_metadata(((validation.REQUEST_ID_METADATA, call.request_id),))
                await self._stream(engine_request, running, line, context)

    async def Abort(
        self, request: jaxserve_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.AbortResponse:
        return jaxserve_pb2.AbortResponse(aborted_request_ids=self._abort(validation.abort_ids(request)))

    async def Tokenize(
        self, request: jaxserve_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.TokenizeResponse:
        tokenizer = self._need_tokenizer()
        self._check_length("text", len(request.text), "characters")
        add_special = validation.flag(request, "add_special_tokens", True)
        parse_special = validation.flag(request, "parse_special_tokens", False)

        def encode() -> jaxserve_pb2.TokenizeResponse:
            try:
                ids = tokenizer.encode(request.text, add_special_tokens=add_special, parse_special=parse_special)
            except InvalidRequestError as error:
                raise validation.located(error) from None
            return jaxserve_pb2.TokenizeResponse(token_ids=ids)

        return await self._off_loop(encode)

    async def Detokenize(
        self, request: jaxserve_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.DetokenizeResponse:
        tokenizer = self._need_tokenizer()
        self._check_length("token_ids", len(request.token_ids), "ids")
        skip_special = validation.flag(request, "skip_special_tokens", True)
        vocab_size = self._config.vocab_size

        def decode() -> jaxserve_pb2.DetokenizeResponse:
            ids = list(request.token_ids)
            if ids and max(ids) >= vocab_size:
                raise InvalidRequestError("token_ids", max(ids), f"whole numbers in [0, {vocab_size})")
            return jaxserve_pb2.DetokenizeResponse(text=tokenizer.decode(ids, skip_special_tokens=skip_special))

        return await self._off_loop(decode)

    async def GetModel(
        self, request: jaxserve_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.GetModelResponse:
        config = self._config
        return jaxserve_pb2.GetModelResponse(
            model=config.model_name,
            max_model_len=config.max_model_len,
            vocab_size=config.vocab_size,
            max_logprobs=config.max_logprobs,
            eos_token_ids=sorted(self._requests.eos_token_ids),
            has_tokenizer=self._tokenizer is not None,
            dtype=config.dtype,
            max_num_seqs=config.max_num_seqs,
            server_version=jaxserve.__version__,
        )

    # --- behind Generate --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _holding(self, request_id: str) -> Iterator[_Running]:
        if request_id in self._running:
            raise DuplicateRequestError(f"request_id {request_id!r} belongs to a request that is still running.")
        running = self._running[request_id] = _Running()
        try:
            yield running
        finally:
            del self._running[request_id]

    async def _make(self, call: validation.GenerateCall) -> Request:
        if isinstance(call.prompt, str):
            self._need_tokenizer()
        try:
            return await asyncio.to_thread(
                self._requests.make,
                call.prompt,
                call.sampling,
                request_id=call.request_id,
                priority=call.priority,
                add_special_tokens=call.add_special_tokens,
                parse_special=call.parse_special_tokens,
            )
        except InvalidRequestError as error:
            raise validation.located(error, "text" if isinstance(call.prompt, str) else "token_ids.ids") from None

    async def _stream(
        self, request: Request, running: _Running, line: RequestLine, context: grpc.aio.ServicerContext
    ) -> None:
        if running.is_aborted:  # while it was tokenized
            last = TokenDelta(
                request.request_id, "", [], finish_reason="abort", num_prompt_tokens=len(request.prompt_token_ids)
            )
            await self._write([last], request, line, context)
            return
        running.is_submitted = True
        async with contextlib.aclosing(self._engine.stream_batches(request)) as batches:
            try:
                async for deltas in batches:
                    await self._write(deltas, request, line, context)
            except InvalidRequestError as error:
                if error.parameter != "request_id":
                    raise validation.located(error) from None
                raise DuplicateRequestError(
                    f"request_id {request.request_id!r} belongs to a request that is being aborted."
                ) from None

    async def _write(
        self, deltas: list[TokenDelta], request: Request, line: RequestLine, context: grpc.aio.ServicerContext
    ) -> None:
        last = deltas[-1]
        if last.finish_reason == "abort" and self._is_stopping:
            raise DrainingError("The server has shut down before the completion was finished.")
        message = messages.generate_response(deltas, request.sampling.logprobs)
        if line.first_token_s is None:
            message.request_id = request.request_id
            line.mark_first_token()
        line.num_completion_tokens += len(message.token_ids)
        if last.finish_reason is not None:
            line.finish_reason = last.finish_reason
            line.num_cached_tokens = last.num_cached_tokens
            message.usage.CopyFrom(messages.usage(last, line.num_completion_tokens))
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(message)
        except TimeoutError:
            raise OverloadedError(
                f"{request.request_id} was aborted: its client has read nothing for {self._write_timeout_s:g} s."
            ) from None

    def _abort(self, request_ids: list[str]) -> list[str]:
        known = [request_id for request_id in request_ids if request_id in self._running]
        for request_id in known:
            self._running[request_id].is_aborted = True
        self._engine.abort([request_id for request_id in known if self._running[request_id].is_submitted])
        return known

    # --- behind Tokenize and Detokenize -----------------------------------------------------------------------------

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NoTokenizerError("The served model has no tokenizer: send token_ids, and read token_ids.")
        return self._tokenizer

    def _check_length(self, field: str, length: int, unit: str) -> None:
        limit = self._requests.max_prompt_chars
        if length > limit:
            raise InvalidRequestError(field, f"{length} {unit}", f"at most {limit} {unit}", "Send it in parts.")

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        with self._tokenizing.permit():
            return await asyncio.to_thread(work)
