"""The one matmul of every family, and the facts of the platform that its form depends on.

Weights are [out, in] everywhere, as an embedding table is. Quantised weights and LoRA will be further cases of `linear`,
never of a model.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SWAPPED_ROWS = 128
"""Most rows for which float32 on a CPU computes weight @ x.T instead of x @ weight.T: YNNPACK then packs the few rows of x, and
not the weight (768 -> 4096, 2 cores: 580 instead of 760 µs at 8 rows, 1.18 instead of 1.48 ms at 32; alike at 128, 5 % slower
at 512)."""

DETERMINISTIC_COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_platform_dependent_math": False}, "gpu": {}}
"""What XLA must be told when programs are compiled for a deterministic `LinearContext`. On a CPU: YNNPACK's consistent
arithmetic, in which a sum is one chain of fused multiply-adds instead of a number of lanes that depends on the rows."""

CHAIN_ELEMENTS = 1 << 15
"""Elements of x in one block of YNNPACK's loop over the inner dimension (128 KiB of float32): a sum is one chain as long as
inner size x rows, rounded up to a vector, stay below it, and blocks' sums are added up beyond. Measured, jax 0.10.2, AVX-512;
768 in: equal bits from 2 to 32 rows, others at 33 and at 64; 2,048 in: from 2 to 16; 512 in: whatever the rows."""

VECTOR_ROWS = 16
"""Rows of x in one vector: what YNNPACK rounds up to."""

MOST_BLOCK_ROWS = 64
"""Rows of x in the largest block; more rows are more blocks."""

MIN_DETERMINISTIC_ROWS = 8
"""A lone row takes a matrix-vector routine with another order. From 2 rows on the bits are equal; 8 cost 40 % less than 2 (768 ->
4096: 0.59 instead of 0.98 ms; the lone row 0.35)."""

MIN_BFLOAT16_ROWS = 2
"""A lone bfloat16 row runs at 1 GFLOP/s on a CPU (768 -> 4096: 4.4 instead of 0.4 ms), and in another order."""


@dataclass(frozen=True, slots=True)
class LinearContext:
    """What `linear` needs to know of where it runs; static.

    Attributes:
        platform: "cpu" or "gpu".
        is_deterministic: a row's bits do not depend on how many rows there are; needs DETERMINISTIC_COMPILER_OPTIONS.
    """

    platform: str
    is_deterministic: bool = False


def linear(x_TD: jax.Array, weight_FD: jax.Array, ctx: LinearContext, *, bias_F: jax.Array | None = None) -> jax.Array:
    """Returns x @ weight.T + bias, [T, F], in x's dtype, summed in float32."""
    sums_TF = linear_f32(x_TD, weight_FD, ctx)
    if bias_F is not None:
        sums_TF = sums_TF + bias_F.astype(jnp.float32)[None, :]
    return rounded(sums_TF, x_TD.dtype, ctx)


def rounded(x: jax.Array, dtype: Any, ctx: LinearContext) -> jax.Array:
    """Returns float32 x in a dtype.

    XLA drops a rounding to 16 bits where what reads it computes in float32 again, in one program and not in another (a norm's,
    before its scale: 0.006 in a log-probability). A deterministic context keeps it.
    """
    if ctx.is_deterministic and dtype != jnp.float32:
        x = lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return x.astype(dtype)


def added(a: jax.Array, b: jax.Array, ctx: LinearContext) -> jax.Array:
    """Returns a + b in their dtype, `rounded`."""
    return rounded(a.astype(jnp.float32) + b.astype(jnp.float32), a.dtype, ctx)


def linear_f32(x_TD: jax.Array, weight_FD: jax.Array, ctx: LinearContext) -> jax.Array:
    """Like `linear`, but returns the float32 sums, for logits."""
    T = x_TD.shape[0]
    if ctx.platform != "cpu":
        return _product(x_TD, weight_FD)
    if x_TD.dtype != jnp.float32:
        # 16-bit weights are always packed, by a layout that follows from the weight alone, and the layout fixes the order.
        return _product(_pad_rows(x_TD, MIN_BFLOAT16_ROWS), weight_FD)[:T]
    if ctx.is_deterministic:
        return _tiled(_pad_rows(x_TD, MIN_DETERMINISTIC_ROWS), weight_FD)[:T]
    return _swapped(x_TD, weight_FD) if T <= SWAPPED_ROWS else _product(x_TD, weight_FD)


def rows_per_product(inner_size: int) -> int | None:
    """Returns the most rows of a deterministic float32 product on a CPU; None if any number has the same bits."""
    if inner_size * MOST_BLOCK_ROWS <= CHAIN_ELEMENTS:
        return None
    return max(1, CHAIN_ELEMENTS // inner_size // VECTOR_ROWS) * VECTOR_ROWS


def _tiled(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """Returns the product in tiles of so many rows that each sum is one chain, or always the same blocks of it."""
    T, D = x_TD.shape
    rows = rows_per_product(D)
    if rows is None:
        return _swapped(x_TD, weight_FD)
    if rows >= T:
        is_one_chain = D * rows <= CHAIN_ELEMENTS
        return _swapped(x_TD if is_one_chain else _pad_rows(x_TD, rows), weight_FD)
    tiles_IUD = jnp.pad(x_TD, ((0, -T % rows), (0, 0))).reshape(-1, rows, D)
    # Transposed once, after the loop: inside, it cost a fifth of the time.
    sums_IFU = lax.optimization_barrier(lax.map(lambda tile_UD: _product(weight_FD, tile_UD), tiles_IUD))
    return sums_IFU.swapaxes(1, 2).reshape(-1, weight_FD.shape[0])[:T]


def _pad_rows(x_TD: jax.Array, num_rows: int) -> jax.Array:
    return jnp.pad(x_TD, ((0, max(0, num_rows - x_TD.shape[0])), (0, 0)))


def _swapped(x_TD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    # Without the barrier XLA would swap the operands back.
    return lax.optimization_barrier(_product(weight_FD, x_TD)).T


def _product(a_ID: jax.Array, b_JD: jax.Array) -> jax.Array:
    """Returns a @ b.T in float32."""
    # Without preferred_element_type XLA:CPU runs a bfloat16 dot 10-30 times slower than it needs to be; HIGHEST keeps a
    # GPU from cutting float32 to TF32 and changes nothing for bfloat16.
    precision = lax.Precision.HIGHEST if a_ID.dtype == jnp.float32 else None
    return lax.dot_general(a_ID, b_JD, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
