"""What one engine allows of `SamplingParams`, beyond what they say of themselves: its vocabulary, its limits, its processors."""

from collections.abc import Iterable, Mapping

from jaxserve.config import ResolvedConfig
from jaxserve.errors import InvalidRequestError
from jaxserve.request import ALL_LOGPROBS, SamplingParams


def check_sampling(sampling: SamplingParams, config: ResolvedConfig, *, has_tokenizer: bool, has_reasoning: bool) -> None:
    """Raises InvalidRequestError, which names the field, where this engine cannot serve it."""
    for name in ("logprobs", "prompt_logprobs"):
        # The whole vocabulary is served whatever max_logprobs says: it has a program of its own, and a price in host memory.
        count = getattr(sampling, name)
        if count is not None and count != ALL_LOGPROBS and count > config.max_logprobs:
            raise InvalidRequestError(
                name,
                count,
                f"at most max_logprobs ({config.max_logprobs}), or -1 for the whole vocabulary",
                "Raise max_logprobs when starting the engine.",
            )
    if not has_tokenizer:
        _check_without_tokenizer(sampling)
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_vocabulary(name, getattr(sampling, name) or (), config.vocab_size)
    _check_vocabulary("logit_bias", sampling.logit_bias or (), config.vocab_size)
    _check_processors(sampling, dict(config.logits_processors))
    if sampling.truncate_prompt_tokens is not None and sampling.truncate_prompt_tokens >= config.max_model_len:
        raise InvalidRequestError(
            "truncate_prompt_tokens", sampling.truncate_prompt_tokens, f"less than max_model_len ({config.max_model_len})"
        )
    if sampling.thinking_token_budget is not None and not has_reasoning:
        raise InvalidRequestError(
            "thinking_token_budget",
            sampling.thinking_token_budget,
            "None or -1, as this engine does not know how reasoning begins and ends",
            "Set reasoning_start and reasoning_end when starting the engine, or limit the whole completion by max_tokens.",
        )


def check_can_go_on(sampling: SamplingParams, stop_token_ids: frozenset[int], vocab_size: int) -> None:
    """Raises InvalidRequestError where min_tokens forbids every token that is allowed."""
    allowed = sampling.allowed_token_ids
    if sampling.min_tokens and allowed is not None and stop_token_ids.issuperset(allowed):
        raise InvalidRequestError(
            "allowed_token_ids",
            allowed,
            "with a token that does not end the completion, as min_tokens is not 0",
            "Set ignore_eos or min_tokens=0.",
        )
    if sampling.min_tokens and len(stop_token_ids) >= vocab_size:
        raise InvalidRequestError(
            "stop_token_ids", f"{len(stop_token_ids)} token ids", "fewer than the vocabulary has, as min_tokens is not 0"
        )


def _check_vocabulary(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise InvalidRequestError(name, token_id, f"in the vocabulary, [0, {vocab_size})")


def _check_without_tokenizer(sampling: SamplingParams) -> None:
    remedies = {
        "stop": "Use stop_token_ids, or pass a tokenizer.",
        "bad_words": "Use logit_bias, or pass a tokenizer.",
        "structured_outputs": "Pass a tokenizer.",
    }
    for name, remedy in remedies.items():
        value = getattr(sampling, name)
        if value:
            raise InvalidRequestError(name, value, "empty, as this engine has no tokenizer", remedy)


def _check_processors(sampling: SamplingParams, processors: Mapping[str, int]) -> None:
    """extra_args names registered processors, and has as many parameters as each takes."""
    for name, parameters in (sampling.extra_args or {}).items():
        if name not in processors:
            known = ", ".join(sorted(processors)) or "none"
            raise InvalidRequestError(
                f"extra_args.{name}",
                list(parameters),
                f"of a logits processor that was registered when the engine was started ({known})",
            )
        if len(parameters) != processors[name]:
            raise InvalidRequestError(f"extra_args.{name}", list(parameters), f"{processors[name]} numbers")
