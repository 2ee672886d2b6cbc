"""Beam search over whatever says which tokens are likely next: a loop of one-token requests, cheap by the prefix cache.

Parameters and results are vLLM's; which beams win is as in `transformers` with early_stopping="never". Knows no engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

from tqdm import tqdm

from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import TokenLogprobs
from jaxserve.request import SamplingParams, whole_number

NextTokens = Callable[[list[tuple[int, ...]]], list[TokenLogprobs]]
"""From contexts to the most likely tokens after each."""


MAX_LENGTH_PENALTY = 20
"""Beyond it a long sequence's divisor is no float any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How to search.

    Attributes:
        beam_width: beams that are followed, and sequences that are returned.
        max_tokens: longest continuation [tokens].
        ignore_eos: go on after an end-of-sequence token.
        temperature: of the one-token requests; without effect on raw log-probabilities.
        length_penalty: a sequence's score is its log-probability / its number of generated tokens ** length_penalty.

    Raises:
        InvalidRequestError: names the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError("ignore_eos", self.ignore_eos, "True or False")
        penalty = self.length_penalty
        if not isinstance(penalty, Real) or isinstance(penalty, bool) or not abs(penalty) <= MAX_LENGTH_PENALTY:
            raise InvalidRequestError(
                "length_penalty", penalty, f"a number in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}]"
            )

    def num_candidates(self, num_eos_tokens: int) -> int:
        """Most likely tokens to look at after each beam: even if every end is among them, each beam can go on."""
        return self.beam_width * (1 if self.ignore_eos else 1 + max(1, num_eos_tokens))

    def step_sampling(self, num_eos_tokens: int, max_logprobs: int) -> SamplingParams:
        """Returns what each step asks the engine for.

        Raises:
            InvalidRequestError: so many beams need more log-probabilities than the engine gives.
        """
        num_candidates = self.num_candidates(num_eos_tokens)
        if num_candidates > max_logprobs:
            raise InvalidRequestError(
                "beam_width",
                self.beam_width,
                f"at most {max_logprobs * self.beam_width // num_candidates}, as max_logprobs is {max_logprobs}",
                "Raise max_logprobs when starting the engine.",
            )
        return SamplingParams(temperature=self.temperature, max_tokens=1, logprobs=num_candidates, detokenize=False)


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence; fields as in vLLM.

    Attributes:
        tokens: prompt and continuation, its end-of-sequence token included.
        logprobs: what was likely in each place of the continuation.
        cum_logprob: of the continuation.
        text: of all tokens; None without a tokenizer.
        finish_reason: "stop" or "length".
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Search:
    """Of one prompt: the beams that go on, and the best of those that have ended, with their scores."""

    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    max_tokens: int
    beams: list[BeamSearchSequence]
    ended: list[tuple[float, BeamSearchSequence]] = field(default_factory=list)

    def advance(self, likely: Sequence[TokenLogprobs]) -> None:
        """Goes on by one token.

        Source: "never" in transformers' `GenerationMixin._beam_search`: a candidate ends a sequence only where it is among the
        beam_width best, and those that could go on and are not are dropped.
        """
        width = self.params.beam_width
        candidates = [
            (beam.cum_logprob + entry.logprob, token_id, beam, entries)
            for beam, entries in zip(self.beams, likely, strict=True)
            for token_id, entry in entries.items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        self.beams = []
        for place, (cum_logprob, token_id, beam, entries) in enumerate(candidates):
            is_eos = token_id in self.eos_token_ids
            if (place >= width and is_eos) or len(self.beams) == width:
                continue
            longer = BeamSearchSequence([*beam.tokens, token_id], [*beam.logprobs, entries], cum_logprob)
            num_tokens = len(longer.logprobs)
            if not is_eos and num_tokens < self.max_tokens:
                self.beams.append(longer)
            elif place < width:
                longer.finish_reason = "stop" if is_eos else "length"
                self.ended.append((self._score(cum_logprob, num_tokens), longer))
        self.ended = sorted(self.ended, key=lambda scored: -scored[0])[:width]
        if self.beams and len(self.ended) == width and self._best_possible() <= self.ended[-1][0]:
            self.beams = []

    def _best_possible(self) -> float:
        """Of what any beam may still become: log-probabilities only fall, and a length penalty above 0 rewards length."""
        best = self.beams[0]
        return self._score(best.cum_logprob, self.max_tokens if self.params.length_penalty > 0 else len(best.logprobs))

    def _score(self, cum_logprob: float, num_tokens: int) -> float:
        return cum_logprob / num_tokens**self.params.length_penalty


def beam_search(
    prompts: Sequence[tuple[int, ...]],
    params: BeamSearchParams,
    next_tokens: NextTokens,
    *,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    use_tqdm: bool = False,
) -> list[BeamSearchOutput]:
    """Searches for all prompts side by side; text is the caller's to add.

    Args:
        next_tokens: gives at least `params.num_candidates` tokens a context, or the whole vocabulary.
    """
    searches = [
        _Search(
            params,
            frozenset() if params.ignore_eos else eos_token_ids,
            min(params.max_tokens, max_model_len - len(prompt)),
            [BeamSearchSequence(list(prompt), [])],
        )
        for prompt in prompts
    ]
    for _ in tqdm(range(params.max_tokens), desc="Beam search", unit="token", disable=not use_tqdm, dynamic_ncols=True):
        open_searches = [search for search in searches if search.beams]
        if not open_searches:
            break
        likely = iter(next_tokens([tuple(beam.tokens) for search in open_searches for beam in search.beams]))
        for search in open_searches:
            search.advance([next(likely) for _ in search.beams])
    return [BeamSearchOutput([sequence for _, sequence in search.ended]) for search in searches]
