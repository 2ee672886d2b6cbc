"""Attention on this device against float64 numpy, and the write of keys and values to the bit: fresh random inputs, NaN in all
that must not be read or kept.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.report import Part, Row
from kernels_pallas import dispatch
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.kv_write.reference import kv_write_reference
from kernels_pallas.paged_attention.api import paged_attention
from kernels_pallas.paged_attention.cases import Case
from kernels_pallas.paged_attention.problems import (
    LONG_MIXES,
    MIXES,
    ROWS,
    Problem,
    attention_float64,
    error_in_roundings,
    name_of,
    problem_of,
    shipped_tiling,
    with_short_splits,
)
from kernels_pallas.paged_attention.tiling import Tiling

KV_WRITES = (("bfloat16", 8, 128, 64), ("float16", 3, 80, 16), ("float32", 4, 64, 128))
"""(dtype, KV heads, head dim, page size) of the pools that are written."""


def measure(report: Callable[[Part], None], *, seed: int, num_rows: int | None) -> None:
    """Reports how many cases there are, and a row for each that is wrong, by how much.

    Args:
        report: gets the part.
        seed: of the inputs.
        num_rows: of the cases of attention; None for all of them, in short and in long contexts.
    """
    rows = ROWS if num_rows is None else ROWS[:num_rows]
    all_mixes = {"": MIXES} if num_rows is not None else {"": MIXES, " long": LONG_MIXES}
    jobs: list[tuple[str, Callable[[], float]]] = []
    for suffix, mixes in all_mixes.items():
        for row in rows:
            jobs.append(
                (f"paged_attention {name_of(row)}{suffix}", lambda row=row, mixes=mixes: attention(row, mixes, seed))
            )
    jobs += [(f"kv_write {'-'.join(map(str, pool))}", lambda pool=pool: pages_written(pool, seed)) for pool in KV_WRITES]
    with concurrent.futures.ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as threads:
        found = list(threads.map(lambda job: _checked(*job), jobs))
    worst = max((row.figures["error / rounding"] for row in found if "error / rounding" in row.figures), default=0.0)
    failed = [row for row in found if row.failure]
    summary = Row(f"{len(found)} cases", {"worst error / rounding": worst, "wrong": len(failed)})
    report(Part("Numerics against the specification", [summary, *failed]))


def _checked(name: str, error_of: Callable[[], float]) -> Row:
    try:
        error = error_of()
    except Exception as exception:
        return Row(name, {}, f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}")
    if not math.isfinite(error):
        return Row(name, {}, "a number that is not finite, or pages of other bits than the specification's")
    return Row(name, {"error / rounding": error}, None if error <= 1 else f"{error:.3g} times what rounding explains")


def device_tiling(case: Case) -> Tiling:
    """Returns the tiles that ship for this device."""
    return shipped_tiling(case, dispatch.current_platform(), jax.devices()[0].device_kind)


def attention(row: dict[str, Any], mixes: dict[str, Any], seed: int) -> float:
    """Returns the error of one case, as a multiple of what rounding explains."""
    problem = problem_of(row, lambda case: with_short_splits(device_tiling(case), case), mixes, seed=seed)
    answer = attention_float64(problem)
    out_TNH = _attend(problem)
    rounds_weights = dispatch.current_platform() == "gpu"
    return error_in_roundings(problem, out_TNH, answer, rounds_weights=rounds_weights)


def _attend(problem: Problem) -> np.ndarray:
    case = problem.case

    @jax.jit
    def step(*arrays: Any) -> jax.Array:
        *operands, sinks_N = arrays
        return paged_attention(
            *operands,
            scale=case.scale,
            sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
            sinks_N=sinks_N,
            tiling=problem.tiling,
        )

    arrays = (problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP, problem.batch)
    run = step.lower(*arrays, problem.sinks_N).compile()
    _poison(problem.q_TNH.shape, problem.q_TNH.dtype)
    return np.asarray(run(*arrays, problem.sinks_N))


def _poison(shape: tuple[int, ...], dtype: Any) -> None:
    """Leaves NaN in memory that the next program of this size will probably be given: what it does not write shows."""
    for array in [jax.block_until_ready(jnp.full(shape, jnp.nan, dtype)) for _ in range(3)]:
        array.delete()


def pages_written(pool: tuple[str, int, int, int], seed: int) -> float:
    """Returns 0 where a pool is bitwise what the specification makes of it, else infinity."""
    dtype, num_heads, head_dim, page_size = pool
    draw = np.random.default_rng(seed)
    shape, num_tokens = (37, num_heads, page_size, head_dim), 4 * page_size
    k_pages, v_pages = (draw.standard_normal(shape).astype(jnp.dtype(dtype)) for _ in range(2))
    k, v = (draw.standard_normal((num_tokens, num_heads, head_dim)).astype(jnp.dtype(dtype)) for _ in range(2))
    slots = draw.permutation(37 * page_size)[:num_tokens].astype(np.int32)
    slots[::7] = 37 * page_size + 5  # padding
    expected = kv_write_reference(k_pages, v_pages, k, v, slots)
    write = jax.jit(lambda *arrays: kv_write(*arrays), donate_argnums=(0, 1))
    written = write(jnp.asarray(k_pages), jnp.asarray(v_pages), k, v, slots)
    same = all(np.asarray(w).tobytes() == e.tobytes() for w, e in zip(written, expected, strict=True))
    return 0.0 if same else float("inf")
