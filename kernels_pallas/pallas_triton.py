"""The one module that imports Pallas: the Triton vocabulary that our kernels are written in.

Knows the spelling of Pallas-Triton that means the same on jax 0.10.2, 0.11.2 and 0.12 (explicit `CompilerParams`, whole
arrays in global memory, gathers by index arrays of the full tile), and silences its deprecation. Kernel bodies import from
here only, so that a move to Mosaic GPU or jax_triton touches one file and no arithmetic.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

program_id = pl.program_id

SILENCED_WARNINGS = ("The Pallas Triton backend is deprecated",)
"""2026-11-23: jax >= 0.11 warns at every lowering of a Triton kernel. It stays our portable kernel until the Mosaic one
covers sm_80 and sm_89 (DESIGN section 6). The only warning that the project silences; count and date any other here."""


def silence_deprecation() -> None:
    """Installs the filter; again and again, because pytest and `catch_warnings` take it away with their context."""
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)


def call(
    kernel: Callable[..., None],
    args: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int,
    interpret: bool,
    name: str,
    aliases: Mapping[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Runs a Triton kernel over whole arrays; `aliases` maps an argument to the output that overwrites it."""
    # Here and not at import: lowering, which warns, follows tracing in the same context.
    silence_deprecation()
    pallas_call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=dict(aliases or {}),
        interpret=interpret,
        name=name,
    )
    return pallas_call(*args)


def _tile_indices(indices: Sequence[jax.Array], shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    # Only gathers whose every index is an array of the full tile both run in interpret mode and compile to 16-byte cp.async.
    return tuple(jnp.broadcast_to(jnp.asarray(index, jnp.int32), shape) for index in indices)


def load_tile(ref, indices: Sequence[jax.Array], mask: jax.Array, other: float = 0) -> jax.Array:
    """Returns ref[indices] where `mask` (whose shape is the tile's), else `other`; masked elements are never read."""
    return pltriton.load(ref.at[_tile_indices(indices, mask.shape)], mask=mask, other=other)


def store_tile(ref, indices: Sequence[jax.Array], value: jax.Array, mask: jax.Array) -> None:
    """Writes ref[indices] = value where `mask`."""
    pltriton.store(ref.at[_tile_indices(indices, mask.shape)], value.astype(ref.dtype), mask=mask)


dot = functools.partial(pltriton.dot, allow_tf32=False)
"""Matrix product with float32 sums; float32 operands are not rounded to tf32."""
