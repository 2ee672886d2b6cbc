"""Decides what each step computes, and takes note of what came out. Pure Python; owns sequences, rows and pages.

One idea: there is no prefill phase and no decode phase. A sequence has `num_known` tokens, `num_in_flight` more on the device,
and `num_computed` positions; a step computes `min(budget, num_known + num_in_flight - num_computed)` of them. Step n + 1 is
planned before step n is committed: nothing is planned past a length at which a sequence is certain to end, and a token that came
for a sequence that has ended meanwhile is dropped at commit.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from jaxserve.config import ResolvedConfig
from jaxserve.errors import IntegrityError
from jaxserve.plan import Admission, PageUpdate, RowSampling, SampledToken, SequencePlan, StepPlan, StepResult
from jaxserve.request import Request
from jaxserve.scheduling.page_pool import PagePool
from jaxserve.scheduling.prefix_cache import PrefixCache, page_keys
from jaxserve.scheduling.sequence import Sequence

MAX_SKIPS = 64
"""Steps that those behind may pass a waiting sequence for which pages are lacking; then nobody else is admitted before it."""

MAX_PASSED = 32
"""Waiting sequences that one step looks past: a scan of 10,000 took 100 ms a step."""


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


class _Budget:
    """What is left of a step."""

    def __init__(self, config: ResolvedConfig):
        self.tokens = config.max_num_batched_tokens
        self.decode_items = config.max_decode_items
        self.cached_pages = config.max_cached_pages
        self.full_scores = config.max_full_scores


class Scheduler:
    """See the module docstring.

    Args:
        config: limits of the engine.
        num_groups: block tables a sequence has; each has its own pool of config.num_pages.
    """

    def __init__(self, config: ResolvedConfig, num_groups: int = 1):
        self.config = config
        self.pools = tuple(PagePool(config.num_pages) for _ in range(num_groups))
        self.caches = tuple(PrefixCache(pool) for pool in self.pools) if config.max_cached_pages else ()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # both in order of Sequence.order
        self._running: list[Sequence] = []
        self._free_rows = list(range(config.max_num_seqs))[::-1]
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
            token_ids=list(prompt),
            pages=[[] for _ in self.pools],
        )
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        _enter(self._waiting, sequence)

    def finish(self, request_id: str) -> bool:
        """Ends a sequence now, for whatever reason, and frees what it holds; returns whether it was there."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.row is not None:
            _leave(self._running, sequence)
            self._vacate(sequence)
        else:
            _leave(self._waiting, sequence)
        return True

    def _vacate(self, sequence: Sequence) -> None:
        """Takes row and pages away."""
        assert sequence.row is not None
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.release(pages)
        sequence.pages = [[] for _ in self.pools]
        sequence.num_pages_told = sequence.num_pages_cached = 0
        self._free_rows.append(sequence.row)
        sequence.row = None
        sequence.num_computed = 0

    # --- plan -------------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Returns the next step, or None when there is nothing to compute now."""
        budget = _Budget(self.config)
        takes: dict[Sequence, int] = {}
        was_preempted = self._plan_running(budget, takes)
        if not was_preempted:
            self._plan_waiting(budget, takes)
        if not takes:
            return None
        # one-token sequences first: decode rows lie together in the batch
        ordered = sorted(takes.items(), key=lambda item: item[1] > 1)
        admissions = [_admission(s) for s, _ in ordered if s.is_new_to_row]
        updates: list[PageUpdate] = []
        for sequence, take in ordered:
            self._tell_pages(sequence, take, updates)
        sequences = [self._plan_sequence(s, take) for s, take in ordered]
        step = self._next_step
        self._next_step += 1
        self._sampling_in[step] = [s for (s, _), planned in zip(ordered, sequences, strict=True) if planned.samples]
        if self.caches:
            page_size = self.config.page_size
            for sequence, _ in ordered:
                if sequence.num_computed >= (sequence.num_pages_cached + 1) * page_size:
                    self._cache_pages(sequence)
        return StepPlan(step, tuple(admissions), tuple(updates), tuple(sequences))

    def _plan_running(self, budget: _Budget, takes: dict[Sequence, int]) -> bool:
        """Gives running sequences their share, in order; returns whether one had to be preempted.

        Each leaves a token for everybody behind it: a long prompt must not stop those that decode. There are enough, because
        max_num_batched_tokens is at least max_num_seqs.
        """
        was_preempted = False
        line = tuple(self._running)
        for num_behind, sequence in zip(reversed(range(len(line))), line, strict=True):
            if sequence.row is None:
                continue  # preempted a moment ago for one before it
            take = self._take(sequence, budget, num_behind)
            if take == 0:
                continue
            while not self._reserve(sequence, sequence.num_computed + take):
                victim = self._running[-1]  # not planned yet: whoever is planned comes before `sequence`
                self._preempt(victim)
                was_preempted = True
                if victim is sequence:
                    break
            else:
                self._grant(sequence, take, budget, takes)
        return was_preempted

    def _plan_waiting(self, budget: _Budget, takes: dict[Sequence, int]) -> None:
        """Admits waiting sequences in order; one whose pages are lacking is passed, unless it has been for too long."""
        num_passed = 0
        admitted: list[Sequence] = []
        for sequence in self._waiting:
            if not self._free_rows or budget.tokens == 0 or num_passed == MAX_PASSED:
                break
            if sequence.num_in_flight:
                continue  # preempted with a token on the device: known after the next commit
            cached = self._lookup(sequence)
            if len(cached[0]) > budget.cached_pages:
                break  # the step's input has no room for as many; the next one's has
            take = self._admit(sequence, cached, budget)
            if take == 0:
                num_passed += 1
                sequence.num_skips += 1
                if sequence.num_skips > MAX_SKIPS:
                    break
                continue
            sequence.row = self._free_rows.pop()
            sequence.is_new_to_row = True
            sequence.num_skips = 0
            admitted.append(sequence)
            self._grant(sequence, take, budget, takes)
        for sequence in admitted:
            _leave(self._waiting, sequence)
            _enter(self._running, sequence)

    def _lookup(self, sequence: Sequence) -> list[list[int]]:
        """Returns the pages, by group, that hold the sequence's first tokens already; at least its last token is computed."""
        if not self.caches or not sequence.reads_prefix_cache:
            return [[] for _ in self.pools]
        keys = self._page_keys(sequence)
        found = [cache.lookup(keys[: (sequence.num_known - 1) // self.config.page_size]) for cache in self.caches]
        length = min(map(len, found))
        return [pages[:length] for pages in found]

    def _page_keys(self, sequence: Sequence) -> list[bytes]:
        root = b"%d" % sequence.num_prompt_tokens if self.config.reads_prompt_len else b""
        return page_keys(sequence.token_ids, self.config.page_size, sequence.page_keys, root)

    def _admit(self, sequence: Sequence, cached: list[list[int]], budget: _Budget) -> int:
        """Makes the cached pages, and new ones for all other known tokens, the sequence's own.

        Returns:
            How many of its tokens this step computes; 0, and nothing has changed, where budget or pages do not allow any.
        """
        num_cached = len(cached[0])
        sequence.num_computed = num_cached * self.config.page_size
        take = self._take(sequence, budget)
        lacking = -(-sequence.num_known // self.config.page_size) - num_cached
        has_room = all(
            pool.num_free - sum(map(pool.is_free, pages)) >= lacking for pool, pages in zip(self.pools, cached, strict=True)
        )
        if take == 0 or not has_room:
            sequence.num_computed = 0
            return 0
        for pool, held, pages in zip(self.pools, sequence.pages, cached, strict=True):
            for page in pages:
                pool.share(page)
            held.extend(pages)
        is_reserved = self._reserve(sequence, sequence.num_known)
        assert is_reserved
        budget.cached_pages -= num_cached
        sequence.num_pages_cached = num_cached
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_cached_tokens += sequence.num_computed
        return take

    def _cache_pages(self, sequence: Sequence) -> None:
        """Gives the prefix cache the pages that this step fills with committed tokens.

        Steps run in order, so any later one may read them.
        """
        num_full = min(sequence.num_computed, sequence.num_known) // self.config.page_size
        keys = self._page_keys(sequence)
        for cache, pages in zip(self.caches, sequence.pages, strict=True):
            for index in range(sequence.num_pages_cached, num_full):
                cache.insert(keys[index], pages[index])
        sequence.num_pages_cached = max(sequence.num_pages_cached, num_full)

    def num_cached_tokens_of(self, request_id: str) -> int:
        """Returns how many of a request's prompt tokens the prefix cache spared it, once it has been admitted."""
        return self._sequences[request_id].num_cached_tokens or 0

    def reset_prefix_cache(self) -> None:
        """Forgets what every page holds; running sequences go on."""
        for cache in self.caches:
            cache.reset()

    def _take(self, sequence: Sequence, budget: _Budget, num_left: int = 0) -> int:
        """Returns how many tokens the budget less num_left allows; a lone token costs work items, a chunk does not."""
        take = min(sequence.num_to_compute, budget.tokens - num_left)
        if sequence.num_full_scores:
            take = min(take, budget.full_scores)
        if take == 1 and self._decode_items(sequence) > budget.decode_items:
            return 0
        return take

    def _decode_items(self, sequence: Sequence) -> int:
        return -(-(sequence.num_computed + 1) // self.config.split_size)

    def _grant(self, sequence: Sequence, take: int, budget: _Budget, takes: dict[Sequence, int]) -> None:
        budget.tokens -= take
        budget.full_scores -= min(take, sequence.num_full_scores)
        if take == 1:
            budget.decode_items -= self._decode_items(sequence)
        takes[sequence] = take

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes pages for positions [0, num_tokens) the sequence's own; changes nothing and returns False if some lack."""
        lacking = -(-num_tokens // self.config.page_size) - sequence.num_pages
        if lacking <= 0:
            return True
        if lacking > self.num_free_pages:
            return False
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pages.extend(pool.allocate(lacking))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes everything back; the sequence will be computed again from its tokens."""
        _leave(self._running, sequence)
        self._vacate(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        _enter(self._waiting, sequence)

    def _tell_pages(self, sequence: Sequence, take: int, updates: list[PageUpdate]) -> None:
        """Tells the device of the pages that this step begins to use: as many as a bucket has room for."""
        assert sequence.row is not None
        told, needed = sequence.num_pages_told, -(-(sequence.num_computed + take) // self.config.page_size)
        if needed <= told:
            return
        for group, pages in enumerate(sequence.pages):
            updates.extend(PageUpdate(group, sequence.row, index, pages[index]) for index in range(told, needed))
        sequence.num_pages_told = needed

    def _plan_sequence(self, sequence: Sequence, take: int) -> SequencePlan:
        assert sequence.row is not None
        start, stop = sequence.num_computed, sequence.num_computed + take
        samples = stop == sequence.num_known + sequence.num_in_flight
        sequence.num_computed = stop
        sequence.num_in_flight += samples
        sequence.is_new_to_row = False
        request, sampling = sequence.request, sequence.request.sampling
        num_generated = stop - sequence.num_prompt_tokens
        is_stop_forbidden = samples and num_generated < sampling.min_tokens
        wants_prompt = sampling.prompt_logprobs is not None and sequence.num_generated == 0
        scored = request.prompt_token_ids[start + 1 : stop + 1] if wants_prompt else ()
        return SequencePlan(
            request_id=sequence.request_id,
            row=sequence.row,
            start=start,
            num_tokens=take,
            token_ids=tuple(sequence.token_ids[start:stop]),
            samples=samples,
            num_logprobs=sampling.logprobs,
            is_processed=(sampling.logprobs_mode or self.config.logprobs_mode) == "processed",
            forbidden=tuple(sorted(request.stop_token_ids)) if is_stop_forbidden else (),
            num_prompt_tokens=sequence.num_prompt_tokens,
            has_constraint=samples and request.constraint is not None,
            num_prompt_logprobs=sampling.prompt_logprobs if scored else None,
            scored_token_ids=scored,
            pooling=request.pooling,
        )

    # --- commit -----------------------------------------------------------------------------------------------------

    def commit(self, result: StepResult) -> list[Committed]:
        """Adds a step's tokens to their sequences and ends those that are done; tokens of ended sequences are dropped."""
        committed = []
        for sequence in self._sampling_in.pop(result.step):
            request_id = sequence.request_id
            if self._sequences.get(request_id) is not sequence:
                continue  # ended meanwhile; the id may even belong to another request by now
            sequence.num_in_flight -= 1
            if sequence.request.pooling is not None:
                self.finish(request_id)
                committed.append(Committed(request_id, None, "stop"))
                continue
            token = result.tokens[request_id]
            if request_id in result.nonfinite:
                for cache, pages in zip(self.caches, sequence.pages, strict=False):
                    cache.evict(pages)  # what made the logits so may stand in them
                self.finish(request_id)
                committed.append(Committed(request_id, token, "error", is_nonfinite=True))
                continue
            sequence.token_ids.append(token.token_id)
            reason, stop_reason = self._finish_reason(sequence, token.token_id)
            if reason is not None:
                self.finish(request_id)
            committed.append(Committed(request_id, token, reason, stop_reason))
        return committed

    def _finish_reason(self, sequence: Sequence, token_id: int) -> tuple[str | None, int | None]:
        request = sequence.request
        if sequence.num_generated >= request.sampling.min_tokens and token_id in request.stop_token_ids:
            is_eos = token_id in request.eos_token_ids and not request.sampling.ignore_eos
            return "stop", None if is_eos else token_id
        if sequence.num_known >= sequence.max_total_len:
            return "length", None
        return None, None

    # --- the books --------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        return min(pool.num_free for pool in self.pools)

    def request_ids(self) -> Iterable[str]:
        return tuple(self._sequences)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, rows and sequences add up."""
        for group, pool in enumerate(self.pools):
            pool.check_integrity(page for s in self._running for page in s.pages[group])
        for cache in self.caches:
            cache.check_integrity()
        rows = sorted([*self._free_rows, *(s.row for s in self._running if s.row is not None)])
        if rows != list(range(self.config.max_num_seqs)):
            raise IntegrityError(f"rows are lost or held twice: {rows}")
        listed = sorted(s.request_id for s in [*self._running, *self._waiting])
        if listed != sorted(self._sequences):
            raise IntegrityError(f"sequences are lost or listed twice: {listed} against {sorted(self._sequences)}")


_order = attrgetter("order")


def _enter(line: list[Sequence], sequence: Sequence) -> None:
    insort(line, sequence, key=_order)


def _leave(line: list[Sequence], sequence: Sequence) -> None:
    del line[bisect_left(line, sequence.order, key=_order)]


def _admission(sequence: Sequence) -> Admission:
    """Returns what the runner has to know of a sequence that has taken a row."""
    assert sequence.row is not None
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
    return Admission(sequence.row, sequence.request_id, row_sampling, counted[:num_prompt], counted[num_prompt:])
