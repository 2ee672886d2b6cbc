"""Kept programs: found again they are not compiled; damaged, foreign or unknown ones are, and nothing breaks."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import PartitionSpec

from jaxserve.execution import program_cache, program_key
from jaxserve.execution.compilation import process_counter
from jaxserve.execution.program_cache import ProgramCache
from jaxserve.models import layers
from jaxserve.models.toy import Toy
from sharding.mesh import TensorParallelism

ROOT = Path(__file__).parents[3]
X = np.array([0.5, 3.0, -7.0], np.float32)
SALT = 1 + time.time() % 1
"""No earlier run has left a program with this constant in the cache of jax that the tests share."""


@pytest.fixture(autouse=True)
def sources_are_those_that_were_imported(monkeypatch):
    monkeypatch.setattr(program_key, "_process_start_s", lambda: math.inf)


@pytest.fixture(autouse=True)
def jax_keeps_nothing():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "programs"


def open_cache(directory, **options):
    return ProgramCache(directory, jax.devices()[:1], **options)


def run(cache, cap=2.0, during_compilation=lambda: None):
    """Runs one soft cap through the cache, and checks what it says; returns whether it was loaded."""
    cap *= SALT
    function = functools.partial(layers.soft_capped, cap=cap)
    arguments = (jax.ShapeDtypeStruct(X.shape, X.dtype),)

    def compile_program():
        during_compilation()
        return jax.jit(function).lower(*arguments).compile()

    num_loaded = cache.num_loaded
    program = cache.load_or_compile(compile_program, function, (PartitionSpec(),), PartitionSpec(), arguments)
    np.testing.assert_allclose(program(X), cap * np.tanh(X / cap), rtol=1e-5)
    return cache.num_loaded > num_loaded


def num_compilations():
    return process_counter().count_of(threading.current_thread())


def entries(directory):
    return sorted(directory.iterdir())


def test_a_program_that_was_kept_is_not_compiled_again(directory):
    assert not run(open_cache(directory))
    before = num_compilations()
    cache = open_cache(directory)
    assert run(cache) and (cache.num_loaded, cache.num_compiled, cache.reasons) == (1, 0, set())
    assert num_compilations() == before
    assert not run(cache, cap=3.0) and run(cache, cap=2.0)
    # Loading hides no compilation from the counter.
    assert num_compilations() == before + 1


def test_entries_and_their_directory_are_private(directory):
    run(open_cache(directory))
    (entry,) = entries(directory)
    assert [path.stat().st_mode & 0o777 for path in (directory, entry)] == [0o700, 0o600]


def _truncate(entry):
    entry.write_bytes(entry.read_bytes()[:-100])


def _flip(entry):
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)


def _empty(entry):
    entry.write_bytes(b"")


def _rename(entry):
    other = open_cache(entry.parent)
    run(other, cap=5.0)
    (another,) = set(entries(entry.parent)) - {entry}
    another.replace(entry)


def _not_a_program(entry):
    payload = b"\x80\x04N."  # a whole pickle, of None
    entry.write_bytes(program_cache._header(entry, payload) + payload)


def _writable_by_others(entry):
    entry.chmod(0o666)


def _link(entry):
    shutil.move(entry, entry.parent.parent / "elsewhere")
    entry.symlink_to(entry.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _rename, _not_a_program, _writable_by_others, _link])
def test_a_damaged_or_foreign_entry_is_compiled_and_replaced(directory, damage):
    run(open_cache(directory))
    (entry,) = entries(directory)
    damage(entry)
    cache = open_cache(directory)
    assert not run(cache) and len(cache.reasons) == 1
    cache = open_cache(directory)
    assert run(cache) and not cache.reasons
    assert entries(directory) == [entry] and entry.stat().st_mode & 0o777 == 0o600 and not entry.is_symlink()


def test_a_directory_that_others_can_write_to_is_not_used(directory, monkeypatch):
    run(open_cache(directory))
    directory.chmod(0o770)
    with pytest.warns(UserWarning, match="are not kept.*writable by nobody else.*drwxrwx---.*compilation_cache_dir"):
        cache = open_cache(directory)
    assert not cache.is_on and not run(cache)
    directory.chmod(0o700)
    with monkeypatch.context() as m:
        m.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.warns(UserWarning, match=f"belongs to user {os.getuid()}"):
            assert not open_cache(directory).is_on
    assert run(open_cache(directory))


@pytest.mark.parametrize("obstacle", ["a file", "no room", "no api", "another tree"])
def test_where_nothing_can_be_kept_programs_run_all_the_same(directory, monkeypatch, obstacle):
    def fail(*args):
        raise OSError(28, "No space left on device")

    if obstacle == "a file":
        directory.write_text("")
    elif obstacle == "no room":
        monkeypatch.setattr(os, "replace", fail)
    elif obstacle == "no api":
        monkeypatch.setitem(sys.modules, "jax.experimental.serialize_executable", None)
    else:
        monkeypatch.setattr(
            serialize_executable, "serialize", lambda program: (b"", jax.tree.structure(0), program.out_tree)
        )
    cache = open_cache(directory)
    assert not run(cache) and cache.reasons
    assert not directory.is_dir() or entries(directory) == []


def test_what_jaxs_own_cache_had_is_not_kept(directory):
    """XLA:CPU serializes it again without an error, and without its functions (jax 0.10.2)."""
    cache = open_cache(directory)
    assert not run(cache, during_compilation=lambda: jax.monitoring.record_event("/jax/compilation_cache/cache_hits"))
    assert entries(directory) == [] and cache.reasons


def test_what_a_key_cannot_hold_is_not_kept(directory):
    class OwnFamily(Toy):
        """A family of a user."""

    cache = open_cache(directory, ingredients=OwnFamily(TensorParallelism()))
    assert not cache.is_on and not run(cache) and not directory.exists()
    assert open_cache(directory, ingredients=Toy(TensorParallelism())).is_on


def test_sources_that_changed_under_the_process_keep_nothing(directory, monkeypatch):
    run(open_cache(directory))
    monkeypatch.setattr(program_key, "_process_start_s", lambda: 0.0)
    cache = open_cache(directory)
    assert not run(cache) and "has changed since this process started" in " ".join(cache.reasons)


def test_the_least_recently_used_go_first(directory, monkeypatch):
    cache = open_cache(directory)
    run(cache, cap=1.0)
    (first,) = entries(directory)
    run(cache, cap=2.0)
    (second,) = set(entries(directory)) - {first}
    for age_s, entry in ((100, first), (50, second)):
        os.utime(entry, (entry.stat().st_mtime - age_s,) * 2)
    unfinished = directory / "killed.tmp"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (first.stat().st_mtime - 7200,) * 2)
    assert run(cache, cap=1.0)  # used: younger than the second now
    monkeypatch.setattr(program_cache, "MAX_BYTES", 5 * first.stat().st_size // 2)
    run(cache, cap=3.0)
    assert first.exists() and not second.exists() and not unfinished.exists() and len(entries(directory)) == 2


def test_many_at_once_share_a_directory(directory):
    caches = [open_cache(directory) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: run(caches[i % 4], cap=float(1 + i % 3)), range(24)))
    assert sum(cache.num_loaded + cache.num_compiled for cache in caches) == 24
    assert len(entries(directory)) == 3 and all(run(open_cache(directory), cap=float(1 + i)) for i in range(3))


class _Keys(ProgramCache):
    """Tells programs apart and makes none."""

    def __init__(self, directory):
        super().__init__(directory, jax.devices()[:1])
        self.paths = []

    def load_or_compile(self, compile_program, *dependencies):
        self.paths.append(self._path(*dependencies))


def test_every_program_of_an_engine_has_a_key_of_its_own(tiny_llm, directory, monkeypatch):
    """A program whose closure holds something new fails here, by name, and would be compiled at every start."""
    runner, all_paths = tiny_llm._engine.runner, []
    for _ in range(2):
        keys = _Keys(directory)
        monkeypatch.setattr(runner._factory, "_cache", keys)
        monkeypatch.setattr(type(runner), "_run_each_once", lambda self: None)
        for name in ("_backbones", "_heads", "_admit", "_pool", "_score"):
            monkeypatch.setattr(runner, name, getattr(runner, name))
        runner.warmup()
        assert keys.is_on and len(set(keys.paths)) == len(keys.paths) > 5
        all_paths.append(set(keys.paths))
    assert all_paths[0] == all_paths[1]


# --- whole processes --------------------------------------------------------------------------------------------------

START = """
import json, sys
import jaxserve.execution.runner, jaxserve.models.registry, kernels_pallas.paged_attention.triton
from jaxserve.execution.program_key import OUR_PACKAGES
files = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] in OUR_PACKAGES]
from jaxserve import LLM, SamplingParams
llm = LLM("toy", use_tqdm=False, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=128, num_pages=16,
          sequence_buckets=(2,), token_buckets=(16,))
outputs = llm.generate(["abc", "b" * 40], SamplingParams(temperature=0.7, seed=3, max_tokens=20, logprobs=2), use_tqdm=False)
cache = llm._engine.runner._factory._cache
print(json.dumps({
    "loaded": cache.num_loaded, "compiled": cache.num_compiled, "reasons": sorted(cache.reasons), "files": files,
    "outputs": repr([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]),
    "since_ready": llm.stats().num_compilations_since_ready,
}))
"""


def start(home):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES")}
    environment |= {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_second_start_compiles_nothing_and_says_the_same(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    num_programs = len(entries(tmp_path / "jaxserve/programs"))
    assert (first["loaded"], first["compiled"]) == (0, num_programs) and num_programs > 5
    assert (second["loaded"], second["compiled"], second["reasons"]) == (num_programs, 0, [])
    assert first["outputs"] == second["outputs"]
    assert first["since_ready"] == second["since_ready"] == 0
    # All that was imported before LLM, where programs are written, is in their keys; of the package itself its name alone.
    files = {str(Path(name).relative_to(ROOT)) for name in first["files"]} - {"jaxserve/__init__.py"}
    assert "jaxserve/execution/step.py" in files
    assert [name for name in files if not name.startswith(program_key.SOURCES)] == []
