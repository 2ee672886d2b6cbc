"""SIGKILL while `jaxserve convert` runs: at any moment the destination is as it was or complete, and nothing else loads.

The conversions are forked from one process that has imported everything, so that a kill costs no start of Python. Half of the
kills come at a moment of the clock, half at the n-th time that the conversion touches its files; the second kind meets the
last steps, which take microseconds, every time.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import EngineConfig
from jaxserve.build import build
from jaxserve.checkpoints.load import load_parameters
from jaxserve.checkpoints.verify import verify
from jaxserve.errors import JaxserveError

ROOT = Path(__file__).resolve().parents[3]

# Reads one request a line, forks, kills or waits, tells the child's status and how often it touched files below `folder`.
_SERVER = """
import json, os, signal, sys, time
import jaxserve.checkpoints.convert
from jaxserve.checkpoints import hub, orbax_store
from serve import cli

orbax_store.GROUP_BYTES = 1 << 20  # so that there are several groups, and arrays in strips

def convert(arguments, folder, kill_at, out):
    touched = 0
    def hook(event, args):
        nonlocal touched
        if event == "ctypes.dlsym" or (args and isinstance(args[0], (str, bytes)) and os.fsdecode(args[0]).startswith(folder)):
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    sys.argv = ["jaxserve", "convert", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        os.write(out, str(touched).encode())
        sys.stderr.flush()
        os._exit(end.code or 0)

print("ready", flush=True)
for line in sys.stdin:
    *request, kill_after_s = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        convert(*request, writing)
    os.close(writing)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)  # nobody else has this id, as it was not waited for yet
    _, status = os.waitpid(child, 0)
    touched = os.read(reading, 100)
    os.close(reading)
    print(json.dumps([os.waitstatus_to_exitcode(status), int(touched or 0)]), flush=True)
"""


class _Conversions:
    """Starts and kills conversions of one source to one destination."""

    def __init__(self, server, source, destination, arguments):
        self._server = server
        self._arguments = [str(source), str(destination), *arguments]
        self._folder = str(destination.parent)
        self.destination = destination

    def run(self, kill_at=0, kill_after_s=None):
        """Returns (exit status, times that files were touched, seconds)."""
        started = time.monotonic()
        self._server.stdin.write(json.dumps([self._arguments, self._folder, kill_at, kill_after_s]) + "\n")
        self._server.stdin.flush()
        status, touched = json.loads(self._server.stdout.readline())
        return status, touched, time.monotonic() - started


@pytest.fixture(scope="module")
def server():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def sources(make_llama, server, tmp_path_factory):
    """The same model in both formats, about 7 MB, some tensors above a group; and another one that is overwritten."""
    fields = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 12_000, "dtype": "bfloat16"}
    made = {"huggingface": make_llama(**fields, tokenizer="bytes"), "orbax": tmp_path_factory.mktemp("k") / "orbax"}
    old = {"huggingface": tmp_path_factory.mktemp("k") / "old", "orbax": tmp_path_factory.mktemp("k") / "old"}
    for to, path in (("orbax", made["orbax"]), ("orbax", old["orbax"]), ("huggingface", old["huggingface"])):
        source = made["huggingface"] if path is made["orbax"] else make_llama(dtype="bfloat16", tokenizer="bytes")
        assert _Conversions(server, source, path, ["--to", to, "-q"]).run()[0] == 0
    return made, old


def _tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _load(path, parameters, dtype="bfloat16"):
    return load_parameters(path, parameters, {p.path: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)) for p in parameters})


def _assert_nothing_half_loads(destination, before, parameters):
    """The destination is what it was or verifies; whatever else lies there, nobody takes for a model."""
    is_done = False
    if before is None or _tree(destination) != before:
        if destination.exists():
            verify(destination, show_progress=False)
            assert len(_load(destination, parameters)) == len(parameters)
            is_done = True
        else:
            assert before is None, "the old checkpoint is gone"
    for path in destination.parent.iterdir():
        if path != destination:
            assert path.name.startswith(f".tmp-{destination.name}-")
            for attempt in (
                lambda path: verify(path, show_progress=False),
                lambda path: _load(path, parameters),
                lambda path: build(EngineConfig(model=str(path)), show_progress=False),
            ):
                with pytest.raises(JaxserveError):
                    attempt(path)
    return is_done


def _beat(server, sources, parameters_of, folder, to, overwrite, num_kills, seed):
    made, old = sources
    source = made["orbax" if to == "huggingface" else "huggingface"]
    parameters = parameters_of(source)
    generator = random.Random(seed)
    destination = folder / "model"
    conversions = _Conversions(server, source, destination, ["--to", to, "-q", *(["--overwrite"] if overwrite else [])])

    def reset():
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            shutil.copytree(old[to], destination)

    reset()
    before = _tree(destination) if overwrite else None
    status, num_touches, duration_s = conversions.run()
    assert status == 0
    expected = _tree(destination)
    reset()
    outcomes = []
    for kill in range(num_kills):
        if kill % 2:  # spread over the run, whose length varies
            status, _, _ = conversions.run(kill_after_s=duration_s * (kill + generator.random()) / num_kills)
        else:  # every fourth among the last ten: the changes of names, and the clean-up
            first = num_touches - 10 if kill % 4 == 0 else 1
            status, _, _ = conversions.run(kill_at=generator.randint(first, num_touches))
        assert status in (-signal.SIGKILL, 0)
        outcomes.append(status)
        if _assert_nothing_half_loads(destination, before, parameters):
            if kill % 3 == 2 and overwrite:
                before = None  # the rerun below replaces a complete new one
            elif kill % 3 != 2:
                reset()
        if kill % 3 == 2:
            if not overwrite:
                shutil.rmtree(destination, ignore_errors=True)
            assert conversions.run()[0] == 0
            assert [path.name for path in folder.iterdir()] == ["model"], "a rerun removes what was left"
            found = _tree(destination)
            assert found.keys() == expected.keys() or to == "orbax"  # Orbax names its files at random
            verify(destination, show_progress=False)
            reset()
            before = _tree(destination) if overwrite else None
    assert outcomes.count(-signal.SIGKILL) > num_kills // 2


@pytest.mark.parametrize(("to", "overwrite"), [pytest.param("orbax", True, marks=pytest.mark.slow), ("huggingface", False)])
def test_three_kills_leave_nothing_that_loads(to, overwrite, server, sources, parameters_of, tmp_path):
    _beat(server, sources, parameters_of, tmp_path, to, overwrite, num_kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_fifty_kills_leave_nothing_that_loads(to, overwrite, server, sources, parameters_of, tmp_path):
    """Four times thirteen."""
    _beat(server, sources, parameters_of, tmp_path, to, overwrite, num_kills=13, seed=2)
