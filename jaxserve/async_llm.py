"""`AsyncLLM`: the engine as a library for asyncio: a stream a request, on one event loop.

Knows prompts, parameters and results; what is not read yet is `async_engine`'s.
"""

import asyncio
import contextlib
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxserve.async_engine import AsyncEngine
from jaxserve.build import BuiltEngine
from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine_arguments import EngineArguments
from jaxserve.engine_client import EngineStats
from jaxserve.errors import ConfigError, DrainingError, InvalidRequestError
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.outputs import PoolingOutput, PoolingRequestOutput, RequestOutput, TokenDelta
from jaxserve.prompts import Prompt, plain_prompt, tokenization_options
from jaxserve.request import Request, SamplingParams
from jaxserve.results import PoolingResult, PromptResult
from jaxserve.tokenization.tokenizer import Tokenizer


class AsyncLLM:
    """A model that generates for many tasks of one event loop.

    The engine is built in a thread by `start`, or by the first call that needs it.

        async with AsyncLLM("model") as llm:
            async for output in llm.generate("Hello", SamplingParams(max_tokens=20), "first"):
                print(output.outputs[0].text)

    Args:
        model, params, config, tokenizer, logits_processors, **options: as of `LLM`.

    Raises:
        ConfigError: names the argument. What is wrong with the model itself is raised by `start`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        params: Any = None,
        config: Any = None,
        tokenizer: str | Tokenizer | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ):
        self._init(EngineArguments.of(model, params, config, tokenizer, logits_processors, options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "AsyncLLM":
        """Returns an engine that is not built yet, as the constructor does."""
        llm = cls.__new__(cls)
        llm._init(EngineArguments(config))
        return llm

    def _init(self, arguments: EngineArguments) -> None:
        self._arguments: EngineArguments | None = arguments
        self._building: asyncio.Task[BuiltEngine] | None = None
        self._built: BuiltEngine | None = None
        self._engine: AsyncEngine | None = None
        self._holders: dict[str, _Holder] = {}
        self._is_closed = False

    # --- its life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Builds the engine, once; further calls wait for the same engine.

        Raises:
            ConfigError, CheckpointError: see `jaxserve.errors`.
        """
        await self._ready()

    async def close(self) -> None:
        """Aborts what runs and frees the engine; also at the end of an `async with` block."""
        self._is_closed = True
        if self._building is not None:
            with contextlib.suppress(Exception):  # an engine that could not be built
                built = await asyncio.shield(self._building)
                await asyncio.to_thread(built.close)

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- requests -------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continues a prompt, as a stream of outputs of `sampling_params.output_kind`; the last one, alone, is finished.

        The completions of n > 1 share the stream: an output has those that changed. Outputs that were not read meanwhile come
        as one. Closing the stream, or cancelling the task that reads it, aborts the request.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": token ids}.
            sampling_params: None takes the model's defaults.
            request_id: unused by any running request; None makes one.
            priority: lower goes first.
            tokenization_kwargs: add_special_tokens and truncate_prompt_tokens, for a text.

        Raises:
            InvalidRequestError: names the field.
            DrainingError, EngineDeadError: the engine takes nothing, or has stopped after an error.
        """
        built, engine = await self._ready()
        with self._holding(request_id) as holder:
            request = await self._request(built, prompt, sampling_params, holder.request_id, priority, tokenization_kwargs)
            children = built.requests.fan_out(request)
            result = PromptResult(request, children)
            async with contextlib.aclosing(holder.run(engine, children)) as batches:
                async for deltas in batches:
                    output = result.add(deltas, request.sampling.output_kind)
                    if output is not None:
                        yield output

    async def encode(
        self,
        prompt: Prompt,
        pooling: str = "last",
        request_id: str | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> PoolingRequestOutput[PoolingOutput]:
        """Returns a prompt's pooled hidden state; arguments and errors as in `generate` and `LLM.encode`."""
        built, engine = await self._ready()
        with self._holding(request_id) as holder:
            request = await self._request(built, prompt, None, holder.request_id, priority, tokenization_kwargs, pooling)
            result = PoolingResult(request)
            async with contextlib.aclosing(holder.run(engine, (request,))) as batches:
                async for deltas in batches:
                    if (output := result.add(deltas)) is not None:
                        return output
        raise AssertionError("a stream ends with a finish_reason or an error")

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests: their streams get a last output with finish_reason "abort". Unknown ids are ignored."""
        if not isinstance(request_id, Iterable):
            raise InvalidRequestError("request_id", request_id, "a request's id, or several")
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        for holder in (self._holders[i] for i in ids if i in self._holders):
            holder.abort()

    # --- the engine -----------------------------------------------------------------------------------------------

    async def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; ConfigError where the engine has none."""
        built, _ = await self._ready()
        if built.tokenizer is None:
            raise ConfigError("This AsyncLLM has no tokenizer: pass tokenizer= to it, or use token ids.")
        return built.tokenizer

    async def get_default_sampling_params(self) -> SamplingParams:
        """Returns what a call without parameters uses."""
        built, _ = await self._ready()
        return built.requests.default_sampling

    async def reset_prefix_cache(self) -> None:
        """Forgets the KV pages of earlier prompts."""
        built, _ = await self._ready()
        built.client.reset_prefix_cache()

    @property
    def config(self) -> ResolvedConfig:
        """What the engine runs with; ConfigError before it is built."""
        return self._need().config

    @property
    def startup_s(self) -> dict[str, float]:
        """How long building took, in all and by part; see `BuiltEngine`. ConfigError before it is built."""
        return dict(self._need().startup_s)

    def stats(self) -> EngineStats:
        """Returns a snapshot of the engine; ConfigError before it is built."""
        return self._need().client.stats()

    def _need(self) -> BuiltEngine:
        if self._built is None:
            raise ConfigError("This AsyncLLM is not built yet: await start().")
        return self._built

    async def _ready(self) -> tuple[BuiltEngine, AsyncEngine]:
        if self._is_closed:
            raise DrainingError("This AsyncLLM is closed and takes no new requests.")
        if self._building is None:
            assert self._arguments is not None
            building = asyncio.to_thread(self._arguments.build, show_progress=False)
            self._building, self._arguments = asyncio.ensure_future(building), None  # or the caller's weights would stay
        built = await asyncio.shield(self._building)  # one that waits may be cancelled: the others go on
        if self._engine is None:
            self._built, self._engine = built, AsyncEngine(built.client)
            weakref.finalize(self, built.client.close)  # one that is dropped must not hold its memory
        return built, self._engine

    async def _request(
        self,
        built: BuiltEngine,
        prompt: Prompt,
        sampling: SamplingParams | None,
        request_id: str,
        priority: int,
        tokenization_kwargs: Mapping[str, Any] | None,
        pooling: str | None = None,
    ) -> Request:
        """A long text, or a grammar, takes a while, so it is made in a thread."""
        add_special_tokens, truncation = tokenization_options(tokenization_kwargs or {})
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise InvalidRequestError("sampling_params", sampling, "None or a SamplingParams")
        return await asyncio.to_thread(
            built.requests.make,
            plain_prompt(prompt),
            sampling,
            request_id=request_id,
            priority=priority,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncation,
            pooling=pooling,
        )

    @contextlib.contextmanager
    def _holding(self, request_id: str | None) -> "Iterator[_Holder]":
        """Keeps a request's id for as long as it runs; one that fans out has no id of its own in the engine."""
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._holders:
            raise InvalidRequestError("request_id", request_id, "unused by any running request")
        holder = self._holders[request_id] = _Holder(request_id)
        try:
            yield holder
        finally:
            del self._holders[request_id]


class _Holder:
    """A running request: from its id to the completions that run for it. An abort counts from the first moment on."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self._is_aborted = False
        self._abort_children: Callable[[], None] | None = None

    def abort(self) -> None:
        self._is_aborted = True
        if self._abort_children is not None:
            self._abort_children()

    async def run(self, engine: AsyncEngine, children: Sequence[Request]) -> AsyncGenerator[list[TokenDelta], None]:
        """Yields what any of the completions brings, as it comes; leaving early aborts them all."""
        async with contextlib.AsyncExitStack() as stack:
            streams = [engine.stream_batches(child) for child in children]
            for stream in streams:
                await stack.enter_async_context(contextlib.aclosing(stream))
            reading = {asyncio.ensure_future(_next(stream)): stream for stream in streams}
            try:
                await asyncio.sleep(0)  # all of them are submitted now
                self._abort_children = lambda: engine.abort([child.request_id for child in children])
                if self._is_aborted:
                    self._abort_children()
                while reading:
                    done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        stream = reading.pop(task)
                        batch = task.result()
                        if batch is not None:
                            reading[asyncio.ensure_future(_next(stream))] = stream
                            yield batch
            finally:
                for task in reading:
                    task.cancel()
                await asyncio.gather(*reading, return_exceptions=True)


async def _next(stream: AsyncGenerator[list[TokenDelta], None]) -> list[TokenDelta] | None:
    """The next batch, or None at the end."""
    return await anext(stream, None)
