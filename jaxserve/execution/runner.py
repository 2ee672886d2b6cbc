"""Runs planned steps on the devices: owns parameters, state, compiled programs and host buffers.

Knows nothing of requests beyond a plan. `dispatch` returns at once, `wait` reads one step back; at most one step may be
in flight when the next is dispatched (100 un-awaited chained steps hung in the all-reduce of 8 CPU devices; one in
flight never did).
"""

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.execution.batch import pack_backbone
from jaxserve.execution.buckets import BackboneBucket, Ladder
from jaxserve.execution.programs import Buffer, Program, ProgramFactory
from jaxserve.execution.results import read_scores, sampled_tokens
from jaxserve.execution.row_table import RowTable, admission_parts
from jaxserve.execution.sampling import Sampled
from jaxserve.execution.scores import Scores
from jaxserve.execution.state import DeviceState, make_state
from jaxserve.outputs import TokenScores
from jaxserve.plan import PromptScores, SampledToken, SequencePlan, StepPlan, StepResult
from jaxserve.request import ALL_LOGPROBS

NO_CONSTRAINTS: Mapping[str, np.ndarray] = {}


@dataclass(slots=True)
class StepHandle:
    """A step in flight.

    Attributes:
        sampling: who gets a token.
        is_sampled: whether the head has been dispatched; False where it waits for the tokens before (`Runner.sample`).
        heads: who was sampled together, the tokens they ask for, and what the device says of them.
        scored: the scores of prompt tokens, in calls, and whose they are: (request, how many, num_logprobs) in order.
        pooled: sums of hidden states by row, and whose are complete: (request, row, positions).
    """

    step: int
    sampling: list[SequencePlan]
    hidden: jax.Array
    is_sampled: bool = False
    heads: list[tuple[list[SequencePlan], list[tuple[int, ...]], Sampled]] = field(default_factory=list)
    scored: list[Scores] = field(default_factory=list)
    scored_owners: list[SequencePlan] = field(default_factory=list)
    pooled: jax.Array | None = None
    pooling: list[SequencePlan] = field(default_factory=list)


class Runner:
    """See the module docstring. Not thread-safe: one thread owns it.

    Args:
        params: in the served layout.
        programs: of this engine, made for these parameters.
    """

    def __init__(self, config: ResolvedConfig, params: Any, programs: ProgramFactory):
        self.config = config
        self._params = params
        self._factory = programs
        self._ladder = Ladder(config)
        self._rows = RowTable(config)
        self._state = make_state(programs.state)
        self._row_state = make_state(programs.row_state)
        self._backbones: dict[BackboneBucket, Program] = {}
        self._heads: dict[int, Program] = {}
        self._allow_all: dict[int, jax.Array] = {}
        self._admit: Program
        self._score: Program
        self._pool: Program
        self._pooled: dict[int, np.ndarray] = {}  # by row: sums over the chunks of a prompt that is not complete
        self._next_step = 0

    # --- before the first step --------------------------------------------------------------------------------------

    def warmup(self, progress: Callable[[int, int], None] = lambda done, total: None, num_threads: int = 2) -> None:
        """Compiles the whole ladder, smallest first, and runs every program once.

        Args:
            progress: called with (programs done, programs in total).
            num_threads: compilations at a time; XLA releases the GIL.
        """
        factory, ladder = self._factory, self._ladder
        jobs: list[Callable[[], Program]] = [factory.admit, factory.pool]
        jobs += [lambda bucket=bucket: factory.backbone(bucket) for bucket in ladder.backbones()]
        jobs += [lambda size=size: factory.head(size) for size in ladder.heads()]
        jobs += [factory.score]
        progress(0, len(jobs))
        pool = ThreadPoolExecutor(num_threads)
        programs = []
        try:
            for program in pool.map(lambda job: job(), jobs):
                programs.append(program)
                progress(len(programs), len(jobs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing more is begun
        self._admit, self._pool, *ladder_programs, self._score = programs
        self._backbones = dict(zip(ladder.backbones(), ladder_programs, strict=False))
        self._heads = dict(zip(ladder.heads(), ladder_programs[len(self._backbones) :], strict=True))
        for size in self._heads:
            words = np.full((size, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
            self._allow_all[size] = jax.device_put(words, factory.replicated)
        self._run_each_once()

    def _run_each_once(self) -> None:
        """Runs every program on padding, so that nothing is set up lazily after ready."""
        hidden = every = None
        for bucket, program in self._backbones.items():
            buffer, views = program.next_buffer()
            pack_backbone(StepPlan(-1, (), (), ()), bucket, self._ladder, views)
            self._state, hidden, rest = program.run(self._params, self._state, buffer)
            every = every if bucket.is_decode else rest
        for size, program in self._heads.items():
            jax.block_until_ready(self._run_head(size, program.next_buffer(), [], hidden, NO_CONSTRAINTS))
        no_row = {"row_1": self.config.max_num_seqs, "prompt_ids_C": self.config.vocab_size}
        self._row_state = self._admit.run(
            self._row_state, self._admit.fill(no_row | {"output_ids_C": self.config.vocab_size})
        )
        jax.block_until_ready(self._score.run(self._params, every, self._score.fill({})))
        jax.block_until_ready(self._pool.run(self._params, every, self._pool.fill({"rows_M": self.config.max_num_seqs})))

    # --- steps ------------------------------------------------------------------------------------------------------

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Starts a step and returns without waiting for it; where a sequence is constrained, `sample` has to follow.

        Raises:
            ValueError: the plan is not the next one.
        """
        if plan.step != self._next_step:
            raise ValueError(f"step must be {self._next_step}, got {plan.step}: plans run in order, each once")
        self._next_step += 1
        for admission in plan.admissions:
            self._rows.admit(admission)
            for parts in admission_parts(admission, self.config.vocab_size):
                self._row_state = self._admit.run(self._row_state, self._admit.fill(parts))
        reads_hidden = any(s.scored_token_ids or s.pooling for s in plan.sequences)
        num_tokens = plan.num_tokens
        is_decode = num_tokens == len(plan.sequences) and not reads_hidden
        bucket = self._ladder.backbone_for(num_tokens, is_decode)
        program = self._backbones[bucket]
        buffer, views = program.next_buffer()
        sampling = pack_backbone(plan, bucket, self._ladder, views)
        self._state, hidden, every_hidden = program.run(self._params, self._state, buffer)
        handle = StepHandle(plan.step, sampling, hidden)
        if reads_hidden:
            self._read_hidden(plan, every_hidden, handle)
        if not any(s.has_constraint for s in sampling):
            self.sample(handle, NO_CONSTRAINTS)
        return handle

    def sample(self, handle: StepHandle, allowed: Mapping[str, np.ndarray]) -> None:
        """Samples a dispatched step's tokens.

        Args:
            handle: of a step whose head has not been dispatched.
            allowed: mask words [ceil(V / 32)] of the constrained sequences, by request.
        """
        assert not handle.is_sampled, "a step is sampled once"
        handle.is_sampled = True
        wants_all = [s for s in handle.sampling if s.num_logprobs == ALL_LOGPROBS]
        others = [s for s in handle.sampling if s.num_logprobs != ALL_LOGPROBS] if wants_all else handle.sampling
        full = self._ladder.full_head
        groups = [(self._ladder.head_for(len(others)), others)] if others else []
        groups += [(full, wants_all[i : i + full]) for i in range(0, len(wants_all), full)]
        for index, (size, group) in enumerate(groups):
            program = self._heads[size]
            buffer = program.fresh_buffer() if index else program.next_buffer()
            picked = [self._rows.picked_ids(s.row) for s in group]
            handle.heads.append((group, picked, self._run_head(size, buffer, group, handle.hidden, allowed)))

    def _run_head(
        self, size: int, filled: Buffer, group: list[SequencePlan], hidden: Any, allowed: Mapping[str, np.ndarray]
    ) -> Sampled:
        buffer, views = filled
        mask = self._rows.pack_allowed(group, size, allowed)
        words, masked = (self._allow_all[size], ()) if mask is None else mask
        self._rows.pack_head(group, views, masked)
        state = self._state
        (last_token, self._row_state), sampled = self._heads[size].run(
            self._params, (state.last_token_R, self._row_state), hidden, words, buffer
        )
        self._state = DeviceState(state.k_pages, state.v_pages, state.block_tables, last_token)
        return sampled

    def _read_hidden(self, plan: StepPlan, hidden: jax.Array, handle: StepHandle) -> None:
        """Scores prompt tokens, a bounded number a call, and sums hidden states for embeddings."""
        scored: list[tuple[SequencePlan, int]] = []
        rows = np.full(self.config.max_num_batched_tokens, self.config.max_num_seqs, np.int32)
        first = 0
        for s in plan.sequences:
            if s.scored_token_ids:
                scored.append((s, first))
            if s.pooling:
                end = first + s.num_tokens
                rows[first if s.pooling == "mean" else end - s.samples : end] = s.row
                handle.pooling.append(s)
            first += s.num_tokens
        self._dispatch_scores(scored, hidden, handle)
        if handle.pooling:
            handle.pooled = self._pool.run(self._params, hidden, self._pool.fill({"rows_M": rows}))

    def _dispatch_scores(self, scored: list[tuple[SequencePlan, int]], hidden: jax.Array, handle: StepHandle) -> None:
        """Scores the tokens of these sequences, whose hidden states begin at these places.

        Whole vocabularies go first and together, and nobody else's is kept: a call's are as large as its logits, and a step
        may have many calls.
        """
        scored.sort(key=lambda item: item[0].num_prompt_logprobs != ALL_LOGPROBS)
        handle.scored_owners = [s for s, _ in scored]
        places = [place for s, first in scored for place in range(first, first + len(s.scored_token_ids))]
        token_ids = [token_id for s, _ in scored for token_id in s.scored_token_ids]
        num_whole = sum(len(s.scored_token_ids) for s, _ in scored if s.num_prompt_logprobs == ALL_LOGPROBS)
        size = self._ladder.num_scored
        for start in range(0, len(places), size):
            padding = [0] * (start + size - len(places))
            parts = {
                "places_C": [*places[start : start + size], *padding],
                "token_ids_C": [*token_ids[start : start + size], *padding],
            }
            scores = self._score.run(self._params, hidden, self._score.fill(parts))
            handle.scored.append(scores if start < num_whole else dataclasses.replace(scores, all_SV=None))

    def wait(self, handle: StepHandle) -> StepResult:
        """Waits for a step and returns what it made."""
        assert handle.is_sampled, "a step is sampled before it is waited for"
        tokens: dict[str, SampledToken] = {}
        nonfinite: set[str] = set()
        if not handle.heads:
            jax.block_until_ready(handle.hidden)
        for group, picked, sampled in handle.heads:
            for s, token in zip(group, sampled_tokens(sampled, group, picked), strict=True):
                tokens[s.request_id] = token
                if token.token_id < 0:
                    nonfinite.add(s.request_id)
        return StepResult(handle.step, tokens, frozenset(nonfinite), self._prompt_scores(handle), self._pool_results(handle))

    def _prompt_scores(self, handle: StepHandle) -> dict[str, PromptScores]:
        """Returns the scores of each prompt's tokens in this step."""
        if not handle.scored_owners:
            return {}
        owners = [s for s in handle.scored_owners for _ in s.scored_token_ids]
        results: dict[str, list[TokenScores]] = {s.request_id: [] for s in handle.scored_owners}
        size = self._ladder.num_scored
        for index, scores in enumerate(handle.scored):
            group = owners[index * size : (index + 1) * size]
            wanted = [s.num_prompt_logprobs for s in group]
            for s, token in zip(group, read_scores(scores, wanted, [()] * len(group)), strict=True):
                assert token is not None
                results[s.request_id].append(token)
        return {s.request_id: PromptScores(s.start, tuple(results[s.request_id])) for s in handle.scored_owners}

    def _pool_results(self, handle: StepHandle) -> dict[str, np.ndarray]:
        """Adds a step's sums to those of the chunks before; returns the embeddings of prompts that are complete."""
        complete = {}
        sums_RD = None if handle.pooled is None else np.asarray(handle.pooled)
        for s in handle.pooling:
            assert sums_RD is not None
            before = 0.0 if s.start == 0 or s.pooling == "last" else self._pooled[s.row]
            self._pooled[s.row] = total = sums_RD[s.row].astype(np.float64) + before
            if s.samples:
                num_positions = s.num_prompt_tokens if s.pooling == "mean" else 1
                complete[s.request_id] = (total / num_positions).astype(np.float32)
        return complete

    def resident(self) -> tuple[Any, DeviceState]:
        """Returns all that stays on the devices: parameters and state. To be looked at, never kept."""
        return self._params, self._state
