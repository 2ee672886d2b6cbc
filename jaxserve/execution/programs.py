"""The programs of one engine, loaded or compiled from shapes alone: each with its ring of input buffers."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ResolvedConfig
from jaxserve.execution import row_state, step
from jaxserve.execution.batch import Field, PackedLayout, backbone_layout, unpack_step_inputs
from jaxserve.execution.buckets import BackboneBucket, Ladder
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.execution.program_cache import ProgramCache
from jaxserve.execution.row_state import RowState, abstract_row_state, row_state_specs
from jaxserve.execution.row_table import admission_layout, head_layout, unpack_admission, unpack_sampling_inputs
from jaxserve.execution.sampling import Sampled
from jaxserve.execution.scores import Scores
from jaxserve.execution.state import DeviceState, abstract_state, state_specs
from jaxserve.models.attention import AttentionContext
from jaxserve.models.linear import DETERMINISTIC_COMPILER_OPTIONS
from jaxserve.models.model import Model, ModelContext
from jaxserve.plan import kv_groups
from sharding.axes import TENSOR_AXES

HOST_BUFFERS = 3
"""A numpy argument that is changed after dispatch may be read changed.

A set is reused only after its step was waited for.
"""


Buffer = tuple[np.ndarray, dict[str, np.ndarray]]
"""Of one call of a program, and views of its parts."""


class Program:
    """One compiled program and its ring of input buffers."""

    def __init__(self, compiled: Any, layout: PackedLayout):
        self.run = compiled
        self._layout = layout
        self._ring: deque[Buffer] = deque()
        for _ in range(HOST_BUFFERS):
            self._ring.append(self.fresh_buffer())

    def fresh_buffer(self) -> Buffer:
        """Returns a buffer that nobody else uses: for a program that may run several times a step."""
        buffer = np.zeros(self._layout.size, np.int32)
        return buffer, self._layout.host_views(buffer)

    def next_buffer(self) -> Buffer:
        """Returns the buffer, and views of its parts, that was handed out longest ago: for a program that runs once a step."""
        self._ring.rotate(1)
        return self._ring[0]

    def fill(self, parts: dict[str, Any]) -> np.ndarray:
        """Returns a fresh buffer with these parts."""
        buffer, views = self.fresh_buffer()
        for name, value in parts.items():
            views[name][...] = value
        return buffer


def score_layout(num_tokens: int) -> PackedLayout:
    return PackedLayout({"places_C": Field((num_tokens,)), "token_ids_C": Field((num_tokens,))})


def pool_layout(num_tokens: int) -> PackedLayout:
    return PackedLayout({"rows_M": Field((num_tokens,))})


class ProgramFactory:
    """See the module docstring.

    Args:
        processors: in the order of config.logits_processors.
        cache: where compiled programs are kept; None keeps none.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        config: ResolvedConfig,
        mesh: Mesh,
        ctx: ModelContext,
        attention: AttentionContext,
        processors: Sequence[LogitsProcessor] = (),
        cache: ProgramCache | None = None,
    ):
        self._cache = cache or ProgramCache()
        self._model, self._config, self._mesh, self._ctx, self._attention = model, config, mesh, ctx, attention
        self._processors = tuple(processors)
        self._ladder = Ladder(config)
        self._num_groups = len(kv_groups(model.kv_specs()))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.state = abstract_state(model.kv_specs(), config, mesh)
        self.row_state = abstract_row_state(config, mesh)
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self._state_specs = state_specs(model.kv_specs())
        self._param_specs = model.served_specs()

    def _abstract(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.replicated)

    def _hidden(self, num_tokens: int) -> jax.ShapeDtypeStruct:
        return self._abstract((num_tokens, self._model.hidden_size), jnp.dtype(self._config.dtype))

    def _compile(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, arguments: Any, *, donates: tuple[int, ...] = ()
    ) -> Any:
        def compile_program() -> Any:
            sharded = jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            # The state is given back by donation; outputs keep the shardings of the specs, so that the next step takes them as
            # they are.
            shardings = jax.tree.map(
                lambda spec: NamedSharding(self._mesh, spec), out_specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
            )
            lowered = jax.jit(sharded, donate_argnums=donates, out_shardings=shardings).lower(*arguments)
            return lowered.compile(compiler_options=options)

        config = self._config
        options = DETERMINISTIC_COMPILER_OPTIONS[config.platform] if config.deterministic else None
        return self._cache.load_or_compile(compile_program, function, in_specs, out_specs, arguments, donates, options)

    def backbone(self, bucket: BackboneBucket) -> Program:
        layout = backbone_layout(self._ladder, bucket, self._num_groups)
        num_hidden = 0 if bucket.is_decode else self._config.max_num_batched_tokens
        run = functools.partial(
            step.backbone, model=self._model, ctx=self._ctx, attention=self._attention, num_hidden=num_hidden
        )

        def program(params: Any, state: DeviceState, buffer: jax.Array) -> tuple[DeviceState, jax.Array, jax.Array]:
            return run(params, state, unpack_step_inputs(layout, buffer))

        replicated = PartitionSpec()
        compiled = self._compile(
            program,
            (self._param_specs, self._state_specs, replicated),
            (self._state_specs, replicated, replicated),
            (self._params, self.state, self._abstract((layout.size,))),
            donates=(1,),
        )
        return Program(compiled, layout)

    def head(self, num_sequences: int) -> Program:
        config = self._config
        num_params = dict(config.logits_processors)
        layout = head_layout(num_sequences, num_params)
        run = functools.partial(
            step.head,
            model=self._model,
            ctx=self._ctx,
            max_logprobs=config.max_logprobs,
            processors=self._processors,
            has_all=num_sequences == self._ladder.full_head,
        )

        def program(params: Any, state: step.HeadState, hidden: Any, allowed: Any, buffer: Any) -> Any:
            rows_S, inputs = unpack_sampling_inputs(layout, buffer, num_params)
            return run(params, state, hidden, rows_S, allowed, inputs)

        replicated = PartitionSpec()
        state_specs = (replicated, row_state_specs())
        compiled = self._compile(
            program,
            (self._param_specs, state_specs, replicated, replicated, replicated),
            (state_specs, Sampled(replicated, _score_specs())),
            (
                self._params,
                (self.state.last_token_R, self.row_state),
                self._hidden(config.max_num_seqs),
                self._abstract((num_sequences, -(-config.vocab_size // 32)), jnp.uint32),
                self._abstract((layout.size,)),
            ),
            donates=(1,),
        )
        return Program(compiled, layout)

    def admit(self) -> Program:
        layout = admission_layout()

        def program(state: RowState, buffer: jax.Array) -> RowState:
            return row_state.admit(state, unpack_admission(layout, buffer))

        specs = row_state_specs()
        arguments = (self.row_state, self._abstract((layout.size,)))
        return Program(self._compile(program, (specs, PartitionSpec()), specs, arguments, donates=(0,)), layout)

    def score(self) -> Program:
        layout = score_layout(self._ladder.num_scored)
        run = functools.partial(step.score_tokens, model=self._model, ctx=self._ctx, max_logprobs=self._config.max_logprobs)

        def program(params: Any, hidden: jax.Array, buffer: jax.Array) -> Scores:
            return run(params, hidden, step.ScoreInputs(**layout.unpack(buffer)))

        replicated = PartitionSpec()
        compiled = self._compile(
            program,
            (self._param_specs, replicated, replicated),
            _score_specs(),
            (self._params, self._hidden(self._config.max_num_batched_tokens), self._abstract((layout.size,))),
        )
        return Program(compiled, layout)

    def pool(self) -> Program:
        config = self._config
        layout = pool_layout(config.max_num_batched_tokens)
        run = functools.partial(step.pool, model=self._model, ctx=self._ctx, num_rows=config.max_num_seqs)

        def program(params: Any, hidden: jax.Array, buffer: jax.Array) -> jax.Array:
            return run(params, hidden, layout.unpack(buffer)["rows_M"])

        replicated = PartitionSpec()
        compiled = self._compile(
            program,
            (self._param_specs, replicated, replicated),
            replicated,
            (self._params, self._hidden(config.max_num_batched_tokens), self._abstract((layout.size,))),
        )
        return Program(compiled, layout)


def _score_specs() -> Scores:
    """Everything is everywhere, but for the rows of the whole vocabulary's log-probabilities."""
    return Scores(*(PartitionSpec(),) * 6, all_SV=PartitionSpec(TENSOR_AXES))
