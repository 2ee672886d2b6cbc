"""From what a caller gives to a `Request` that one engine is sure to serve, or an error that names the field.

The only place where a request meets the model's limits; the Python API and every front door go through it.
"""

import hashlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from jaxserve.config import ResolvedConfig
from jaxserve.errors import InvalidRequestError
from jaxserve.host_bytes import peak_host_bytes
from jaxserve.request import Request, SamplingParams, whole_number
from jaxserve.sampling_limits import check_can_go_on, check_sampling
from jaxserve.structured.all_of import AllOf
from jaxserve.structured.bad_words import BadWords
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import CompiledConstraint
from jaxserve.structured.thinking import Reasoning, ThinkingBudget
from jaxserve.tokenization.bad_words import word_sequences
from jaxserve.tokenization.tokenizer import Tokenizer

POOLINGS = ("last", "mean")


class RequestFactory:
    """Makes requests for one engine. Thread-safe; `make` on a long text or a grammar takes a while: keep it off an event loop.

    Args:
        eos_token_ids: tokens that end every request that does not ignore them.
        defaults: fields of SamplingParams for whoever passes none: the model's own.
        compiler: of grammars; None refuses structured_outputs.
        reasoning: how the model marks its thinking; None refuses thinking_token_budget.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int] = (),
        *,
        defaults: Mapping[str, Any] | None = None,
        compiler: GrammarCompiler | None = None,
        reasoning: Reasoning | None = None,
    ):
        self._config = config
        self._tokenizer = tokenizer
        # A checkpoint may name an end that its own vocabulary lacks; such a token is never sampled.
        self._eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < config.vocab_size)
        self._defaults = dict(defaults or {})
        self._compiler = compiler
        self._reasoning = reasoning
        self._ordinals = itertools.count()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end every request that does not ignore them."""
        return self._eos_token_ids

    @property
    def max_prompt_chars(self) -> int:
        """Longest text worth tokenizing; anything longer cannot fit."""
        return 64 * self._config.max_model_len

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams that the model wants otherwise than SamplingParams() has them."""
        return self._defaults

    @property
    def default_sampling(self) -> SamplingParams:
        """What a request gets that comes without parameters."""
        return SamplingParams(**self._defaults)

    def make(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        parse_special: bool = False,
        truncate_prompt_tokens: int | None = None,
        pooling: str | None = None,
    ) -> Request:
        """Returns the validated request; one of several completions is for `fan_out`, not yet for the engine.

        Args:
            prompt: text, or token ids.
            sampling: None takes the model's defaults.
            request_id: unique among running requests; None makes one.
            priority: lower goes first.
            add_special_tokens: whether the tokenizer puts its own (such as bos) around a text.
            parse_special: whether special tokens written in a text count as such (a rendered chat template's do).
            truncate_prompt_tokens: in place of sampling's.
            pooling: "last" or "mean": the prompt's embedding in place of a completion; of sampling only
                truncate_prompt_tokens and skip_reading_prefix_cache matter then.

        Raises:
            InvalidRequestError: names the field, what was given, what is allowed and the remedy.
        """
        if pooling is not None:
            sampling = _pooling_params(pooling, sampling)
        sampling = sampling if sampling is not None else self.default_sampling
        if truncate_prompt_tokens is not None:
            sampling = replace(sampling, truncate_prompt_tokens=truncate_prompt_tokens)
        check_sampling(
            sampling, self._config, has_tokenizer=self._tokenizer is not None, has_reasoning=self._reasoning is not None
        )
        if isinstance(prompt, str):
            token_ids = self._encode(prompt, add_special_tokens, parse_special)
        else:
            token_ids = _plain_ids(prompt)
        token_ids = self._truncate(token_ids, sampling)
        self._check_prompt(token_ids)
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidRequestError("request_id", request_id, "a string")
        eos = self._eos_token_ids
        stops = frozenset(sampling.stop_token_ids or ())
        stops = stops if sampling.ignore_eos else stops | eos
        check_can_go_on(sampling, stops, self._config.vocab_size)
        return Request(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            sampling=sampling,
            stop_token_ids=stops,
            eos_token_ids=eos,
            key=self._key(sampling.seed),
            priority=whole_number("priority", priority, -(2**31)),
            prompt=prompt if isinstance(prompt, str) else None,
            pooling=pooling,
            peak_host_bytes=self._peak_host_bytes(len(token_ids), sampling),
            constraint=self._constraint(sampling),  # last: a grammar may take long
        )

    def fan_out(self, request: Request, *, shares_prompt_logprobs: bool = True) -> tuple[Request, ...]:
        """Returns the requests of `n` completions, each for the engine: the request itself where n is 1.

        Completion i has the id `{id}-{i}` and the seed + i, as in vLLM; greedy ones are equal.

        Args:
            shares_prompt_logprobs: the prompt's log-probabilities are computed once, with completion 0.
        """
        sampling = request.sampling
        if sampling.n == 1:
            return (request,)
        return tuple(
            self._child(request, index, has_prompt_logprobs=index == 0 or not shares_prompt_logprobs)
            for index in range(sampling.n)
        )

    def _child(self, request: Request, index: int, *, has_prompt_logprobs: bool) -> Request:
        sampling = request.sampling
        own = replace(
            sampling,
            n=1,
            seed=None if sampling.seed is None else (sampling.seed + index) % 2**63,
            prompt_logprobs=sampling.prompt_logprobs if has_prompt_logprobs else None,
        )
        return replace(
            request,
            request_id=f"{request.request_id}-{index}",
            sampling=own,
            key=self._key(own.seed),
            peak_host_bytes=self._peak_host_bytes(len(request.prompt_token_ids), own),
        )

    def _constraint(self, sampling: SamplingParams) -> CompiledConstraint | None:
        constraints = []
        if sampling.structured_outputs is not None and sampling.thinking_token_budget is not None:
            raise InvalidRequestError(
                "thinking_token_budget",
                sampling.thinking_token_budget,
                "None or -1 beside structured_outputs",
                "The form begins with the first token.",
            )
        if sampling.structured_outputs is not None:
            if self._compiler is None:
                raise InvalidRequestError(
                    "structured_outputs", sampling.structured_outputs, "None, as this engine serves none"
                )
            constraints.append(self._compiler.compile(sampling.structured_outputs))
        if sampling.bad_words and self._tokenizer is not None:
            constraints.append(self._bad_words(sampling.bad_words, self._tokenizer))
        if sampling.thinking_token_budget is not None and self._reasoning is not None:
            constraints.append(ThinkingBudget(self._reasoning, sampling.thinking_token_budget))
        if not constraints:
            return None
        return constraints[0] if len(constraints) == 1 else AllOf(tuple(constraints))

    def _bad_words(self, words: Sequence[str], tokenizer: Tokenizer) -> CompiledConstraint:
        sequences = word_sequences(words, tokenizer)
        for token_id in itertools.chain(*sequences):
            if token_id >= self._config.vocab_size:
                raise InvalidRequestError("bad_words", words, f"of tokens in [0, {self._config.vocab_size})")
        return BadWords(sequences)

    def _peak_host_bytes(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        """The formula of `host_bytes`, for all n completions.

        Raises:
            InvalidRequestError: it is more than the engine may ever use.
        """
        room = self._config.max_model_len - num_prompt_tokens
        num_output_tokens = min(room, sampling.max_tokens or room)
        first = peak_host_bytes(num_prompt_tokens, num_output_tokens, sampling, self._config.vocab_size)
        others = peak_host_bytes(0, num_output_tokens, sampling, self._config.vocab_size)
        num_bytes = first + (sampling.n - 1) * others
        limit = self._config.max_host_bytes
        if num_bytes > limit:
            name = "prompt_logprobs" if sampling.prompt_logprobs is not None and first > 2 * others else "logprobs"
            raise InvalidRequestError(
                name,
                getattr(sampling, name),
                f"such that the results take at most max_host_bytes ({limit} bytes), and not {num_bytes}",
                "Ask for fewer log-probabilities or tokens, or raise max_host_bytes when starting the engine.",
            )
        return num_bytes

    def _truncate(self, token_ids: tuple[Any, ...], sampling: SamplingParams) -> tuple[Any, ...]:
        limit = sampling.truncate_prompt_tokens
        if limit == -1:
            limit = max(1, self._config.max_model_len - (sampling.max_tokens or 1))
        return token_ids if limit is None else token_ids[-limit:]

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

    def _key(self, seed: int | None) -> tuple[int, int]:
        """A request with a seed has the same key on every engine; one without differs from every other."""
        source = f"seed {seed}" if seed is not None else f"engine {self._config.seed} {next(self._ordinals)}"
        digest = hashlib.blake2b(source.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _pooling_params(pooling: str, sampling: SamplingParams | None) -> SamplingParams:
    if pooling not in POOLINGS:
        raise InvalidRequestError("pooling", pooling, f"None or one of {', '.join(POOLINGS)}")
    given = sampling if sampling is not None else SamplingParams()
    return SamplingParams(
        max_tokens=1,
        detokenize=False,
        truncate_prompt_tokens=given.truncate_prompt_tokens,
        skip_reading_prefix_cache=given.skip_reading_prefix_cache,
    )


def _plain_ids(prompt: Any) -> tuple[Any, ...]:
    """Returns token ids as a tuple, those of numpy as plain ints; whether each of them is one is checked later."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array of numpy or jax
    if not isinstance(ids, Sequence) or isinstance(ids, (bytes, bytearray)):
        raise InvalidRequestError("prompt", prompt, "a text or a list of token ids")
    return tuple(i if type(i) is int or isinstance(i, bool) or not isinstance(i, Integral) else int(i) for i in ids)
