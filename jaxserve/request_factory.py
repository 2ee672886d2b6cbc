"""From what a caller gives to a `Request` that one engine is sure to serve, or an error that names the field.

The only place where a request meets the model's limits; the Python API and every front door go through it.
"""

import hashlib
import itertools
import uuid
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from jaxserve.config import ResolvedConfig
from jaxserve.errors import InvalidRequestError
from jaxserve.request import Request, SamplingParams, whole_number
from jaxserve.tokenization.tokenizer import Tokenizer

BYTES_A_LOGPROB = 300
"""Of one log-probability as Python objects, and of what holds those of one token; 250 to 300 measured for 1 to 129 a token."""


class RequestFactory:
    """Makes requests for one engine. Thread-safe; `make` on a long text takes a while, so keep it off an event loop."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int] = ()):
        self._config = config
        self._tokenizer = tokenizer
        # A checkpoint may name an end that its own vocabulary lacks; such a token is never sampled.
        self._eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < config.vocab_size)
        self._ordinals = itertools.count()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end every request that does not ignore them."""
        return self._eos_token_ids

    @property
    def max_prompt_chars(self) -> int:
        """Longest text worth tokenizing; anything longer cannot fit."""
        return 64 * self._config.max_model_len

    def make(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        parse_special: bool = False,
    ) -> Request:
        """Returns the validated request.

        Args:
            prompt: text, or token ids.
            sampling: None takes the defaults.
            request_id: unique among running requests; None makes one.
            priority: lower goes first.
            add_special_tokens: whether the tokenizer puts its own (such as bos) around a text.
            parse_special: whether special tokens written in a text count as such (a rendered chat template's do).

        Raises:
            InvalidRequestError: names the field, what was given, what is allowed and the remedy.
        """
        sampling = sampling if sampling is not None else SamplingParams()
        self._check_sampling(sampling)
        if isinstance(prompt, str):
            token_ids = self._encode(prompt, add_special_tokens, parse_special)
        else:
            token_ids = _plain_ids(prompt)
        self._check_prompt(token_ids)
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidRequestError("request_id", request_id, "a string")
        eos = self._eos_token_ids
        stops = frozenset(sampling.stop_token_ids or ())
        return Request(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            sampling=sampling,
            stop_token_ids=stops if sampling.ignore_eos else stops | eos,
            eos_token_ids=eos,
            key=self._key(sampling.seed),
            priority=whole_number("priority", priority, -(2**31)),
            peak_host_bytes=self._peak_host_bytes(sampling, len(token_ids)),
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def _peak_host_bytes(self, sampling: SamplingParams, num_prompt_tokens: int) -> int:
        """Returns the most of the host's memory that the answer takes, were none of it read before its end.

        Log-probabilities: BYTES_A_LOGPROB * (logprobs + 2) a generated token.
        """
        if sampling.logprobs is None:
            return 0
        num_tokens = self._config.max_model_len - num_prompt_tokens
        if sampling.max_tokens is not None:
            num_tokens = min(num_tokens, sampling.max_tokens)
        needed = num_tokens * BYTES_A_LOGPROB * (sampling.logprobs + 2)
        self._check_host_bytes("logprobs", sampling.logprobs, needed, "Lower max_tokens or logprobs")
        return needed

    def _check_host_bytes(self, name: str, value: object, needed: int, remedy: str) -> None:
        """Raises InvalidRequestError for what could never start."""
        limit = self._config.max_host_bytes
        if needed > limit:
            raise InvalidRequestError(
                name,
                f"{value}, which may take {needed} bytes of the host's memory",
                f"within max_host_bytes ({limit})",
                f"{remedy}, or raise max_host_bytes when starting the engine.",
            )

    def _encode(self, prompt: str, add_special_tokens: bool, parse_special: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise InvalidRequestError("prompt", prompt, "token ids, as this engine has no tokenizer", "Pass tokenizer=.")
        if len(prompt) > self.max_prompt_chars:
            raise InvalidRequestError(
                "prompt", f"{len(prompt)} characters", f"at most {self.max_prompt_chars} characters", "Shorten it."
            )
        return tuple(self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens, parse_special=parse_special))

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        limit, vocab_size = self._config.max_model_len, self._config.vocab_size
        if not token_ids:
            raise InvalidRequestError("prompt", token_ids, "at least one token long")
        if len(token_ids) >= limit:
            raise InvalidRequestError(
                "prompt",
                f"{len(token_ids)} tokens",
                f"shorter than max_model_len ({limit} tokens), so that at least one token can follow",
                "Shorten it or raise max_model_len.",
            )
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise InvalidRequestError("prompt_token_ids", token_id, f"whole numbers in [0, {vocab_size})")

    def _check_sampling(self, sampling: SamplingParams) -> None:
        config = self._config
        if sampling.logprobs is not None and sampling.logprobs > config.max_logprobs:
            raise InvalidRequestError(
                "logprobs",
                sampling.logprobs,
                f"at most max_logprobs ({config.max_logprobs})",
                "Raise max_logprobs when starting the engine.",
            )
        if sampling.stop and self._tokenizer is None:
            remedy = "Use stop_token_ids, or pass a tokenizer."
            raise InvalidRequestError("stop", sampling.stop, "empty, as this engine has no tokenizer", remedy)
        for token_id in sampling.stop_token_ids or ():
            if token_id >= config.vocab_size:
                raise InvalidRequestError("stop_token_ids", token_id, f"in the vocabulary, [0, {config.vocab_size})")

    def _key(self, seed: int | None) -> tuple[int, int]:
        """A request with a seed has the same key on every engine; one without differs from every other."""
        source = f"seed {seed}" if seed is not None else f"engine {self._config.seed} {next(self._ordinals)}"
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _plain_ids(prompt: Any) -> tuple[Any, ...]:
    """Returns token ids as a tuple, those of numpy as plain ints; whether each of them is one is checked later."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array of numpy or jax
    if not isinstance(ids, Sequence) or isinstance(ids, (bytes, bytearray)):
        raise InvalidRequestError("prompt", prompt, "a text or a list of token ids")
    return tuple(i if type(i) is int or isinstance(i, bool) or not isinstance(i, Integral) else int(i) for i in ids)
