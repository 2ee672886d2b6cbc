"""`/v1/completions`: from its JSON to a call, and from deltas to its choices."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import TokenDelta, TokenLogprobs
from jaxserve.request import Request, SamplingParams
from serve.errors import relocated
from serve.http.calls import Call, joined, shown_logprob
from serve.http.fields import COMMON, check_model, flag, given_fields, sampling_params, stream_options
from serve.running import RunningRequests

ENDPOINT = "/v1/completions"
ID_PREFIX = "cmpl-"
MAX_PROMPTS = 64

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
    own = {name: given[name] for name in ("max_tokens", "logprobs") if name in given}
    sampling = sampling_params(given, "max_tokens", **own)
    prompts, is_list = _prompts(given.get("prompt"))
    echo = flag(given, "echo", False)
    if echo and sampling.logprobs is not None:
        raise InvalidRequestError("echo", True, "false with logprobs: those of a prompt are not served")
    if echo or any(isinstance(prompt, str) for prompt in prompts):
        running.need_tokenizer()
    has_token_ids = flag(given, "return_token_ids", False)

    def new_choice(index: int, request: Request) -> CompletionChoice:
        return CompletionChoice(index, request, _echoed(prompts[index], running) if echo else "", has_token_ids)

    return Call(
        call_id=call_id,
        kind="text_completion",
        chunk_kind="text_completion",
        model=running.config.model_name,
        stream=stream_options(given),
        makers=[
            _maker(prompt, f"prompt[{n}]" if is_list else "prompt", sampling, given, running)
            for n, prompt in enumerate(prompts)
        ],
        new_choice=new_choice,
    )


class CompletionChoice:
    """See `calls.Choice`."""

    def __init__(self, index: int, request: Request, echoed: str, has_token_ids: bool):
        self._index = index
        self._request = request
        self._num_logprobs = request.sampling.logprobs
        self._has_token_ids = has_token_ids
        self._before = echoed
        self._offset = 0
        self._is_first = True

    def chunks(self, deltas: Sequence[TokenDelta]) -> list[dict[str, Any]]:
        delta = joined(deltas)
        is_worth_it = (
            delta.text or self._before or delta.finish_reason or self._num_logprobs is not None or self._has_token_ids
        )
        return [self._choice(delta)] if is_worth_it else []

    def whole(self, deltas: Sequence[TokenDelta]) -> dict[str, Any]:
        return self._choice(joined(deltas))

    def _choice(self, delta: TokenDelta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self._index,
            "text": self._before + delta.text,
            "logprobs": None if self._num_logprobs is None else self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._has_token_ids:
            choice["token_ids"] = delta.token_ids
            if self._is_first:
                choice["prompt_token_ids"] = list(self._request.prompt_token_ids)
        self._before = ""
        self._is_first = False
        return choice

    def _logprobs(self, delta: TokenDelta) -> dict[str, Any]:
        """As OpenAI has it here: four lists, and the chosen token beside the most likely ones."""
        chosen = [entries[i] for i, entries in zip(delta.token_ids, delta.logprobs or (), strict=True)]
        texts = [entry.decoded_token or "" for entry in chosen]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [shown_logprob(entry.logprob) for entry in chosen],
            "top_logprobs": [_by_text(entries) for entries in delta.logprobs or ()],
            "text_offset": offsets,
        }


def _by_text(entries: TokenLogprobs) -> dict[str, float]:
    """Where two tokens have one text, such as parts of a character, the more likely one stands for both."""
    by_text: dict[str, float] = {}
    for entry in sorted(entries.values(), key=lambda entry: entry.rank):
        by_text.setdefault(entry.decoded_token or "", shown_logprob(entry.logprob))
    return by_text


def _prompts(value: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether the client sent a list of them."""
    if isinstance(value, str):
        return [value], False
    if isinstance(value, list) and value:
        if not any(isinstance(item, (str, list)) for item in value):
            return [value], False
        if all(isinstance(item, (str, list)) for item in value):
            if len(value) > MAX_PROMPTS:
                raise InvalidRequestError("prompt", f"{len(value)} prompts", f"at most {MAX_PROMPTS} prompts")
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
            raise relocated(error, path) if error.parameter in ("prompt", "prompt_token_ids") else error from None

    return make


def _echoed(prompt: Prompt, running: RunningRequests) -> str:
    return prompt if isinstance(prompt, str) else running.need_tokenizer().decode(prompt)
