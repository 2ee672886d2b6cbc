"""`LLM`: the engine as a library, for scripts and notebooks.

Prompts in, results out, in order. Runs no step itself: the engine's own thread does, so Ctrl-C never lands inside one.
"""

import queue
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from tqdm import tqdm

from jaxserve.build import BuiltEngine, build
from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine_client import EngineStats
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.model_source import own_model
from jaxserve.outputs import CompletionOutput, RequestOutput, TokenDelta
from jaxserve.request import Request, SamplingParams
from jaxserve.tokenization.chat_template import encode_chat
from jaxserve.tokenization.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": token ids}."""

Messages = Sequence[Mapping[str, Any]]

_OTHER_ENGINES = {
    "enforce_eager": "every program is compiled ahead of time; there is no eager mode",
    "trust_remote_code": "code from a model repository is never run; register a family with jaxserve.models.registry.register",
    "disable_log_stats": "statistics are not logged; ask LLM.stats()",
    "enable_chunked_prefill": "long prompts are always computed in chunks",
    "swap_space": "a preempted request is computed again; nothing is swapped",
    "cpu_offload_gb": "weights stay on the devices",
    "disable_custom_all_reduce": "XLA chooses the all-reduce",
    "max_seq_len_to_capture": "the programs are compiled for all lengths",
    "distributed_executor_backend": "the devices of one process are used through jax.sharding",
    "tokenizer_mode": "the tokenizer follows from the files",
    "load_format": "the format follows from the files",
    "compilation_config": "the ladder of programs follows from max_num_seqs and max_num_batched_tokens",
}
"""Arguments of vLLM's LLM that are taken, and what they mean here."""


class LLM:
    """A model that is ready to generate.

    Args:
        model: a directory (Orbax or Hugging Face), a Hub id, "toy", or None for the embedded model.
        params: the caller's own parameters instead: an NNX module or state, a Linen FrozenDict or a nested dict, in the canonical
            tree (docs/architecture.md); needs `config`.
        config: a Hugging Face configuration, as a dict or an object with `to_dict()`; with `params` alone.
        tokenizer: a directory, or a Tokenizer; None takes the model's own. With `params`, None means token ids only.
        use_tqdm: shows progress while programs compile.
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
        **options: Any,
    ):
        engine_config = EngineConfig(
            model=model, tokenizer=tokenizer if isinstance(tokenizer, str) else None, **_known_options(options)
        )
        if params is None and config is not None:
            raise ConfigError("config is taken only together with params; a checkpoint has its own config.json.")
        if params is not None and model is not None:
            raise ConfigError("model and params exclude each other: give one of them.")
        source = None if params is None else own_model(params, config, tokenizer)
        self._engine: BuiltEngine = build(engine_config, source=source, show_progress=use_tqdm)
        # The engine's thread keeps it alive; without this a dropped LLM would hold its memory until the process ends.
        weakref.finalize(self, self._engine.client.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues each prompt and returns the results in the order of the prompts.

        Args:
            prompts: one prompt or a list of them.
            sampling_params: one for all, or a list with one a prompt; None takes the defaults.
            use_tqdm: shows progress with input and output tokens a second.

        Raises:
            InvalidRequestError: names prompt and field; nothing has been started then.
            EngineDeadError: the engine has stopped after an error.
        """
        listed = _as_list(prompts)
        params = _one_each(sampling_params, len(listed))
        requests = [
            self._request(index, prompt, sampling)
            for index, (prompt, sampling) in enumerate(zip(listed, params, strict=True))
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, as the model's chat template writes it.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or a list of such lists.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            chat_template: jinja2 text; None takes the model's.
            add_generation_prompt: whether the template opens the assistant's turn.
            chat_template_kwargs: further variables of the template.

        Raises:
            InvalidRequestError: no template, a template that refuses, or as in `generate`.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        params = _one_each(sampling_params, len(conversations))
        tokenizer = self.get_tokenizer()
        requests = []
        for conversation, sampling in zip(conversations, params, strict=True):
            token_ids = encode_chat(
                tokenizer,
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            requests.append(self._engine.requests.make(token_ids, sampling))
        return self._run(requests, use_tqdm)

    @property
    def startup_s(self) -> dict[str, float]:
        """How long the start took [s], by part; see `jaxserve.build.BuiltEngine`."""
        return dict(self._engine.startup_s)

    def get_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; ConfigError where the engine has none."""
        if self._engine.tokenizer is None:
            raise ConfigError("This LLM has no tokenizer: pass tokenizer= to LLM, or use token ids.")
        return self._engine.tokenizer

    @property
    def config(self) -> ResolvedConfig:
        """What the engine runs with: every field decided."""
        return self._engine.config

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

    def _request(self, index: int, prompt: Prompt, sampling: SamplingParams | None) -> Request:
        try:
            return self._engine.requests.make(_plain_prompt(prompt), sampling)
        except InvalidRequestError as error:
            error.add_note(f"in prompt {index} of this call; nothing was started")
            raise

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        """Submits everything, collects deltas, and leaves the engine clean whatever happens."""
        results = {r.request_id: _Result(r) for r in requests}
        inbox: queue.SimpleQueue[Sequence[TokenDelta]] = queue.SimpleQueue()
        num_open = len(requests)
        with _GenerationBar(len(requests), use_tqdm) as bar:
            try:
                for request in requests:
                    self._engine.client.submit(request, inbox.put)
                while num_open:
                    for delta in inbox.get():
                        if delta.error is not None:
                            raise delta.error
                        result = results[delta.request_id]
                        result.add(delta)
                        if delta.finish_reason is not None:
                            num_open -= 1
                            bar.finished(len(result.request.prompt_token_ids), len(result.completion.token_ids))
            except BaseException:  # Ctrl-C included: the rest must not go on without anybody waiting
                self._engine.client.abort(results)
                raise
        return [result.output() for result in results.values()]


class _Result:
    """A request's deltas put together."""

    def __init__(self, request: Request):
        self.request = request
        wants_logprobs = request.sampling.logprobs is not None
        self.completion = CompletionOutput(0, "", [], 0.0 if wants_logprobs else None, [] if wants_logprobs else None)
        self._texts: list[str] = []
        self._last: TokenDelta | None = None

    def add(self, delta: TokenDelta) -> None:
        self._texts.append(delta.text)
        completion = self.completion
        completion.token_ids.extend(delta.token_ids)
        if completion.logprobs is not None and delta.logprobs:
            completion.logprobs.extend(delta.logprobs)
            chosen = (entry[i].logprob for i, entry in zip(delta.token_ids, delta.logprobs, strict=True))
            completion.cumulative_logprob = sum(chosen, completion.cumulative_logprob or 0.0)
        self._last = delta

    def output(self) -> RequestOutput:
        request, last, completion = self.request, self._last, self.completion
        assert last is not None
        completion.text = "".join(self._texts)
        completion.finish_reason, completion.stop_reason = last.finish_reason, last.stop_reason
        return RequestOutput(
            request.request_id,
            request.prompt,
            list(request.prompt_token_ids),
            [completion],
            finished=True,
            num_cached_tokens=last.num_cached_tokens,
            metrics=last.timings,
        )


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


def _known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of EngineConfig; warns once of what has no meaning here; refuses what nobody knows."""
    known = set(EngineConfig.__dataclass_fields__) - {"model", "tokenizer"}
    foreign = {name: value for name, value in options.items() if name in _OTHER_ENGINES}
    if foreign:
        meanings = "; ".join(f"{name}: {_OTHER_ENGINES[name]}" for name in foreign)
        warnings.warn(f"These arguments have no effect here. {meanings}.", stacklevel=3)
    unknown = sorted(options.keys() - known - foreign.keys())
    if unknown:
        raise ConfigError(f"LLM has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return {name: value for name, value in options.items() if name in known}


def _plain_prompt(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    for name in ("prompt_token_ids", "prompt"):
        if prompt.get(name) is not None:
            return prompt[name]
    raise InvalidRequestError("prompt", sorted(prompt), 'text, token ids, or a dict with "prompt" or "prompt_token_ids"')


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns a list of prompts; one text, one mapping or one list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequestError("prompts", prompts, "a text, a list of token ids, or a list of such prompts")
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], Integral) else listed


def _one_each(
    params: SamplingParams | Iterable[SamplingParams] | None, count: int
) -> list[SamplingParams] | list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    listed: list[Any] = list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(p, SamplingParams) for p in listed):
        raise InvalidRequestError("sampling_params", params, "None, a SamplingParams, or a list with one a prompt")
    if len(listed) != count:
        raise InvalidRequestError("sampling_params", f"{len(listed)} entries", f"one, or as many as prompts ({count})")
    return listed
