"""The forms in which a caller of `LLM` gives prompts and parameters. Knows nothing of the model."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

from jaxserve.errors import InvalidRequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": token ids}."""

Item = TypeVar("Item")


def plain_prompt(prompt: Prompt) -> str | Sequence[int]:
    if not isinstance(prompt, Mapping):
        return prompt
    for name in ("prompt_token_ids", "prompt"):
        if prompt.get(name) is not None:
            return prompt[name]
    raise InvalidRequestError("prompt", sorted(prompt), 'text, token ids, or a dict with "prompt" or "prompt_token_ids"')


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns a list of prompts; one text, one mapping or one list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequestError("prompts", prompts, "a text, a list of token ids, or a list of such prompts")
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], Integral) else listed


def one_each(name: str, given: Item | Iterable[Item] | None, kind: type[Item], count: int) -> list[Item] | list[None]:
    """Returns as many as there are prompts: one for all, or a list with one a prompt.

    Raises:
        InvalidRequestError: names the argument.
    """
    if given is None:
        return [None] * count
    if isinstance(given, kind):
        return [given] * count
    listed: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(item, kind) for item in listed):
        raise InvalidRequestError(name, given, f"None, a value of type {kind.__name__}, or a list with one a prompt")
    if len(listed) != count:
        raise InvalidRequestError(name, f"{len(listed)} entries", f"one, or as many as prompts ({count})")
    return listed


def tokenization_options(given: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Returns add_special_tokens and truncate_prompt_tokens; the second is checked where it is used.

    Raises:
        InvalidRequestError: names the key.
    """
    if not isinstance(given, Mapping):
        raise InvalidRequestError("tokenization_kwargs", given, "a mapping")
    for name, value in given.items():
        if name not in ("add_special_tokens", "truncate_prompt_tokens"):
            allowed = "absent: add_special_tokens and truncate_prompt_tokens are known"
            raise InvalidRequestError(f"tokenization_kwargs.{name}", value, allowed)
    add_special_tokens = given.get("add_special_tokens", True)
    if not isinstance(add_special_tokens, bool):
        raise InvalidRequestError("tokenization_kwargs.add_special_tokens", add_special_tokens, "True or False")
    return add_special_tokens, given.get("truncate_prompt_tokens")
