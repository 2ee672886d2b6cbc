"""The ladder's programs are made smallest first, several at a time."""

import threading

import pytest

TIMEOUT_S = 30.0


@pytest.fixture
def runner(tiny_llm, monkeypatch):
    """A runner whose warm-up can be run again; it is the same afterwards."""
    runner = tiny_llm._engine.runner
    for name in ("_backbones", "_heads", "_admit", "_pool", "_score"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    monkeypatch.setattr(runner, "_run_each_once", lambda: None)
    return runner


class Jobs:
    """Stands for the program cache: notes what is asked for, and waits for company if told to."""

    def __init__(self, num_at_a_time=1):
        self.asked = []
        self._company = threading.Barrier(num_at_a_time)
        self._lock = threading.Lock()

    def load_or_compile(self, compile_program, function, in_specs, out_specs, arguments, *options):
        with self._lock:
            self.asked.append((function.__qualname__.split(".")[1], arguments[-1].size))
        self._company.wait(TIMEOUT_S)


def test_smallest_first(runner, monkeypatch):
    jobs = Jobs()
    monkeypatch.setattr(runner._factory, "_cache", jobs)
    done = []
    runner.warmup(lambda count, total: done.append((count, total)), num_threads=1)
    backbones, heads = ([size for name, size in jobs.asked if name == kind] for kind in ("backbone", "head"))
    assert backbones == sorted(backbones) and len(backbones) > 2
    assert heads == sorted(heads) and len(heads) > 1
    total = len(jobs.asked)
    assert done == [(count, total) for count in range(total + 1)]


def test_several_at_a_time(runner, monkeypatch):
    num_programs = len(runner._backbones) + len(runner._heads) + 3
    at_a_time = next(n for n in (2, 3, 5, 7) if num_programs % n == 0)
    monkeypatch.setattr(runner._factory, "_cache", Jobs(at_a_time))  # each waits for its company: one at a time would hang
    runner.warmup(num_threads=at_a_time)
