"""A scheduler around the fake runner, stepped by hand as the engine steps it: plan and dispatch n + 1, then commit n."""

from typing import Any

from jaxserve.models import toy
from jaxserve.plan import StepPlan
from jaxserve.request import Request
from jaxserve.scheduling.scheduler import Committed, Scheduler
from jaxserve.testing.fake_runner import FakeRunner, Handle, NextToken, toy_config, toy_request


class Steps:
    """One scheduler and all that came out of it; every commit checks the books.

    Attributes:
        tokens: by request.
        ends: (finish reason, stop reason) of those that have ended, by request.
    """

    def __init__(self, num_groups: int = 1, next_token: NextToken = toy.next_token, **config: Any):
        self.config = toy_config(**config)
        self.scheduler = Scheduler(self.config, num_groups)
        self.runner = FakeRunner(self.config, num_groups, next_token)
        self.in_flight: Handle | None = None
        self.uncommitted: Handle | None = None
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, tuple[str, int | None]] = {}

    def add(self, *args: Any, **kwargs: Any) -> Request:
        request = toy_request(*args, **kwargs)
        self.tokens[request.request_id] = []
        self.ends.pop(request.request_id, None)
        self.scheduler.add(request)
        return request

    def plan(self) -> dict[str, int] | None:
        """Plans and dispatches, and leaves the step before uncommitted; returns {id: tokens planned}, or None."""
        self.commit()
        plan = self.scheduler.plan()
        self.uncommitted = self.in_flight
        self.in_flight = None if plan is None else self.runner.dispatch(plan)
        return None if plan is None else {s.request_id: s.num_tokens for s in plan.sequences}

    def commit(self) -> list[Committed]:
        """Commits the step before the last planned one, unless that was done."""
        handle, self.uncommitted = self.uncommitted, None
        return [] if handle is None else self._commit(handle)

    def land(self) -> list[Committed]:
        """Commits the last planned step too."""
        self.commit()
        handle, self.in_flight = self.in_flight, None
        assert handle is not None
        return self._commit(handle)

    def _commit(self, handle: Handle) -> list[Committed]:
        committed = self.scheduler.commit(self.runner.wait(handle))
        for c in committed:
            if c.token is not None and not c.is_nonfinite:
                self.tokens[c.request_id].append(c.token.token_id)
            if c.finish_reason is not None:
                self.ends[c.request_id] = (c.finish_reason, c.stop_reason)
        self.scheduler.check_integrity()
        return committed

    def step(self) -> dict[str, int] | None:
        taken = self.plan()
        self.commit()
        return taken

    def run(self, limit: int = 500) -> None:
        """Steps until there is nothing left to do."""
        for _ in range(limit):
            if self.step() is None and not self.scheduler.request_ids():
                return
        raise AssertionError(f"not done after {limit} steps")

    @property
    def last_plan(self) -> StepPlan:
        return self.runner.plans[-1]


def running(steps: Steps) -> list[str]:
    return [s.request_id for s in steps.scheduler._running]


def waiting(steps: Steps) -> list[str]:
    return [s.request_id for s in steps.scheduler._waiting]
