"""What the kernels become on GPUs that this machine does not have; and that the gates can fail (ADR 0007)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import gpu_compile
from kernels_pallas.kv_write.api import kv_write
from kernels_pallas.paged_attention.api import default_tiling, empty_ragged_batch, paged_attention
from kernels_pallas.paged_attention.cases import CASES, FACTORS, Case, case_of, pairwise

LLAMA = CASES[0]
TILING = default_tiling(
    "gpu",
    num_q_heads=LLAMA.num_q_heads,
    num_kv_heads=LLAMA.num_kv_heads,
    head_dim=LLAMA.head_dim,
    page_size=LLAMA.page_size,
)
NUM_PAGES, NUM_ROWS, TABLE_WIDTH = 4096, 256, 512
DECODE = {"num_tokens": 64, "num_decode_slots": 64, "max_decode_items": 512, "max_prefill_tiles": 0}
MIXED = {"num_tokens": 2048, "num_decode_slots": 64, "max_decode_items": 512, "max_prefill_tiles": 256}


@functools.cache
def target(name: str) -> gpu_compile.Target:
    return gpu_compile.Target(name)  # raises, and so fails, where the plugin is missing


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def batch_of(bucket):
    sizes = {key: value for key, value in bucket.items() if key != "num_tokens"}
    batch = empty_ragged_batch(num_seq_slots=NUM_ROWS, **sizes)
    return jax.tree.map(lambda array: shape(*array.shape), batch)


def attention_args(bucket, case=LLAMA):
    dtype = jnp.dtype(case.dtype)
    pages = shape(NUM_PAGES, case.num_kv_heads, case.page_size, case.head_dim, dtype=dtype)
    q = shape(bucket["num_tokens"], case.num_q_heads, case.head_dim, dtype=dtype)
    sinks = shape(case.num_q_heads, dtype=jnp.float32) if case.has_sinks else None
    return q, pages, pages, shape(NUM_ROWS, TABLE_WIDTH), batch_of(bucket), sinks


def attention(q, k_pages, v_pages, tables, batch, sinks, *, case=LLAMA, tiling=TILING, backend="triton"):
    return paged_attention(
        q,
        k_pages,
        v_pages,
        tables,
        batch,
        scale=case.scale,
        sliding_window=case.sliding_window,
        soft_cap=case.soft_cap,
        sinks_N=sinks,
        tiling=tiling,
        backend=backend,
    )


def partial_bytes(bucket, case=LLAMA):
    """Float32 accumulator, maximum and sum of every item and head."""
    return bucket["max_decode_items"] * case.num_q_heads * (case.head_dim + 2) * 4


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_llama_attention_has_no_spills_and_is_one_cuda_graph(bucket):
    compiled, kernels = gpu_compile.list_kernels(target("h200"), attention, attention_args(bucket))
    names = [kernel.name for kernel in kernels]
    expected = ["decode", "combine"] + (["prefill"] if bucket is MIXED else [])
    assert sorted(name for name in names if "attention" in name) == sorted(f"paged_attention_{n}" for n in expected)
    assert all(kernel.is_captured for kernel in kernels)
    found = gpu_compile.report(compiled)
    assert not found.copied_shapes
    assert found.temporary_bytes <= partial_bytes(bucket) + 4096
    # 228 KB of shared memory a multiprocessor of an H200: at least four decode programs at once keep 128 KB in flight.
    (decode,) = [kernel for kernel in kernels if kernel.name == "paged_attention_decode"]
    assert decode.shared_memory_bytes * 4 <= 228 * 1024


DEVICES = ("h200", "a100", "l4")
COMPILED = pairwise({**FACTORS, "device": DEVICES})


def compile_with_default_tiles(case, device):
    """Compiles a mixed step with what a server would take on that GPU; raises where a kernel does not fit."""
    tiling = default_tiling(
        "gpu",
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype_bytes=jnp.dtype(case.dtype).itemsize,
        device_kind=target(device).topology.devices[0].device_kind,
    )
    step = functools.partial(attention, case=case, tiling=tiling)
    return gpu_compile.report(target(device).compile(step, attention_args(MIXED, case)))


def name_of(row):
    return "-".join(map(str, row.values()))


def every(rows, keep):
    """Returns parameters of which those not kept are slow."""
    return [pytest.param(row, id=name_of(row), marks=() if keep(i) else pytest.mark.slow) for i, row in enumerate(rows)]


@pytest.mark.parametrize("row", every(COMPILED, lambda index: index % 3 == 0))
def test_every_pair_fits_its_gpu(row):
    """No spills, shared memory within the limit, and the pool never copied."""
    case = case_of(row, num_kv_heads=4)
    found = compile_with_default_tiles(case, row["device"])
    assert sum("triton" in call for call in found.custom_calls) == 3
    assert found.num_copies_of(attention_args(MIXED, case)[1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 16, 32, 71])
def test_every_group_and_head_dim_fits_every_gpu(group, head_dim, dtype, has_features, device):
    features = {"sliding_window": 40, "soft_cap": 30.0, "has_sinks": True} if has_features else {}
    compile_with_default_tiles(Case("", group, 1, head_dim, 64, dtype, **features), device)


@pytest.mark.parametrize(
    ("name", "device"), [("gemma2-9b-local", "h200"), ("gpt-oss-20b-local", "a100"), ("llama3-8b", "l4")]
)
def test_real_models_fit_their_gpus(name, device):
    (case,) = [case for case in CASES if case.name == name]
    compile_with_default_tiles(case, device)


def test_what_triton_refuses_xla_takes_on_a_gpu():
    case = Case("wide-head", 8, 4, 512, 64)
    tiling = dataclasses.replace(TILING, query_tile=16)
    step = functools.partial(attention, case=case, tiling=tiling, backend="auto")
    found = gpu_compile.report(target("h200").compile(step, attention_args({**MIXED, "num_tokens": 256}, case)))
    assert not any("triton" in call for call in found.custom_calls)
    assert found.num_copies_of(attention_args(MIXED, case)[1]) == 0


def two_layers(pools, q, k, v, slots, tables, batch, *, forced_copy=False):
    """What a backbone does with its pages: writes, attends, and hands them back."""
    new_pools = []
    for k_pages, v_pages in pools:
        before = k_pages
        k_pages, v_pages = kv_write(k_pages, v_pages, k, v, slots)
        q = attention(q, k_pages, v_pages, tables, batch, None)
        if forced_copy:
            q = q + before[0, 0, 0, 0]  # a use of the old pages after they were overwritten
        new_pools.append((k_pages, v_pages))
    return new_pools, q


def two_layers_args(bucket):
    q, pages, _, tables, batch, _ = attention_args(bucket)
    tokens = shape(bucket["num_tokens"], LLAMA.num_kv_heads, LLAMA.head_dim, dtype=jnp.bfloat16)
    return [(pages, pages)] * 2, q, tokens, tokens, shape(bucket["num_tokens"]), tables, batch


def pool_gate(compiled, bucket):
    """Returns what is wrong with how a two-layer step treats its pool."""
    page_array = attention_args(bucket)[1]
    pool_bytes = 4 * page_array.size * page_array.dtype.itemsize
    found = gpu_compile.report(compiled)
    wrong = []
    if found.aliased_bytes != pool_bytes:
        wrong.append(f"{found.aliased_bytes} of {pool_bytes} pool bytes in place")
    if found.num_copies_of(page_array):
        wrong.append(f"{found.num_copies_of(page_array)} copies of a page array")
    # The output's two buffers, and one layer's partials.
    limit = 4 * bucket["num_tokens"] * LLAMA.num_q_heads * LLAMA.head_dim * 2 + partial_bytes(bucket) + 65536
    if found.temporary_bytes > limit:
        wrong.append(f"{found.temporary_bytes} temporary bytes > {limit}")
    return wrong


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_donated_pool_stays_in_place(bucket):
    compiled = target("h200").compile(two_layers, two_layers_args(bucket), donate_argnums=0)
    assert pool_gate(compiled, bucket) == []


KV_WRITES = pairwise({key: FACTORS[key] for key in ("head_dim", "page_size", "dtype")} | {"device": DEVICES})


def compile_kv_write(row, **kwargs):
    dtype = jnp.dtype(row["dtype"])
    pages = shape(NUM_PAGES, 4, row["page_size"], row["head_dim"], dtype=dtype)
    tokens = shape(64, 4, row["head_dim"], dtype=dtype)
    compiled = target(row["device"]).compile(kv_write, (pages, pages, tokens, tokens, shape(64)), **kwargs)
    return gpu_compile.report(compiled), pages


@pytest.mark.parametrize("row", every(KV_WRITES, lambda index: index % 4 == 0))
def test_kv_write_is_in_place_on_every_gpu(row):
    found, pages = compile_kv_write(row, donate_argnums=(0, 1))
    assert found.aliased_bytes == 2 * pages.size * pages.dtype.itemsize
    assert found.num_copies_of(pages) == 0
    assert found.temporary_bytes < 65536


def test_gate_sees_a_kv_write_that_is_not_in_place():
    found, pages = compile_kv_write(KV_WRITES[0])
    assert found.aliased_bytes == 0
    assert found.num_copies_of(pages) == 2


def test_gate_sees_a_pool_that_is_not_donated():
    compiled = target("h200").compile(two_layers, two_layers_args(DECODE))
    assert any("pool bytes in place" in wrong for wrong in pool_gate(compiled, DECODE))


def test_gate_sees_a_forced_copy():
    step = functools.partial(two_layers, forced_copy=True)
    compiled = target("h200").compile(step, two_layers_args(DECODE), donate_argnums=0)
    wrong = pool_gate(compiled, DECODE)
    assert any("copies of a page array" in reason for reason in wrong), wrong


def test_gate_sees_too_much_shared_memory():
    greedy = dataclasses.replace(TILING, kv_block=128, decode_num_stages=9)
    needed = r"h200: paged_attention_decode needs 27\d{4} bytes of shared memory \(.*available: 232448"
    with pytest.raises(gpu_compile.DoesNotFit, match=needed):
        target("h200").compile(functools.partial(attention, tiling=greedy), attention_args(DECODE))


def test_gate_sees_register_spills():
    crowded = dataclasses.replace(TILING, query_tile=32, prefill_num_warps=4)
    with pytest.raises(gpu_compile.DoesNotFit, match=r"h200: paged_attention_prefill spills \d+ bytes of registers"):
        target("h200").compile(functools.partial(attention, tiling=crowded), attention_args({**MIXED, "num_tokens": 256}))


def test_missing_compiler_is_explained(monkeypatch):
    monkeypatch.setattr(gpu_compile.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(gpu_compile.GpuCompilerMissing, match=f"pip install .*jax-cuda13-plugin=={jax.__version__}"):
        gpu_compile.Target("h200")


def test_kernel_list_tells_what_a_graph_captures():
    thunks = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | next=004 (3)] inside grid: [1, 2, 1] threads: [32, 1, 1]  shared_memory: 7 bytes
002: kKernel [prev=001 (1) | sink] outside grid: [1, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
"""
    inside, outside = gpu_compile._parse_kernels(thunks)
    assert inside == gpu_compile.Kernel("inside", 32, 7, is_captured=True)
    assert outside == gpu_compile.Kernel("outside", 64, 0, is_captured=False)
