"""`/v1/completions`: from its JSON to a call, and from deltas to its choices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import Logprob, TokenDelta, TokenLogprobs
from jaxserve.request import Request, SamplingParams
from serve.errors import relocated
from serve.http.calls import Call, fan_out, joined, shown_logprob, shown_prompt_logprobs, shown_token
from serve.http.fields import (
    COMMON,
    MAX_CHOICES,
    check_model,
    flag,
    given_fields,
    respelled,
    sampling_params,
    stream_options,
)
from serve.running import RunningRequests

ENDPOINT = "/v1/completions"
ID_PREFIX = "cmpl-"
MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16

_KNOWN = frozenset({*COMMON, "prompt", "echo", "add_special_tokens"})

Prompt = str | list[int]


def read_call(body: dict[str, Any], call_id: str, running: RunningRequests) -> Call:
    """The validated call.

    Raises:
        InvalidRequestError: names the field.
        WrongModelError, NoTokenizerError: not to be had here.
    """
    given = given_fields(body, _KNOWN)
    check_model(given, running.config.model_name)
    echo = flag(given, "echo", False)
    sampling = _sampling(given, running.requests.defaults, echo=echo)
    prompts, is_list = _prompts(given.get("prompt"), sampling.n)
    if echo or any(isinstance(prompt, str) for prompt in prompts):
        running.need_tokenizer()
    form = _Form(
        has_token_ids=flag(given, "return_token_ids", False),
        names_token_ids=flag(given, "return_tokens_as_token_ids", False),
        has_completion=not (echo and given.get("max_tokens") == 0),
        has_prompt_logprobs="prompt_logprobs" in given,
        token_text=running.need_tokenizer().token_text if echo else str,
    )

    def new_choice(index: int, request: Request) -> CompletionChoice:
        prompt = _echoed(prompts[index // sampling.n], request, running) if echo else None
        return CompletionChoice(index, request, prompt, form)

    return Call(
        call_id=call_id,
        kind="text_completion",
        chunk_kind="text_completion",
        model=running.config.model_name,
        stream=stream_options(given),
        makers=[
            maker
            for i, prompt in enumerate(prompts)
            for maker in fan_out(
                _maker(prompt, f"prompt[{i}]" if is_list else "prompt", sampling, given, running),
                running.requests,
                sampling.n,
                shares_prompt_logprobs=False,
            )
        ],
        new_choice=new_choice,
        num_completions=sampling.n,
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """What a client wants to see of a completion.

    Attributes:
        names_token_ids: tokens are written as "token_id:5".
        token_text: of a prompt's first token, which has no log-probability.
        has_completion: False shows the echoed prompt alone.
    """

    has_token_ids: bool
    names_token_ids: bool
    has_completion: bool
    has_prompt_logprobs: bool
    token_text: Callable[[int], str]


class CompletionChoice:
    """See `calls.Choice`.

    Args:
        echoed: the prompt's text, to be shown before the completion; None where it is not.
    """

    def __init__(self, index: int, request: Request, echoed: str | None, form: _Form):
        self._index = index
        self._request = request
        self._num_logprobs = request.sampling.logprobs
        self._form = form
        self._echoes = echoed is not None
        self._before = echoed or ""
        self._offset = 0
        self._is_first = True

    def chunks(self, deltas: Sequence[TokenDelta]) -> list[dict[str, Any]]:
        delta = joined(deltas)
        is_worth_it = (
            delta.text or self._before or delta.finish_reason or self._num_logprobs is not None or self._form.has_token_ids
        )
        return [self._choice(delta)] if is_worth_it else []

    def whole(self, deltas: Sequence[TokenDelta]) -> dict[str, Any]:
        return self._choice(joined(deltas))

    def _choice(self, delta: TokenDelta) -> dict[str, Any]:
        if not self._form.has_completion:
            delta = replace(delta, text="", token_ids=[], logprobs=[])
        choice: dict[str, Any] = {
            "index": self._index,
            "text": self._before + delta.text,
            "logprobs": None if self._num_logprobs is None else self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._form.has_prompt_logprobs:
            choice["prompt_logprobs"] = shown_prompt_logprobs(delta.prompt_logprobs)
        if self._form.has_token_ids:
            choice["token_ids"] = delta.token_ids
            if self._is_first:
                choice["prompt_token_ids"] = list(self._request.prompt_token_ids)
        self._before = ""
        self._is_first = False
        return choice

    def _logprobs(self, delta: TokenDelta) -> dict[str, Any]:
        """As OpenAI has it here: four lists, and the chosen token beside the most likely ones. An echoed prompt comes first."""
        token_ids, places = delta.token_ids, list[TokenLogprobs | None](delta.logprobs or ())
        if self._echoes and delta.prompt_logprobs is not None:
            token_ids, places = [*self._request.prompt_token_ids, *token_ids], [*delta.prompt_logprobs, *places]
        texts, offsets = [], []
        for token_id, entries in zip(token_ids, places, strict=True):
            text = self._text(
                token_id, Logprob(0.0, 0, self._form.token_text(token_id)) if entries is None else entries[token_id]
            )
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                None if entries is None else shown_logprob(entries[i].logprob)
                for i, entries in zip(token_ids, places, strict=True)
            ],
            "top_logprobs": [None if entries is None else self._by_text(entries) for entries in places],
            "text_offset": offsets,
        }

    def _text(self, token_id: int, entry: Logprob) -> str:
        return shown_token(token_id, entry, self._form.names_token_ids)

    def _by_text(self, entries: TokenLogprobs) -> dict[str, float]:
        """Where two tokens have one text, such as parts of a character, the more likely one stands for both."""
        by_text: dict[str, float] = {}
        for token_id, entry in sorted(entries.items(), key=lambda item: item[1].rank):
            by_text.setdefault(self._text(token_id, entry), shown_logprob(entry.logprob))
        return by_text


def _sampling(given: Mapping[str, Any], defaults: Mapping[str, Any], *, echo: bool) -> SamplingParams:
    """max_tokens is 16, as in vLLM, or what the model says if that is less; 0 is an echo alone. logprobs are an echo's, too."""
    own = {name: given[name] for name in ("max_tokens", "logprobs") if name in given}
    if echo and type(own.get("max_tokens")) is int and own["max_tokens"] == 0:
        own["max_tokens"] = 1
    if "max_tokens" not in own and "max_tokens" in defaults:
        own["max_tokens"] = min(DEFAULT_MAX_TOKENS, defaults["max_tokens"])
    if echo and "logprobs" in own and "prompt_logprobs" not in given:
        own["prompt_logprobs"] = own["logprobs"]
    return sampling_params(given, "max_tokens", defaults, **own)


def _prompts(value: Any, num_completions: int) -> tuple[list[Prompt], bool]:
    """The prompts, and whether the client sent a list of them."""
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and value:
        if not any(isinstance(item, (str, list)) for item in value):
            return [value], False
        if all(isinstance(item, (str, list)) for item in value):
            if len(value) > MAX_PROMPTS:
                raise InvalidRequestError("prompt", f"{len(value)} prompts", f"at most {MAX_PROMPTS} prompts")
            if len(value) * num_completions > MAX_CHOICES:
                raise InvalidRequestError("n", num_completions, f"at most {MAX_CHOICES} / {len(value)} prompts")
            return value, True
    raise InvalidRequestError("prompt", value, "a text, a list of token ids, or a list of such prompts")


def _maker(
    prompt: Prompt, path: str, sampling: SamplingParams, given: dict[str, Any], running: RunningRequests
) -> Callable[[str], Request]:
    add_special_tokens = flag(given, "add_special_tokens", True)

    def make(request_id: str) -> Request:
        try:
            return running.requests.make(
                prompt,
                sampling,
                request_id=request_id,
                priority=given.get("priority", 0),
                add_special_tokens=add_special_tokens,
            )
        except InvalidRequestError as error:
            if error.parameter in ("prompt", "prompt_token_ids"):
                raise relocated(error, path) from None
            raise respelled(error, given, "max_tokens") from None

    return make


def _echoed(prompt: Prompt, request: Request, running: RunningRequests) -> str:
    if isinstance(prompt, str) and request.sampling.truncate_prompt_tokens is None:
        return prompt
    return running.need_tokenizer().decode(request.prompt_token_ids)
