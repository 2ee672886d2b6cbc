"""The fields of OpenAI's requests, and vLLM's beside them: which are served, which make no difference, and which are refused.

A field that would change the answer and is not served is an error that names it, and so is a name that nobody knows: a client
must not believe that it was obeyed. Knows no endpoint's own fields.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.request import ALL_LOGPROBS, RepetitionDetection, SamplingParams
from serve.errors import WrongModelError, relocated
from serve.http import structured
from serve.limits import check_bad_words, check_stops

SAMPLING = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "thinking_token_budget",
)
"""Named alike in SamplingParams; max_tokens and logprobs differ from endpoint to endpoint."""

COMMON = (
    *SAMPLING,
    *structured.FIELDS,
    "model",
    "stream",
    "stream_options",
    "priority",
    "repetition_detection",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "max_tokens",
    "logprobs",
    "vllm_xargs",
)

MAX_CHOICES = 128
"""Completions of one call, over all of its prompts."""

WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",  # without tools
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Taken and not looked at: they are about accounts, storage and routing, never about the answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # without tools
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Not served: name -> the values, besides null, that ask for nothing."""


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How the answer comes.

    Attributes:
        includes_usage: one more chunk with the usage, before the end.
        has_usage_always: each chunk has the usage so far.
    """

    is_stream: bool
    includes_usage: bool = False
    has_usage_always: bool = False


def given_fields(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """What was asked for; null is as if the field were not there.

    Raises:
        InvalidRequestError: a field that is not served here.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known or name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL:
            close = difflib.get_close_matches(name, [*known, *NEUTRAL, *WITHOUT_EFFECT], n=1)
            raise InvalidRequestError(
                name, value, "absent: no such field is known", f"Did you mean {close[0]}?" if close else ""
            )
        if not any(type(value) in _like(allowed) and value == allowed for allowed in NEUTRAL[name]):
            allowed = " or ".join(["absent", *(repr(allowed) for allowed in NEUTRAL[name])])
            raise InvalidRequestError(name, value, f"{allowed}, as it is not served here")
    return given


def check_model(given: Mapping[str, Any], model_name: str) -> None:
    """Raises WrongModelError unless the request is for this model, or for whichever is served."""
    model = given.get("model", model_name)
    if not isinstance(model, str):
        raise InvalidRequestError("model", model, "a text")
    if model != model_name:
        raise WrongModelError(f"model {model[:80]!r} is not served here; this is {model_name!r}.")


def sampling_params(
    given: Mapping[str, Any], max_tokens_field: str, defaults: Mapping[str, Any], **own: Any
) -> SamplingParams:
    """The sampling parameters; errors name the fields as the client spells them.

    Args:
        max_tokens_field: the name of the endpoint's field for max_tokens.
        defaults: the model's, for fields that are absent.
        **own: what the endpoint has read itself.
    """
    for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
        if isinstance(given.get(name), dict):  # it would do for a list
            raise InvalidRequestError(name, given[name], "a list")
    values = {name: default for name, default in defaults.items() if name in SAMPLING}
    values |= {name: given[name] for name in SAMPLING if name in given}
    if values.get("allowed_token_ids") == []:  # as clients say "all"
        del values["allowed_token_ids"]
    values |= own
    for name in ("logprobs", "prompt_logprobs"):
        if values.get(name) == ALL_LOGPROBS:
            raise InvalidRequestError(name, ALL_LOGPROBS, "at least 0: the whole vocabulary is too much for JSON")
    if "prompt_logprobs" in given and given.get("stream") is True:
        raise InvalidRequestError("prompt_logprobs", given["prompt_logprobs"], "absent where stream is true, as in vLLM")
    try:
        sampling = SamplingParams(
            **values,
            structured_outputs=structured.structured_outputs(given),
            repetition_detection=_repetition_detection(given.get("repetition_detection")),
            extra_args=_extra_args(given.get("vllm_xargs")),
        )
        check_stops(sampling.stop or (), sampling.stop_token_ids or ())
        check_bad_words(sampling.bad_words or ())
    except InvalidRequestError as error:
        raise respelled(error, given, max_tokens_field) from None
    if sampling.n > MAX_CHOICES:
        raise InvalidRequestError("n", sampling.n, f"at most {MAX_CHOICES}")
    return sampling


def respelled(error: InvalidRequestError, given: Mapping[str, Any], max_tokens_field: str) -> InvalidRequestError:
    """The same error, its parameter as the client spells it; also for what the engine says later."""
    head, _, tail = error.parameter.partition(".")
    if head == "extra_args":
        return relocated(error, f"vllm_xargs.{tail}" if tail else "vllm_xargs")
    if error.parameter == "max_tokens":
        return relocated(error, max_tokens_field)
    return structured.respelled(error, given)


def _repetition_detection(value: Any) -> RepetitionDetection | None:
    if value is None:
        return None
    names = {field.name for field in fields(RepetitionDetection)}
    if not isinstance(value, Mapping):
        raise InvalidRequestError("repetition_detection", value, "an object")
    for name in value:
        if name not in names:
            raise InvalidRequestError(f"repetition_detection.{name}", value[name], "absent: no such field is known")
    return RepetitionDetection(**value)


def _extra_args(value: Any) -> Any:
    """A lone number stands for a list of one."""
    if not isinstance(value, Mapping):
        return value
    return {name: [x] if isinstance(x, (int, float)) else x for name, x in value.items()}


def stream_options(given: Mapping[str, Any]) -> StreamOptions:
    is_stream = flag(given, "stream", False)
    options = given.get("stream_options")
    if options is None:
        return StreamOptions(is_stream)
    if not is_stream:
        raise InvalidRequestError("stream_options", options, "absent where stream is not true")
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options", options, "an object")
    for name in options:
        if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            raise InvalidRequestError(f"stream_options.{name}", options[name], "absent: no such field is known")
    read = {name: value for name, value in options.items() if value is not None}
    return StreamOptions(
        is_stream,
        includes_usage=flag(read, "include_usage", False, "stream_options."),
        has_usage_always=flag(read, "continuous_usage_stats", False, "stream_options."),
    )


def flag(given: Mapping[str, Any], name: str, default: bool, path: str = "") -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequestError(path + name, value, "true or false")
    return value


def _like(value: Any) -> tuple[type, ...]:
    """Types that mean the same in JSON: 0 and 0.0 are one number, and false is none."""
    return (int, float) if type(value) in (int, float) else (type(value),)
