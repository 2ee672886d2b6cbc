"""`LLM`: the engine as a library, for scripts and notebooks.

Prompts in, results out, in order. Runs no step itself: the engine's own thread does, so Ctrl-C never lands inside one.
"""

import queue
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from jaxserve.config import ResolvedConfig
from jaxserve.engine_arguments import EngineArguments
from jaxserve.engine_client import EngineClient, EngineStats
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.outputs import (
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
    TokenDelta,
    TokenLogprobs,
)
from jaxserve.prompts import Prompt, as_list, one_each, plain_prompt, tokenization_options
from jaxserve.request import Request, SamplingParams
from jaxserve.results import PoolingResult, PromptResult, embedding, similarity
from jaxserve.tokenization.chat_template import encode_chat
from jaxserve.tokenization.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model that is ready to generate.

    Args:
        model: a directory (Orbax or Hugging Face), a Hub id, "toy", or None for the embedded model.
        params: the caller's own parameters instead: an NNX module or state, a Linen FrozenDict or a nested dict, in the canonical
            tree (docs/architecture.md); needs `config`.
        config: a Hugging Face configuration, as a dict or an object with `to_dict()`; with `params` alone.
        tokenizer: a directory, or a Tokenizer; None takes the model's own. With `params`, None means token ids only.
        use_tqdm: shows progress while programs compile.
        logits_processors: functions on logits, which requests use by name (SamplingParams.extra_args).
        **options: fields of EngineConfig (tensor_parallel_size, dtype, max_model_len, max_num_seqs, max_num_batched_tokens,
            page_size, num_pages, gpu_memory_utilization, kv_cache_memory_bytes, seed, max_logprobs, ...). Some arguments of
            vLLM's LLM that have no meaning here are taken with a warning.

    Raises:
        ConfigError, CheckpointError: see `jaxserve.errors`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        params: Any = None,
        config: Any = None,
        tokenizer: str | Tokenizer | None = None,
        use_tqdm: bool = True,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Any,
    ):
        arguments = EngineArguments.of(model, params, config, tokenizer, logits_processors, options)
        self._engine = arguments.build(show_progress=use_tqdm)
        self._enqueued = _Batch(self._engine.client)
        # The engine's thread keeps it alive; without this a dropped LLM would hold its memory until the process ends.
        weakref.finalize(self, self._engine.client.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt and returns the results in the order of the prompts.

        Args:
            prompts: one prompt or a list of them.
            sampling_params: one for all, or a list with one a prompt; None takes the model's defaults.
            use_tqdm: shows progress with input and output tokens a second.
            priority: one for all, or a list with one a prompt; lower goes first.
            tokenization_kwargs: add_special_tokens and truncate_prompt_tokens, for texts.

        Raises:
            InvalidRequestError: names prompt and field; nothing has been started then.
            EngineDeadError: the engine has stopped after an error.
        """
        return self._run(self._requests(prompts, sampling_params, priority, tokenization_kwargs), use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Starts what `generate` would run, and returns the requests' ids at once."""
        requests = self._requests(prompts, sampling_params, priority, tokenization_kwargs)
        self._enqueued.submit([(PromptResult(r, c), c) for r in requests for c in [self._engine.requests.fan_out(r)]])
        return [request.request_id for request in requests]

    def wait_for_completion(self, use_tqdm: bool = True) -> list[RequestOutput]:
        """Returns the results of everything that was enqueued since the last call, in that order."""
        batch, self._enqueued = self._enqueued, _Batch(self._engine.client)
        return batch.collect(use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, as the model's chat template writes it.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            priority: as in `generate`.
            chat_template: jinja2 text; None takes the model's.
            add_generation_prompt: whether the template opens the assistant's turn.
            chat_template_kwargs: further variables of the template.

        Raises:
            InvalidRequestError: no template, a template that refuses, or as in `generate`.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        params = one_each("sampling_params", sampling_params, SamplingParams, len(conversations))
        priorities = one_each("priority", priority, int, len(conversations))
        tokenizer = self.get_tokenizer()
        requests = []
        for conversation, sampling, rank in zip(conversations, params, priorities, strict=True):
            token_ids = encode_chat(
                tokenizer,
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            requests.append(self._engine.requests.make(token_ids, sampling, priority=rank or 0))
        return self._run(requests, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Returns each prompt's most likely continuations, best first, by a beam search over one-token requests.

        Args:
            prompts: as in `generate`.
            params: see there.
            use_tqdm: shows the steps.

        Raises:
            InvalidRequestError: as in `generate`, or more beams than max_logprobs allows.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError("params", params, "a BeamSearchParams")
        eos_token_ids = self._engine.requests.eos_token_ids
        sampling = params.step_sampling(len(eos_token_ids), self.config.max_logprobs)

        def next_tokens(contexts: list[tuple[int, ...]]) -> list[TokenLogprobs]:
            outputs = self._run([self._engine.requests.make(context, sampling) for context in contexts], False)
            return [output.outputs[0].logprobs[0] for output in outputs]  # pyright: ignore[reportOptionalSubscript, reportReturnType]

        found = beam_search(
            [request.prompt_token_ids for request in self._requests(prompts, sampling, None, None)],
            params,
            next_tokens,
            eos_token_ids=eos_token_ids,
            max_model_len=self.config.max_model_len,
            use_tqdm=use_tqdm,
        )
        if self._engine.tokenizer is not None:
            for sequence in (sequence for output in found for sequence in output.sequences):
                sequence.text = self._engine.tokenizer.decode(sequence.tokens)
        return found

    def encode(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last", use_tqdm: bool = True, **tokenization_kwargs: Any
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Returns each prompt's pooled hidden state, as the model's last norm leaves it.

        Args:
            prompts: as in `generate`.
            pooling: "last" token or "mean" over all tokens.
            use_tqdm: as in `generate`.
            **tokenization_kwargs: add_special_tokens and truncate_prompt_tokens.
        """
        requests = self._requests(prompts, None, None, tokenization_kwargs, pooling)
        batch = _Batch(self._engine.client)
        batch.submit([(PoolingResult(request), (request,)) for request in requests])
        return batch.collect(use_tqdm)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last", use_tqdm: bool = True, **tokenization_kwargs: Any
    ) -> list[EmbeddingRequestOutput]:
        """Returns each prompt's embedding: what `encode` gives, scaled to length one."""
        return [embedding(output) for output in self.encode(prompts, pooling, use_tqdm, **tokenization_kwargs)]

    def score(
        self,
        text_1: Prompt | Sequence[Prompt],
        text_2: Prompt | Sequence[Prompt],
        pooling: str = "last",
        use_tqdm: bool = True,
        **tokenization_kwargs: Any,
    ) -> list[ScoringRequestOutput]:
        """Returns how alike texts are, by the cosine of their embeddings: one to one, one to many, or pair by pair.

        Raises:
            InvalidRequestError: neither is one text, and they are not equally many.
        """
        firsts, seconds = as_list(text_1), as_list(text_2)
        if not firsts or not seconds or len(firsts) not in (1, len(seconds)):
            raise InvalidRequestError(
                "text_1", f"{len(firsts)} to {len(seconds)} texts", "one text, or as many as text_2, and neither empty"
            )
        embeddings = self.embed([*firsts, *seconds], pooling, use_tqdm, **tokenization_kwargs)
        ones, others = embeddings[: len(firsts)], embeddings[len(firsts) :]
        return [similarity(ones[min(i, len(ones) - 1)], other) for i, other in enumerate(others)]

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what a call without parameters uses: the model's generation_config.json over the defaults."""
        return self._engine.requests.default_sampling

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; ConfigError where the engine has none."""
        if self._engine.tokenizer is None:
            raise ConfigError("This LLM has no tokenizer: pass tokenizer= to LLM, or use token ids.")
        return self._engine.tokenizer

    @property
    def config(self) -> ResolvedConfig:
        """What the engine runs with: every field decided."""
        return self._engine.config

    @property
    def startup_s(self) -> dict[str, float]:
        """How long the start took [s], by part; see `jaxserve.build.BuiltEngine`."""
        return dict(self._engine.startup_s)

    def stats(self) -> EngineStats:
        """Returns a snapshot of the engine."""
        return self._engine.client.stats()

    def reset_prefix_cache(self) -> None:
        """Forgets the KV pages of earlier prompts, so that the next call computes its prompts from nothing."""
        self._engine.client.reset_prefix_cache()

    def close(self) -> None:
        """Aborts what runs and frees the engine; also at the end of a `with` block."""
        self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        priority: int | Iterable[int] | None,
        tokenization_kwargs: Mapping[str, Any] | None,
        pooling: str | None = None,
    ) -> list[Request]:
        """Makes all of them, before any is started."""
        listed = as_list(prompts)
        params = one_each("sampling_params", sampling_params, SamplingParams, len(listed))
        priorities = one_each("priority", priority, int, len(listed))
        add_special_tokens, truncation = tokenization_options(tokenization_kwargs or {})
        requests = []
        for index, (prompt, sampling, rank) in enumerate(zip(listed, params, priorities, strict=True)):
            try:
                request = self._engine.requests.make(
                    plain_prompt(prompt),
                    sampling,
                    priority=rank or 0,
                    add_special_tokens=add_special_tokens,
                    truncate_prompt_tokens=truncation,
                    pooling=pooling,
                )
            except InvalidRequestError as error:
                error.add_note(f"in prompt {index} of this call; nothing was started")
                raise
            requests.append(request)
        return requests

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        batch = _Batch(self._engine.client)
        batch.submit([(PromptResult(r, c), c) for r in requests for c in [self._engine.requests.fan_out(r)]])
        return batch.collect(use_tqdm)


class _Batch:
    """Requests that run, and their results in order. Leaves the engine clean whatever happens."""

    def __init__(self, client: EngineClient):
        self._client = client
        self._inbox: queue.SimpleQueue[Sequence[TokenDelta]] = queue.SimpleQueue()
        self._results: list[PromptResult | PoolingResult] = []
        self._result_of: dict[str, PromptResult | PoolingResult] = {}

    def submit(self, results: Iterable[tuple[PromptResult | PoolingResult, Sequence[Request]]]) -> None:
        """Starts the requests of each result."""
        try:
            for result, requests in results:
                self._results.append(result)
                for request in requests:
                    self._result_of[request.request_id] = result
                    self._client.submit(request, self._inbox.put)
        except BaseException:
            self._client.abort(self._result_of)
            raise

    def collect(self, use_tqdm: bool) -> list[Any]:
        """Waits for all of them; the first error, and Ctrl-C, end the rest: nobody would wait for it."""
        outputs: dict[int, Any] = {}
        with _GenerationBar(len(self._results), use_tqdm) as bar:
            try:
                while len(outputs) < len(self._results):
                    for delta in self._inbox.get():
                        if delta.error is not None:
                            raise delta.error
                        result = self._result_of[delta.request_id]
                        output = result.add([delta])
                        if output is not None:
                            outputs[id(result)] = output
                            bar.finished(len(result.request.prompt_token_ids), result.num_generated_tokens)
            except BaseException:
                self._client.abort(self._result_of)
                raise
        return [outputs[id(result)] for result in self._results]


class _GenerationBar:
    """tqdm with tokens a second, as vLLM shows it."""

    def __init__(self, total: int, is_shown: bool):
        self._bar = tqdm(total=total, desc="Processed prompts", disable=not is_shown, dynamic_ncols=True)
        self._num_input = self._num_output = 0

    def __enter__(self) -> "_GenerationBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def finished(self, num_input: int, num_output: int) -> None:
        self._num_input += num_input
        self._num_output += num_output
        elapsed_s = max(self._bar.format_dict["elapsed"], 1e-6)
        self._bar.set_postfix_str(
            f"input: {self._num_input / elapsed_s:.1f} toks/s, output: {self._num_output / elapsed_s:.1f} toks/s",
            refresh=False,
        )
        self._bar.update(1)
