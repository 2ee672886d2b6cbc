"""Decides what each step computes, and takes note of what came out. Pure Python; owns the sequences.

One idea: there is no prefill phase and no decode phase. A sequence has `num_known` tokens, `num_in_flight` more on the device,
and `num_computed` positions; a step computes `min(budget, num_known + num_in_flight - num_computed)` of them. Step n + 1 is
planned before step n is committed: nothing is planned past a length at which a sequence is certain to end, and a token that came
for a sequence that has ended meanwhile is dropped at commit.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.config import ResolvedConfig
from jaxserve.errors import IntegrityError
from jaxserve.plan import Admission, PageUpdate, RowSampling, SampledToken, SequencePlan, StepPlan, StepResult
from jaxserve.request import Request
from jaxserve.scheduling.admission import admit
from jaxserve.scheduling.budget import Budget
from jaxserve.scheduling.holdings import Holdings
from jaxserve.scheduling.repetition import is_repeating
from jaxserve.scheduling.sequence import Sequence, in_order


class Committed(NamedTuple):
    """One token that was added to a sequence.

    Attributes:
        token: None at the end of a request for an embedding.
        finish_reason: set when it was the last; the sequence's pages are free already.
        stop_reason: the stop token id, unless it was the model's end-of-sequence token.
    """

    request_id: str
    token: SampledToken | None
    finish_reason: str | None = None
    stop_reason: int | None = None
    is_nonfinite: bool = False


class Scheduler:
    """See the module docstring.

    Args:
        config: limits of the engine.
        num_groups: block tables a sequence has.
    """

    def __init__(self, config: ResolvedConfig, num_groups: int = 1):
        self.config = config
        self.holdings = Holdings(config, num_groups)
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # both in order of Sequence.order
        self._running: list[Sequence] = []
        self._sampling_in: dict[int, list[Sequence]] = {}  # step in flight -> sequences that get a token from it
        self._num_arrived = 0
        self._next_step = 0

    # --- what comes in and goes out ---------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes a request in; it fits the engine (`RequestFactory` has checked)."""
        prompt = request.prompt_token_ids
        limit = self.config.max_model_len
        max_tokens = request.sampling.max_tokens
        sequence = Sequence(
            request=request,
            arrival=self._num_arrived,
            max_total_len=limit if max_tokens is None else min(limit, len(prompt) + max_tokens),
            token_ids=array("i", prompt),
            pages=[[] for _ in self.holdings.pools],
            is_processed=(request.sampling.logprobs_mode or self.config.logprobs_mode) == "processed",
        )
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        _enter(self._waiting, sequence)

    def finish(self, request_id: str) -> bool:
        """Ends a sequence now, for whatever reason, and frees what it holds; returns whether it was there."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        _leave(self._waiting if sequence.row is None else self._running, sequence)
        self.holdings.end(sequence)
        sequence.is_ended = True
        return True

    # --- plan -------------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Returns the next step, or None when there is nothing to compute now."""
        budget = Budget(self.config)
        takes: dict[Sequence, int] = {}
        was_preempted = self._plan_running(budget, takes)
        if self._waiting and not was_preempted:
            self._plan_waiting(budget, takes)
        if budget.was_capped and budget.tokens:
            self._share_out_rest(budget, takes)
        return self._step_of(takes) if takes else None

    def _plan_running(self, budget: Budget, takes: dict[Sequence, int]) -> bool:
        """Gives running sequences their share, in order; returns whether one had to be preempted.

        Each leaves a token for everybody behind it: a long prompt must not stop those that decode. There are enough, because
        max_num_batched_tokens is at least max_num_seqs.
        """
        num_preemptions = self.num_preemptions
        line = tuple(self._running)
        num_behind = len(line)
        for sequence in line:
            num_behind -= 1
            if sequence.row is None:
                continue  # preempted a moment ago for one before it
            take = budget.take(sequence, num_behind)
            if take == 0:
                continue
            stop = sequence.num_computed + take
            if stop <= sequence.num_reserved or self._make_room(sequence, stop):
                takes[sequence] = take
        return self.num_preemptions > num_preemptions

    def _make_room(self, sequence: Sequence, stop: int) -> bool:
        """Reserves pages up to `stop`, preempting the last of the line as long as some lack; returns False if that was itself."""
        while not self.holdings.reserve(sequence, stop):
            victim = self._running[-1]  # not planned yet: whoever is planned comes before `sequence`
            self.holdings.vacate(victim)
            self._preempted(victim)
            if victim is sequence:
                return False
        return True

    def _plan_waiting(self, budget: Budget, takes: dict[Sequence, int]) -> None:
        entered, left = admit(self._waiting, self._running, self.holdings, budget, takes)
        for sequence in left:
            self._preempted(sequence)
        for sequence in entered:
            _leave(self._waiting, sequence)
            _enter(self._running, sequence)

    def _preempted(self, sequence: Sequence) -> None:
        """Moves a sequence that has lost its row and pages; it will be computed again from its tokens."""
        _leave(self._running, sequence)
        _enter(self._waiting, sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _share_out_rest(self, budget: Budget, takes: dict[Sequence, int]) -> None:
        """Gives tokens that nobody else can use to the long prompts, in order: their pages are theirs since admission."""
        for sequence, taken in takes.items():
            takes[sequence] = budget.take_more(sequence, taken)

    def _step_of(self, takes: dict[Sequence, int]) -> StepPlan:
        """Returns the plan of these takes, and counts them as computed."""
        admissions: list[Admission] = []
        updates: list[PageUpdate] = []
        planned: list[SequencePlan] = []
        sampling: list[Sequence] = []
        for sequence, take in _decodes_first(takes):
            row = sequence.row
            assert row is not None
            if sequence.is_new_to_row:
                sequence.is_new_to_row = False
                admissions.append(_admission(sequence, row))
            start = sequence.num_computed
            sequence.num_computed = stop = start + take
            if stop > sequence.num_told:
                self._tell_pages(sequence, row, stop, updates)
            num_known = len(sequence.token_ids)
            samples = stop == num_known + sequence.num_in_flight
            if samples:
                sequence.num_in_flight += 1
                sampling.append(sequence)
            plan = SequencePlan(
                sequence.request_id,
                row,
                start,
                take,
                tuple(sequence.token_ids[start:stop]) if start < num_known else (),
                samples,
                sequence.num_logprobs,
                sequence.is_processed,
                tuple(sorted(sequence.request.stop_token_ids)) if samples and stop < sequence.min_total_len else (),
                sequence.num_prompt_tokens,
                samples and sequence.has_constraint,
            )
            planned.append(_with_what_is_read(plan, sequence) if sequence.reads_hidden else plan)
            if sequence.next_key_at <= stop and sequence.next_key_at <= num_known:
                self.holdings.give_keys(sequence, stop)
        step = self._next_step
        self._next_step += 1
        self._sampling_in[step] = sampling
        return StepPlan(step, tuple(admissions), tuple(updates), tuple(planned))

    def _tell_pages(self, sequence: Sequence, row: int, stop: int, updates: list[PageUpdate]) -> None:
        """Tells the device of the pages that this step begins to use: as many as a bucket has room for."""
        page_size = self.config.page_size
        told, needed = sequence.num_told // page_size, -(-stop // page_size)
        for group, pages in enumerate(sequence.pages):
            updates.extend(PageUpdate(group, row, index, pages[index]) for index in range(told, needed))
        sequence.num_told = needed * page_size

    # --- commit -----------------------------------------------------------------------------------------------------

    def commit(self, result: StepResult) -> list[Committed]:
        """Adds a step's tokens to their sequences and ends those that are done; tokens of ended sequences are dropped."""
        committed = []
        tokens, nonfinite = result.tokens, result.nonfinite
        for sequence in self._sampling_in.pop(result.step):
            if sequence.is_ended:
                continue  # the id may even belong to another request by now
            request_id = sequence.request_id
            sequence.num_in_flight -= 1
            if sequence.request.pooling is not None:
                self.finish(request_id)
                committed.append(Committed(request_id, None, "stop"))
                continue
            token = tokens[request_id]
            if request_id in nonfinite:
                self.holdings.forget_pages(sequence)  # what made the logits so may stand in them
                self.finish(request_id)
                committed.append(Committed(request_id, token, "error", is_nonfinite=True))
                continue
            token_id, token_ids = token.token_id, sequence.token_ids
            token_ids.append(token_id)
            may_end = token_id in sequence.stop_token_ids or len(token_ids) >= sequence.max_total_len
            if not may_end and not sequence.detects_repetition:
                committed.append(Committed(request_id, token))
                continue
            reason, stop_reason = _finish_reason(sequence, token_id)
            if reason is not None:
                self.finish(request_id)
            committed.append(Committed(request_id, token, reason, stop_reason))
        return committed

    # --- the books --------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        return self.holdings.num_free_pages

    @property
    def num_cached_tokens(self) -> int:
        return self.holdings.num_cached_tokens

    def num_cached_tokens_of(self, request_id: str) -> int:
        """Returns how many of a request's prompt tokens the prefix cache spared it, once it has been admitted."""
        return self._sequences[request_id].num_cached_tokens or 0

    def reset_prefix_cache(self) -> None:
        """Forgets what every page holds; running sequences go on."""
        self.holdings.reset_prefix_cache()

    def request_ids(self) -> Iterable[str]:
        return tuple(self._sequences)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, rows, host memory and sequences add up."""
        self.holdings.check_integrity(self._running, self._waiting)
        listed = sorted(s.request_id for s in [*self._running, *self._waiting])
        if listed != sorted(self._sequences):
            raise IntegrityError(f"sequences are lost or listed twice: {listed} against {sorted(self._sequences)}")


def _enter(line: list[Sequence], sequence: Sequence) -> None:
    insort(line, sequence, key=in_order)


def _leave(line: list[Sequence], sequence: Sequence) -> None:
    del line[bisect_left(line, sequence.order, key=in_order)]


def _decodes_first(takes: dict[Sequence, int]) -> list[tuple[Sequence, int]]:
    """Returns one-token sequences first: decode rows lie together in the batch."""
    items = list(takes.items())
    chunks = [item for item in items if item[1] > 1]
    return [item for item in items if item[1] == 1] + chunks if chunks else items


def _finish_reason(sequence: Sequence, token_id: int) -> tuple[str | None, int | None]:
    """Returns why the token that was just added is the last one, or None, and which stop token of the request's own it is."""
    num_known = len(sequence.token_ids)
    request = sequence.request
    # Before min_tokens a stop token comes only where a form is complete and nothing else may follow.
    if token_id in request.stop_token_ids and (num_known >= sequence.min_total_len or sequence.has_constraint):
        is_eos = token_id in request.eos_token_ids and not request.sampling.ignore_eos
        return "stop", None if is_eos else token_id
    if num_known >= sequence.max_total_len:
        return "length", None
    detection = request.sampling.repetition_detection
    if detection is None or num_known < sequence.min_total_len:
        return None, None
    return ("repetition" if is_repeating(sequence.token_ids, sequence.num_prompt_tokens, detection) else None), None


def _with_what_is_read(plan: SequencePlan, sequence: Sequence) -> SequencePlan:
    """Returns a plan that says which prompt tokens are scored, and whether hidden states are pooled."""
    request = sequence.request
    num_logprobs = request.sampling.prompt_logprobs
    if num_logprobs is None or sequence.num_known > sequence.num_prompt_tokens:
        return plan._replace(pooling=request.pooling)
    scored = request.prompt_token_ids[plan.start + 1 : plan.start + plan.num_tokens + 1]
    return plan._replace(
        num_prompt_logprobs=num_logprobs if scored else None, scored_token_ids=scored, pooling=request.pooling
    )


def _admission(sequence: Sequence, row: int) -> Admission:
    """Returns what the runner has to know of a sequence that has taken a row."""
    sampling = sequence.request.sampling
    row_sampling = RowSampling(
        temperature=0.0 if sampling.is_greedy else sampling.temperature,
        top_k=max(sampling.top_k, 0),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        key=sequence.request.key,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=tuple(sorted((sampling.logit_bias or {}).items())),
        allowed_token_ids=sampling.allowed_token_ids,  # type: ignore[arg-type]
        logprob_token_ids=tuple(sampling.logprob_token_ids or ()),
        processors=tuple((sampling.extra_args or {}).items()),  # type: ignore[arg-type]
    )
    num_prompt = sequence.num_prompt_tokens
    counted = tuple(sequence.token_ids) if row_sampling.has_penalties else ()
    return Admission(row, sequence.request_id, row_sampling, counted[:num_prompt], counted[num_prompt:])
