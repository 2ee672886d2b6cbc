"""Every implementation against float64 numpy, over every pair of what can vary, with NaN wherever nothing may be read."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention.api import Tiling, paged_attention
from kernels_pallas.paged_attention.cases import CASES, Case
from kernels_pallas.paged_attention.problems import (
    EVERYTHING,
    LONG_MIXES,
    MIXES,
    ROWS,
    Answer,
    Problem,
    attention_float64,
    error_in_roundings,
    make_problem,
    name_of,
    problem_of,
    shipped_tiling,
    with_short_splits,
)
from kernels_pallas.paged_attention.reference import paged_attention_reference

A_FEW_LONG = tuple(next(i for i, row in enumerate(ROWS) if row["mix"] == mix) for mix in ("long", "primes", "decodes"))
"""The rows whose long contexts are not left to the slow tests."""
BACKENDS = ("xla", "triton_interpret")

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs once: half of its time is LLVM's. The bits of optimised code are the subject of test_determinism."""


def run(problem: Problem, backend: str) -> np.ndarray:
    case = problem.case
    features = {"scale": case.scale, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}

    def step(q, k_pages, v_pages, tables, batch, sinks):
        if backend == "reference":
            return paged_attention_reference(q, k_pages, v_pages, tables, batch, **features, sinks_N=sinks)
        options = {**features, "sinks_N": sinks, "tiling": problem.tiling, "backend": backend}
        return paged_attention(q, k_pages, v_pages, tables, batch, **options)

    options = None if backend == "triton" else FAST_COMPILE
    arrays = (problem.q_TNH, problem.k_pages_GKZH, problem.v_pages_GKZH, problem.block_tables_RP)
    return np.asarray(jax.jit(step, compiler_options=options)(*arrays, problem.batch, problem.sinks_N))


def assert_agrees(problem: Problem, backend: str, answer: Answer | None = None) -> None:
    out_TNH = run(problem, backend)
    assert out_TNH.dtype == problem.q_TNH.dtype
    answer = attention_float64(problem) if answer is None else answer
    worst = error_in_roundings(problem, out_TNH, answer, rounds_weights="triton" in backend)
    assert worst <= 1, f"an error of {worst:.3g} times what rounding explains"


def small_tiling(case: Case, backend: str) -> Tiling:
    """Several splits and tiles in short contexts; few rows, because they interpret fast, and two blocks for a group of 16."""
    if backend == "xla":
        return Tiling(split_size=max(128, case.page_size), query_tile=16, decode_block=4)
    head_block = min(8, 1 << (case.group - 1).bit_length())
    return Tiling(split_size=max(128, case.page_size), query_tile=16 // head_block, head_block=head_block, kv_block=32)


def gpu_tiling(case: Case) -> Tiling:
    return with_short_splits(shipped_tiling(case, "gpu", jax.devices()[0].device_kind), case)


def test_every_pair_is_covered():
    for (a, values_a), (b, values_b) in itertools.combinations(EVERYTHING.items(), 2):
        assert {(row[a], row[b]) for row in ROWS} == set(itertools.product(values_a, values_b)), (a, b)


@functools.cache
def answer_of(index: int) -> Answer:
    return attention_float64(problem_of(ROWS[index], lambda _: Tiling()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=map(name_of, ROWS))
def test_agrees_with_float64(index, backend):
    assert_agrees(problem_of(ROWS[index], lambda case: small_tiling(case, backend)), backend, answer_of(index))


LONG = [
    pytest.param(row, id=name_of(row), marks=() if index in A_FEW_LONG else pytest.mark.slow)
    for index, row in enumerate(ROWS)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", LONG)
def test_agrees_with_float64_in_long_contexts(row, backend):
    assert_agrees(problem_of(row, lambda case: small_tiling(case, backend), LONG_MIXES), backend)


@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-9b-local", "gpt-oss-20b-local", "qwen2.5-7b"])
def test_specification_agrees_with_float64(name):
    (case,) = (case.shrunk(num_kv_heads=2, sliding_window=40) for case in CASES if case.name == name)
    assert_agrees(make_problem(case, "shuffled", MIXES["mixed"], Tiling()), "reference")


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for case, backends in (
            (Case("multi-query-71", 71, 1, 64, 256), BACKENDS),
            (Case("odd-head-dim", 6, 2, 21, 8, "float32", sliding_window=40), BACKENDS),
            (Case("wide-head", 2, 1, 512, 64, "float16"), ["xla"]),
        )
        for backend in backends
    ],
)
def test_unusual_shapes_agree_with_float64(case, backend):
    assert_agrees(make_problem(case, "shuffled", MIXES["mixed"], small_tiling(case, backend)), backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_queries_over_float32_pages_agree_with_float64(dtype):
    """What a CPU serves in 16 bits: its pages are float32 all the same."""
    case = Case("cpu", 4, 2, 64, 16, "float32")
    problem = make_problem(case, "shuffled", MIXES["mixed"], small_tiling(case, "xla"))
    problem.q_TNH = problem.q_TNH.astype(jnp.dtype(dtype))
    assert_agrees(problem, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("mixes", [MIXES, LONG_MIXES], ids=["short", "long"])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_triton_on_a_gpu_agrees_with_float64(row, mixes):
    """With the rows and warps that ship: xla#19780 was wrong results of 64 rows and 8 warps on an H100."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU; `test_gpu_compile` covers the compilation without one")
    assert_agrees(problem_of(row, gpu_tiling, mixes), "triton")
