from dataclasses import replace

from jaxserve.engine_client import EngineStats
from serve.progress import ProgressProbe


class Engine:
    def __init__(self):
        self.stats = EngineStats()
        self.now_s = 100.0
        self.probe = ProgressProbe(lambda: self.stats, 30.0, lambda: self.now_s)

    def after(self, seconds, **changes):
        self.now_s += seconds
        self.stats = replace(self.stats, **changes)
        return self.probe.stalled_for_s()


def test_work_without_steps_is_a_stall_until_the_next_step():
    engine = Engine()
    assert engine.after(1000) is None  # nothing to do
    assert engine.after(1000, has_work=True) is None
    assert engine.after(30) is None
    assert engine.after(1) == 31.0
    assert engine.after(10) == 41.0
    assert engine.after(1, num_steps=1) is None
    assert engine.after(29) is None
    assert engine.after(2) == 31.0
    assert engine.after(1, has_work=False) is None


def test_steps_between_two_looks_are_progress():
    engine = Engine()
    for num_steps in range(5):
        assert engine.after(1000, has_work=True, num_steps=num_steps) is None
