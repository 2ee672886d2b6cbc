"""Runs planned steps on the devices: owns parameters, state, compiled programs and host buffers.

Knows nothing of requests beyond a plan. `dispatch` returns at once, `wait` reads one step back; at most one step may be
in flight when the next is dispatched (100 un-awaited chained steps hung in the all-reduce of 8 CPU devices; one in
flight never did).
"""

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ResolvedConfig
from jaxserve.execution import step
from jaxserve.execution.batch import (
    PackedLayout,
    RowTable,
    backbone_layout,
    head_layout,
    pack_allowed,
    pack_backbone,
    unpack_sampling_inputs,
    unpack_step_inputs,
)
from jaxserve.execution.buckets import BackboneBucket, Ladder
from jaxserve.execution.sampling import Sampled
from jaxserve.execution.state import DeviceState, abstract_state, make_state, state_specs
from jaxserve.models.attention import AttentionContext
from jaxserve.models.linear import DETERMINISTIC_COMPILER_OPTIONS
from jaxserve.models.model import Model, ModelContext
from jaxserve.plan import SampledToken, SequencePlan, StepPlan, StepResult, kv_groups

HOST_BUFFERS = 3
"""A numpy argument that is changed after dispatch may be read changed.

A set is reused only after its step was waited for.
"""


@dataclass(slots=True)
class StepHandle:
    """A step in flight."""

    step: int
    sampling: list[SequencePlan]
    hidden: jax.Array
    sampled: Sampled | None


class _Program:
    """One compiled program and its ring of input buffers."""

    def __init__(self, compiled: Any, layout: PackedLayout):
        self.run = compiled
        buffers = (np.zeros(layout.size, np.int32) for _ in range(HOST_BUFFERS))
        self._ring = deque((buffer, layout.host_views(buffer)) for buffer in buffers)

    def next_buffer(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        self._ring.rotate(1)
        return self._ring[0]


class Runner:
    """See the module docstring. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Model,
        params: Any,
        config: ResolvedConfig,
        mesh: Mesh,
        ctx: ModelContext,
        attention: AttentionContext,
    ):
        self.config = config
        self._params = params
        self._programs = ProgramFactory(model, params, config, mesh, ctx, attention)
        self._ladder = Ladder(config)
        self._rows = RowTable(config.max_num_seqs)
        self._state = make_state(self._programs.state)
        self._backbones: dict[BackboneBucket, _Program] = {}
        self._heads: dict[int, _Program] = {}
        self._allow_all: dict[int, jax.Array] = {}
        self._next_step = 0

    def warmup(self, progress: Callable[[int, int], None] = lambda done, total: None, num_threads: int = 2) -> None:
        """Compiles the whole ladder, smallest first, and runs every program once.

        Args:
            progress: called with (programs done, programs in total).
            num_threads: compilations at a time; XLA releases the GIL.
        """
        backbones, heads = self._ladder.backbones(), self._ladder.heads()
        total, done = len(backbones) + len(heads), 0
        progress(done, total)
        pool = ThreadPoolExecutor(num_threads)
        try:
            compile_backbones = pool.map(self._programs.backbone, backbones)
            compile_heads = pool.map(self._programs.head, heads)
            for bucket, program in zip(backbones, compile_backbones, strict=True):
                self._backbones[bucket] = program
                progress(done := done + 1, total)
            for size, program in zip(heads, compile_heads, strict=True):
                self._heads[size] = program
                words = np.full((size, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
                self._allow_all[size] = jax.device_put(words, self._programs.replicated)
                progress(done := done + 1, total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing more is begun
        self._run_each_once()

    def _run_each_once(self) -> None:
        """Runs every program on padding, so that nothing is set up lazily after ready."""
        hidden = None
        for bucket, program in self._backbones.items():
            buffer, views = program.next_buffer()
            pack_backbone(StepPlan(-1, (), (), ()), bucket, self._ladder, views)
            self._state, hidden = program.run(self._params, self._state, buffer)
        for size in self._heads:
            jax.block_until_ready(self._run_head(size, [], hidden))

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Starts a step and returns without waiting for it.

        Raises:
            ValueError: the plan is not the next one.
        """
        if plan.step != self._next_step:
            raise ValueError(f"step must be {self._next_step}, got {plan.step}: plans run in order, each once")
        self._next_step += 1
        for admission in plan.admissions:
            self._rows.admit(admission.row, admission.sampling)
        is_decode = all(s.num_tokens == 1 for s in plan.sequences)
        bucket = self._ladder.backbone_for(plan.num_tokens, is_decode)
        program = self._backbones[bucket]
        buffer, views = program.next_buffer()
        sampling = pack_backbone(plan, bucket, self._ladder, views)
        self._state, hidden = program.run(self._params, self._state, buffer)
        sampled = self._run_head(self._ladder.head_for(len(sampling)), sampling, hidden) if sampling else None
        return StepHandle(plan.step, sampling, hidden, sampled)

    def _run_head(self, size: int, sampling: list[SequencePlan], hidden: Any) -> Sampled:
        program = self._heads[size]
        buffer, views = program.next_buffer()
        self._rows.pack_head(sampling, views, padding_row=self.config.max_num_seqs)
        allowed = pack_allowed(sampling, size, self.config.vocab_size)
        state = self._state
        last_token, sampled = program.run(
            self._params, state.last_token_R, hidden, self._allow_all[size] if allowed is None else allowed, buffer
        )
        self._state = DeviceState(state.k_pages, state.v_pages, state.block_tables, last_token)
        return sampled

    def wait(self, handle: StepHandle) -> StepResult:
        """Waits for a step and returns its tokens."""
        if handle.sampled is None:
            jax.block_until_ready(handle.hidden)
            return StepResult(handle.step, {})
        tokens = np.asarray(handle.sampled.tokens_S).tolist()
        details = self._details(handle) if any(s.num_logprobs >= 0 for s in handle.sampling) else None
        result: dict[str, SampledToken] = {}
        nonfinite = set()
        for index, s in enumerate(handle.sampling):
            if tokens[index] < 0:
                nonfinite.add(s.request_id)
            if details is None or s.num_logprobs < 0:
                result[s.request_id] = SampledToken(tokens[index])
            else:
                result[s.request_id] = _with_logprobs(details, tokens[index], index, s.num_logprobs)
        return StepResult(handle.step, result, frozenset(nonfinite))

    def _details(self, handle: StepHandle) -> tuple[np.ndarray, ...]:
        s = handle.sampled
        assert s is not None
        return tuple(np.asarray(x) for x in (s.logprobs_S, s.ranks_S, s.top_ids_SQ, s.top_logprobs_SQ))

    def resident(self) -> tuple[Any, DeviceState]:
        """Returns all that stays on the devices: parameters and state. To be looked at, never kept."""
        return self._params, self._state


def _with_logprobs(details: tuple[np.ndarray, ...], token: int, index: int, num_logprobs: int) -> SampledToken:
    """Returns one row's token with its log-probabilities as plain numbers."""
    logprobs, ranks, top_ids, top_logprobs = (x[index] for x in details)
    top = zip(top_ids[:num_logprobs].tolist(), top_logprobs[:num_logprobs].tolist(), strict=True)
    return SampledToken(token, float(logprobs), int(ranks), tuple(top))


class ProgramFactory:
    """Lowers and compiles the programs of one engine, each from shapes alone."""

    def __init__(
        self,
        model: Model,
        params: Any,
        config: ResolvedConfig,
        mesh: Mesh,
        ctx: ModelContext,
        attention: AttentionContext,
    ):
        self._model, self._config, self._mesh, self._ctx, self._attention = model, config, mesh, ctx, attention
        self._ladder = Ladder(config)
        self._num_groups = len(kv_groups(model.kv_specs()))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.state = abstract_state(model.kv_specs(), config, mesh)
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self._state_specs = state_specs(model.kv_specs())
        self._param_specs = model.served_specs()

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def _compile(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, arguments: Any) -> Any:
        sharded = jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        # The state is given back by donation; outputs keep the shardings of the specs, so the next step takes them as they are.
        shardings = jax.tree.map(
            lambda spec: NamedSharding(self._mesh, spec), out_specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )
        lowered = jax.jit(sharded, donate_argnums=(1,), out_shardings=shardings).lower(*arguments)
        options = DETERMINISTIC_COMPILER_OPTIONS[self._config.platform] if self._config.deterministic else None
        return lowered.compile(compiler_options=options)

    def backbone(self, bucket: BackboneBucket) -> _Program:
        layout = backbone_layout(self._ladder, bucket, self._num_groups)
        run = functools.partial(step.backbone, model=self._model, ctx=self._ctx, attention=self._attention)

        def program(params: Any, state: DeviceState, buffer: jax.Array) -> tuple[DeviceState, jax.Array]:
            return run(params, state, unpack_step_inputs(layout, buffer))

        replicated = PartitionSpec()
        compiled = self._compile(
            program,
            (self._param_specs, self._state_specs, replicated),
            (self._state_specs, replicated),
            (self._params, self.state, self._abstract((layout.size,), jnp.int32)),
        )
        return _Program(compiled, layout)

    def head(self, num_sequences: int) -> _Program:
        layout = head_layout(num_sequences)
        config = self._config
        run = functools.partial(step.head, model=self._model, ctx=self._ctx, max_logprobs=config.max_logprobs)

        def program(params: Any, last_token: Any, hidden: Any, allowed: Any, buffer: Any) -> tuple[jax.Array, Sampled]:
            rows_S, sampling = unpack_sampling_inputs(layout, buffer)
            return run(params, last_token, hidden, rows_S, allowed, sampling)

        replicated = PartitionSpec()
        words = -(-config.vocab_size // 32)
        compiled = self._compile(
            program,
            (self._param_specs, replicated, replicated, replicated, replicated),
            (replicated, Sampled(*(replicated,) * 5)),
            (
                self._params,
                self.state.last_token_R,
                self._abstract((config.max_num_seqs, self._model.hidden_size), jnp.dtype(config.dtype)),
                self._abstract((num_sequences, words), jnp.uint32),
                self._abstract((layout.size,), jnp.int32),
            ),
        )
        return _Program(compiled, layout)
