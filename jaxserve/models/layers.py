"""Layers that families share: norm, activations, embedding and unembedding over a sharded vocabulary.

Flax NNX modules hold parameters in the served layout; their metadata names logical axes. Called per device, on local shards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import linear_f32
from jaxserve.models.model import ModelContext
from kernels_pallas import dispatch


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

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(self.scale.get_value(), range(x.ndim - 1))
        if self.offset:
            return (y * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * scale


def embed(table: jax.Array, tokens_T: jax.Array, ctx: ModelContext, *, is_wide: bool = False) -> jax.Array:
    """Returns rows of a table whose vocabulary is cut over the devices: each looks up its own, the sum has all.

    Args:
        table: [V, D], or [D, V] where it `is_wide` (see `serves_wide_table`).
        tokens_T: ids.
        ctx: the devices.
        is_wide: see `table`.
    """

    def rows(ids_T: jax.Array) -> jax.Array:
        return table[:, ids_T].T if is_wide else table[ids_T]

    if ctx.parallel.size == 1:
        return rows(tokens_T)
    height = table.shape[1 if is_wide else 0]
    local = tokens_T - ctx.device_index() * height
    is_mine = (local >= 0) & (local < height)
    rows_TD = jnp.where(is_mine[:, None], rows(jnp.where(is_mine, local, 0)), jnp.zeros((), table.dtype))
    return ctx.sum_over_devices(rows_TD)


def serves_wide_table(*, is_tied: bool) -> bool:
    """Returns whether the embedding table is served as [D, V], as the head reads it.

    On a CPU a dot over [V, D] takes 15 to 35 % longer than over [D, V] up to 32 rows, once a step over the largest matrix there
    is; looking tokens up in columns costs 0.4 ms for 512 of them (256 wide).
    """
    return is_tied and dispatch.current_platform() == "cpu"


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def unembed(
    weight: jax.Array,
    hidden_SD: jax.Array,
    vocab_size: int,
    ctx: ModelContext,
    *,
    transposed: bool,
    soft_cap: float | None = None,
) -> jax.Array:
    """Returns this device's logits in float32; columns past the vocabulary, which pad it to divide, are -inf."""
    logits = soft_capped(linear_f32(hidden_SD, weight, ctx.linear, transposed=transposed), soft_cap)
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
