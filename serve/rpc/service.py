"""jaxserve.v1.GenerationService: what each method does.

Knows the messages; the requests themselves are `serve.running`'s. Raises jaxserve errors; `guard` turns them into statuses.
"""

import contextlib

import grpc

import jaxserve
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import TokenDelta
from jaxserve.request import Request
from serve.observability import CallRecord, call_record
from serve.protos.jaxserve.v1 import jaxserve_pb2
from serve.rpc import messages, validation
from serve.running import RunningRequest, RunningRequests


class GenerationService:
    """The methods; each is a coroutine, to be registered with `guard.add_guarded`."""

    def __init__(self, running: RunningRequests):
        self._running = running
        self._requests = running.requests
        self._config = running.config

    @property
    def max_bytes(self) -> dict[str, int]:
        """No prompt that can be served has more bytes: a character has at most 4, a token id 5 and its tag 1."""
        return dict.fromkeys(("text", "token_ids"), 6 * self._requests.max_prompt_chars)

    async def Generate(self, request: jaxserve_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        with call_record("Generate", self._running.metrics) as record:
            self._running.check_open()
            call = validation.generate_call(
                request,
                tuple(context.invocation_metadata() or ()),
                model_name=self._config.model_name,
                max_model_len=self._config.max_model_len,
            )
            record.request_id = call.request_id
            async with self._running.open(call.request_id, lambda: self._make(call), record) as admitted:
                await context.send_initial_metadata(((validation.REQUEST_ID_METADATA, call.request_id),))
                await self._stream(admitted, record, context)

    async def Abort(
        self, request: jaxserve_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.AbortResponse:
        return jaxserve_pb2.AbortResponse(aborted_request_ids=self._running.abort(validation.abort_ids(request)))

    async def Tokenize(
        self, request: jaxserve_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.TokenizeResponse:
        tokenizer = self._running.need_tokenizer()
        self._check_length("text", len(request.text), "characters")
        add_special = validation.flag(request, "add_special_tokens", True)
        parse_special = validation.flag(request, "parse_special_tokens", False)

        def encode() -> jaxserve_pb2.TokenizeResponse:
            try:
                ids = tokenizer.encode(request.text, add_special_tokens=add_special, parse_special=parse_special)
            except InvalidRequestError as error:
                raise validation.located(error) from None
            return jaxserve_pb2.TokenizeResponse(token_ids=ids)

        return await self._running.off_loop(encode)

    async def Detokenize(
        self, request: jaxserve_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> jaxserve_pb2.DetokenizeResponse:
        tokenizer = self._running.need_tokenizer()
        self._check_length("token_ids", len(request.token_ids), "ids")
        skip_special = validation.flag(request, "skip_special_tokens", True)
        vocab_size = self._config.vocab_size

        def decode() -> jaxserve_pb2.DetokenizeResponse:
            ids = list(request.token_ids)
            if ids and max(ids) >= vocab_size:
                raise InvalidRequestError("token_ids", max(ids), f"whole numbers in [0, {vocab_size})")
            return jaxserve_pb2.DetokenizeResponse(text=tokenizer.decode(ids, skip_special_tokens=skip_special))

        return await self._running.off_loop(decode)

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
            has_tokenizer=self._running.has_tokenizer,
            dtype=config.dtype,
            max_num_seqs=config.max_num_seqs,
            server_version=jaxserve.__version__,
        )

    # --- behind the methods -----------------------------------------------------------------------------------------

    def _make(self, call: validation.GenerateCall) -> Request:
        if isinstance(call.prompt, str):
            self._running.need_tokenizer()
        try:
            return self._requests.make(
                call.prompt,
                call.sampling,
                request_id=call.request_id,
                priority=call.priority,
                add_special_tokens=call.add_special_tokens,
                parse_special=call.parse_special_tokens,
            )
        except InvalidRequestError as error:
            raise validation.located(error, "text" if isinstance(call.prompt, str) else "token_ids.ids") from None

    async def _stream(self, admitted: RunningRequest, record: CallRecord, context: grpc.aio.ServicerContext) -> None:
        is_first = True
        async with contextlib.aclosing(admitted.batches()) as batches:
            try:
                async for deltas in batches:
                    message = self._message(deltas, admitted.request, record)
                    if is_first:
                        message.request_id = admitted.request.request_id
                        is_first = False
                    await admitted.write(context.write(message))
            except InvalidRequestError as error:
                raise validation.located(error) from None

    def _message(self, deltas: list[TokenDelta], request: Request, record: CallRecord) -> jaxserve_pb2.GenerateResponse:
        message = messages.generate_response(deltas, request)
        if deltas[-1].finish_reason is not None:
            message.usage.CopyFrom(messages.usage(deltas[-1], record.num_completion_tokens))
        return message

    def _check_length(self, field: str, length: int, unit: str) -> None:
        limit = self._requests.max_prompt_chars
        if length > limit:
            raise InvalidRequestError(field, f"{length} {unit}", f"at most {limit} {unit}", "Send it in parts.")
