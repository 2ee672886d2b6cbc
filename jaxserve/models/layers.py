"""Layers that families share: norm, activations, embedding and unembedding over a sharded vocabulary.

Flax NNX modules hold parameters in the served layout; their metadata names logical axes. Called per device, on local shards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import linear_f32, rounded
from jaxserve.models.model import ModelContext
from jaxserve.models.sums import in_vectors, row_sums


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any) -> nnx.Param:
    """Returns an NNX parameter that declares its logical axes; its value is only ever abstract here."""
    return nnx.Param(jnp.zeros(shape, dtype), logical_axes=axes)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""Of a gate, by the name that a `DecoderConfig` gives it."""


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32 inside. Source: Zhang and Sennrich 2019.

    An offset other than 0 is Gemma's, and so is its order: scaled in float32, then rounded. The others round first.
    """

    def __init__(self, size: int, epsilon: float, dtype: Any, offset: float = 0.0):
        self.scale = parameter((size,), (None,), dtype)
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: jax.Array, ctx: ModelContext) -> jax.Array:
        y = x.astype(jnp.float32)
        if ctx.linear.is_deterministic:
            y = y * in_vectors(lambda sums: jax.lax.rsqrt(sums / x.shape[-1] + self.epsilon), row_sums(y * y))[..., None]
        else:
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale.get_value(), range(x.ndim - 1))
        if self.offset:
            return rounded(y * (self.offset + scale.astype(jnp.float32)), x.dtype, ctx.linear)
        y = rounded(y, x.dtype, ctx.linear).astype(jnp.float32)
        return rounded(y * scale.astype(jnp.float32), x.dtype, ctx.linear)


def embed(table_VD: jax.Array, tokens_T: jax.Array, ctx: ModelContext) -> jax.Array:
    """Returns rows of a table whose vocabulary is cut over the devices: each looks up its own, the sum has all."""
    if ctx.parallel.size == 1:
        return table_VD[tokens_T]
    local = tokens_T - ctx.device_index() * table_VD.shape[0]
    is_mine = (local >= 0) & (local < table_VD.shape[0])
    rows_TD = jnp.where(is_mine[:, None], table_VD[jnp.where(is_mine, local, 0)], jnp.zeros((), table_VD.dtype))
    return ctx.sum_over_devices(rows_TD)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def unembed(
    weight_VD: jax.Array,
    hidden_SD: jax.Array,
    vocab_size: int,
    ctx: ModelContext,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """Returns this device's logits in float32; columns past the vocabulary, which pad it to divide, are -inf."""
    logits = soft_capped(linear_f32(hidden_SD, weight_VD, ctx.linear), soft_cap)
    width = logits.shape[-1]
    if width * ctx.parallel.size == vocab_size:
        return logits
    columns = jnp.arange(width) + ctx.device_index() * width
    return jnp.where((columns < vocab_size)[None, :], logits, -jnp.inf)


def padded_vocab(vocab_size: int, devices: int) -> int:
    """Returns the vocabulary rounded up so that it divides among the devices."""
    return -(-vocab_size // devices) * devices


def pad_rows(table: jax.Array, rows: int) -> jax.Array:
    """Returns the table with zero rows appended up to `rows`."""
    return jnp.pad(table, ((0, rows - table.shape[0]),) + ((0, 0),) * (table.ndim - 1))
