"""The script for a GPU runs here at small shapes, and a wrong kernel or a part that breaks makes it fail, by name."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.__main__ import PARTS, run
from benchmarks.gpu.attention import attention_of
from benchmarks.gpu.kernels import writes
from benchmarks.gpu.numerics import device_tiling
from benchmarks.gpu.timing import loop
from kernels_pallas.gpu_compile import Target, report
from kernels_pallas.kv_write import api as kv_write
from kernels_pallas.paged_attention import api as paged_attention
from kernels_pallas.paged_attention.cases import CASES


def parts_of(directory):
    report = json.loads((directory / "report.json").read_text())
    return {part["title"]: [row["name"] for row in part["rows"]] for part in report["parts"]}


@pytest.mark.slow
def test_everything_runs_and_is_right(tmp_path):
    assert run(PARTS, is_small=True, seed=1, directory=tmp_path) == 0
    found = parts_of(tmp_path)
    assert "only whether it runs" in json.loads((tmp_path / "report.json").read_text())["shapes"]
    assert len(found) == 12 and all(found.values())
    assert "0 compilations after ready" in found["Latencies"]
    assert all(f"## {title}" in (tmp_path / "report.md").read_text() for title in found)


@pytest.mark.parametrize(("op", "name"), [(paged_attention, "paged_attention"), (kv_write, "kv_write")])
def test_a_wrong_kernel_is_named(op, name, monkeypatch, tmp_path, capsys):
    right = op.IMPLEMENTATIONS["xla"]

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return (result[1], result[0]) if isinstance(result, tuple) else result + 0.05 * result

    monkeypatch.setitem(op.IMPLEMENTATIONS, "xla", wrong)
    assert run(["numerics"], is_small=True, seed=2, directory=tmp_path) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failures and all(name in failure for failure in failures)


def test_a_part_that_breaks_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr("benchmarks.gpu.kernels.measure", broken)
    monkeypatch.setattr("benchmarks.gpu.engine.measure", lambda *_: None)
    assert run(["kernels", "engine"], is_small=True, seed=3, directory=tmp_path) == 1
    assert "FAILED The part kernels broke off, RuntimeError: no such kernel image" in capsys.readouterr().out


def body_of_the_loop(text):
    """Returns the computation that the one `while` of an HLO text repeats."""
    (name,) = re.findall(r" while\(.*body=(%[\w.\-]+)", text)
    return re.search(rf"^{re.escape(name)} \(.*?^}}", text, re.MULTILINE | re.DOTALL)[0]


def test_a_timed_loop_times_the_kernel_alone():
    """On an H200 that is not here: no copy of a pool, and the kernel inside the loop, not moved out of it."""
    llama = CASES[0]
    pages = jax.ShapeDtypeStruct((4096, 8, 64, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((64, 32, 128), jnp.bfloat16)
    batch = paged_attention.empty_ragged_batch(
        num_seq_slots=64, num_decode_slots=64, max_decode_items=1024, max_prefill_tiles=0
    )
    tables = jax.ShapeDtypeStruct((2, 64, 32), jnp.int32)
    target = Target("h200")
    with target.as_default():
        attention = loop(attention_of(llama, device_tiling(llama)), 20)
        compiled = target.compile(attention, (tables, (q, pages, pages, batch)))
    found, text = report(compiled), compiled.as_text()
    assert found.num_copies_of(pages) == 0
    assert found.temporary_bytes < 64 << 20
    assert body_of_the_loop(text).count('custom_call_target="__gpu$xla.gpu.triton"') == 2, "splits, and their combination"
    k = jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((64,), jnp.int32)
    with target.as_default():
        compiled = target.compile(writes(20), ((pages, pages), k, k, slots), donate_argnums=0)
    found = report(compiled)
    assert found.num_copies_of(pages) == 0
    assert found.aliased_bytes >= 2 * 4096 * 8 * 64 * 128 * 2
