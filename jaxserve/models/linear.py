"""The one matmul of every family, and the facts of the platform that its form depends on.

Quantised weights, LoRA and a deterministic tile will be further cases of `linear`, never of a model.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True, slots=True)
class LinearContext:
    """What `linear` needs to know of where it runs; static.

    Attributes:
        platform: "cpu" or "gpu".
    """

    platform: str


def linear(
    x: jax.Array, weight: jax.Array, ctx: LinearContext, *, transposed: bool = False, bias: jax.Array | None = None
) -> jax.Array:
    """Returns x @ weight + bias in x's dtype, summed in float32.

    Args:
        x: [T, in].
        weight: [in, out], or [out, in] when `transposed` (a tied embedding table).
        ctx: the platform.
        transposed: see `weight`.
        bias: [out], or None.
    """
    sums = linear_f32(x, weight, ctx, transposed=transposed)
    if bias is not None:
        sums = sums + bias.astype(jnp.float32)[None, :]
    return sums.astype(x.dtype)


def linear_f32(x: jax.Array, weight: jax.Array, ctx: LinearContext, *, transposed: bool = False) -> jax.Array:
    """Like `linear`, but returns the float32 sums, for logits."""
    del ctx  # one form serves both platforms so far
    # Without preferred_element_type XLA:CPU runs a bfloat16 dot 10-30 times slower than it needs to be; HIGHEST keeps a
    # GPU from cutting float32 to TF32 and changes nothing for bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, weight, dimensions, precision=precision, preferred_element_type=jnp.float32)
