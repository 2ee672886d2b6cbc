"""What the engine asks of a model: a family bound to one configuration and one degree of tensor parallelism.

Everything traced runs per device, inside one `shard_map` over the mesh (ADR 0004): arrays are local shards and sums over devices
are explicit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax import lax

from jaxserve.models.attention import PagedCache
from jaxserve.models.linear import LinearContext
from jaxserve.models.weights import Parameter
from jaxserve.plan import KVSpec
from sharding.axes import TENSOR_AXES
from sharding.mesh import TensorParallelism

ServedParams = Any
"""A pytree of arrays in the family's served layout; only the family looks inside."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a traced model needs to know of where it runs; static."""

    linear: LinearContext
    parallel: TensorParallelism

    def sum_over_devices(self, x: jax.Array) -> jax.Array:
        """Returns the sum over the devices that share the model; x itself on one device."""
        return lax.psum(x, TENSOR_AXES) if self.parallel.size > 1 else x

    def device_index(self) -> jax.Array | int:
        """Returns this device's place among those that share the model."""
        return lax.axis_index(TENSOR_AXES) if self.parallel.size > 1 else 0


class Model(Protocol):
    """See the module docstring. `parallel` is fixed when the model is made."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Longest context the configuration allows [tokens]."""
        ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_heads(self) -> int:
        """Query heads over all devices."""
        ...

    @property
    def dtype(self) -> Any:
        """Of parameters and activations."""
        ...

    @property
    def is_float32_only(self) -> bool:
        """Whether the model's own arithmetic needs float32 parameters and pages (the toy's does)."""
        ...

    @property
    def reads_prompt_len(self) -> bool:
        """Whether keys depend on the prompt's length, so that only prompts of one length may share pages."""
        ...

    @property
    def trace_key(self) -> Any:
        """All that the traced methods depend on besides the class, so that compiled programs may be kept."""
        ...

    def parameters(self) -> tuple[Parameter, ...]:
        """Returns every tensor of the canonical tree."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """Returns what each layer keeps."""
        ...

    def served_layout(self, leaves: Mapping[str, jax.Array]) -> ServedParams:
        """Returns the canonical leaves {path: global array} as the step wants them: fused, permuted, padded. Jittable."""
        ...

    def served_specs(self) -> Any:
        """Returns a PartitionSpec for each array of `served_layout`, in the same tree."""
        ...

    def backbone(
        self, params: ServedParams, tokens_T: jax.Array, positions_T: jax.Array, cache: PagedCache, ctx: ModelContext
    ) -> jax.Array:
        """Returns hidden states [T, D], before the final norm; updates the cache's pages."""
        ...

    def final_norm(self, params: ServedParams, hidden_TD: jax.Array) -> jax.Array:
        """Returns what `logits` projects: the hidden states that embeddings are made of."""
        ...

    def logits(self, params: ServedParams, hidden_SD: jax.Array, ctx: ModelContext) -> jax.Array:
        """Returns this device's slice of the logits, float32 [S, padded V / devices]; padding is -inf."""
        ...
