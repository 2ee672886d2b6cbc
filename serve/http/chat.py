"""`/v1/chat/completions`: from its JSON to a call, and from deltas to its choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import Logprob, TokenDelta, TokenLogprobs
from jaxserve.request import Request, SamplingParams
from jaxserve.tokenization.chat_template import encode_chat
from jaxserve.tokenization.tokenizer import Tokenizer
from serve.errors import relocated
from serve.http.calls import Call, fan_out, joined, shown_logprob, shown_prompt_logprobs, shown_token
from serve.http.errors import HttpError
from serve.http.fields import COMMON, check_model, flag, given_fields, respelled, sampling_params, stream_options
from serve.logprobs import most_likely
from serve.running import RunningRequests

ENDPOINT = "/v1/chat/completions"
ID_PREFIX = "chatcmpl-"
MAX_MESSAGES = 1024
MAX_TOP_LOGPROBS = 20

_OWN = ("messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "reasoning_effort")
_FLAGS = ("add_generation_prompt", "continue_final_message")
_KNOWN = frozenset({*COMMON, *_OWN, *_FLAGS})

_RESERVED = frozenset(
    {
        *_FLAGS,
        "bos_token",
        "chat_template",
        "documents",
        "eos_token",
        "messages",
        "protect",
        "template",
        "tokenizer",
        "tools",
    }
)
"""Names that a template gets from us, or that would reach our own functions."""


def read_call(body: dict[str, Any], call_id: str, running: RunningRequests, chat_template: str | None) -> Call:
    """The validated call.

    Args:
        chat_template: the server's; None takes the model's own.

    Raises:
        InvalidRequestError: names the field.
        WrongModelError, NoTokenizerError, HttpError: not to be had here.
    """
    given = given_fields(body, _KNOWN)
    check_model(given, running.config.model_name)
    tokenizer = running.need_tokenizer()
    sampling = _sampling(given, running.requests.defaults)
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise HttpError(
            400,
            "The served model has no chat template: send a prompt to /v1/completions, or start the server with "
            "--chat-template FILE.",
            "no_chat_template",
        )
    messages = given.get("messages")
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise InvalidRequestError("messages", f"{len(messages)} messages", f"at most {MAX_MESSAGES} messages")
    # As in vLLM, the answer opens unless the last message is to go on.
    options = {"continue_final_message": flag(given, "continue_final_message", False)}
    options["add_generation_prompt"] = flag(given, "add_generation_prompt", True)
    options |= _template_kwargs(given)
    form = _Form(
        has_token_ids=flag(given, "return_token_ids", False),
        names_token_ids=flag(given, "return_tokens_as_token_ids", False),
    )

    def make(request_id: str) -> Request:
        try:
            token_ids = encode_chat(tokenizer, messages, chat_template=template, **options)  # pyright: ignore[reportArgumentType]
            return running.requests.make(token_ids, sampling, request_id=request_id, priority=given.get("priority", 0))
        except InvalidRequestError as error:
            if error.parameter == "prompt":
                raise relocated(error, "messages") from None
            raise respelled(error, given, _max_tokens_field(given)) from None

    return Call(
        call_id=call_id,
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        model=running.config.model_name,
        stream=stream_options(given),
        makers=fan_out(make, running.requests, sampling.n, shares_prompt_logprobs=True),
        new_choice=lambda index, request: ChatChoice(index, request, tokenizer, form),
        num_completions=sampling.n,
        shown_once=("prompt_logprobs",) if sampling.prompt_logprobs is not None else (),
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """What a client wants to see of an answer.

    Attributes:
        names_token_ids: tokens are written as "token_id:5".
    """

    has_token_ids: bool
    names_token_ids: bool


class ChatChoice:
    """See `calls.Choice`."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, form: _Form):
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        self._num_logprobs = request.sampling.logprobs
        self._form = form
        self._is_first = True

    def chunks(self, deltas: Sequence[TokenDelta]) -> list[dict[str, Any]]:
        chunks = []
        if self._is_first:
            self._is_first = False
            delta = {"role": "assistant", "content": ""}
            opening = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
            if self._form.has_token_ids:
                opening["prompt_token_ids"] = list(self._request.prompt_token_ids)
            chunks.append(opening)
        delta = joined(deltas)
        if delta.text or delta.finish_reason or self._num_logprobs is not None or self._form.has_token_ids:
            content = {"content": delta.text} if delta.text else {}
            chunks.append({"index": self._index, "delta": content} | self._rest(delta))
        return chunks

    def whole(self, deltas: Sequence[TokenDelta]) -> dict[str, Any]:
        delta = joined(deltas)
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = {"index": self._index, "message": message} | self._rest(delta)
        if self._request.sampling.prompt_logprobs is not None:
            choice["prompt_logprobs"] = shown_prompt_logprobs(delta.prompt_logprobs)
        if self._form.has_token_ids:
            choice["prompt_token_ids"] = list(self._request.prompt_token_ids)
        return choice

    def _rest(self, delta: TokenDelta) -> dict[str, Any]:
        rest: dict[str, Any] = {
            "logprobs": None if self._num_logprobs is None else self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return rest | {"token_ids": delta.token_ids} if self._form.has_token_ids else rest

    def _logprobs(self, delta: TokenDelta) -> dict[str, Any]:
        pairs = zip(delta.token_ids, delta.logprobs or (), strict=True)
        return {"content": [self._token(token_id, entries) for token_id, entries in pairs], "refusal": None}

    def _token(self, token_id: int, entries: TokenLogprobs) -> dict[str, Any]:
        top = most_likely(entries, self._num_logprobs or 0)
        return self._entry(token_id, entries[token_id]) | {"top_logprobs": [self._entry(*item) for item in top]}

    def _entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        """bytes are exact where a token is a part of a character only."""
        return {
            "token": shown_token(token_id, entry, self._form.names_token_ids),
            "logprob": shown_logprob(entry.logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _max_tokens_field(given: Mapping[str, Any]) -> str:
    """How the client spells max_tokens."""
    return "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"


def _sampling(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """max_tokens without a limit of its own, as in vLLM: an answer ends by itself, or where the model says, or at its length."""
    name = _max_tokens_field(given)
    if name != "max_tokens" and "max_tokens" in given and given["max_tokens"] != given["max_completion_tokens"]:
        raise InvalidRequestError("max_tokens", given["max_tokens"], "absent, or equal to max_completion_tokens")
    num_logprobs = given.get("top_logprobs", 0)
    if not flag(given, "logprobs", False):
        if num_logprobs:
            raise InvalidRequestError("top_logprobs", num_logprobs, "absent where logprobs is not true")
        num_logprobs = None
    elif type(num_logprobs) is not int or not 0 <= num_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError("top_logprobs", num_logprobs, f"a whole number in [0, {MAX_TOP_LOGPROBS}]")
    max_tokens = given.get(name, defaults.get("max_tokens"))
    return sampling_params(given, name, defaults, max_tokens=max_tokens, logprobs=num_logprobs)


def _template_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """The client's variables of the template: scalars, under names that are not ours."""
    kwargs = given.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise InvalidRequestError("chat_template_kwargs", kwargs, "an object")
    for name, value in kwargs.items():
        path = f"chat_template_kwargs.{name}"
        if name in _RESERVED or not name.isidentifier():
            raise InvalidRequestError(path, value, "absent: this name is not the template's own")
        if not isinstance(value, (str, int, float, type(None))):
            raise InvalidRequestError(path, value, "a text, a number, true, false or null")
    if "reasoning_effort" in given:
        if not isinstance(given["reasoning_effort"], str):
            raise InvalidRequestError("reasoning_effort", given["reasoning_effort"], "a text")
        return {"reasoning_effort": given["reasoning_effort"], **kwargs}
    return dict(kwargs)
