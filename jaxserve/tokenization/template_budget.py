"""What one render of a chat template may use, and who pays for what.

Work is counted in characters; an element of a container, a turn of a loop and a call are put in the same unit. Every
container pays for its whole printed size when it is made, shared parts each time, so that nothing that a template holds
is ever larger than its budget, however often it refers to itself.

Knows nothing of jinja2 but its base error.
"""

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import TemplateError

ELEMENT_COST = 16  # an element of a list weighs about as much memory as 16 characters


class TemplateLimitError(TemplateError):
    """A template that would use more than its budget."""


class Budget:
    """What is left of one render's work and time."""

    __slots__ = ("_deadline", "_left")

    def __init__(self, work: int, seconds: float):
        """Starts now.

        Args:
            work: characters.
            seconds: wall-clock time [s].
        """
        self._left = work
        self._deadline = time.monotonic() + seconds

    def spend(self, work: int) -> None:
        """Takes work off.

        Raises:
            TemplateLimitError: there is not as much left, or the time is over.
        """
        self._left -= work
        if self._left < 0:
            raise TemplateLimitError("it makes more text or takes more turns than a chat of this size needs")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError("it takes too long")

    def spend_whole(self, value: Any) -> int:
        """Pays for a value as if it were printed, and returns the price."""
        spent = 0
        pending = [value]
        while pending:
            value = pending.pop()
            price = shallow_price(value)
            self.spend(price)
            spent += price
            if isinstance(value, dict):
                pending += value.keys()
                pending += value.values()
            elif isinstance(value, (list, tuple)):
                pending += value
        return spent


def shallow_price(value: Any) -> int:
    """The price of a value without what its elements hold."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, (list, tuple, dict)):
        return ELEMENT_COST * (len(value) + 1)
    return 1


_current: ContextVar[Budget] = ContextVar("chat_template_budget")


def current_budget() -> Budget:
    """The budget that this thread's template runs on."""
    return _current.get()


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Lets this thread's templates compile and render on the budget."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


def bounded_concat(parts: Iterable[str]) -> str:
    """`"".join`, paid for piece by piece before the whole is made."""
    budget = current_budget()
    kept = []
    for part in parts:
        budget.spend(len(part) + 1)
        kept.append(part)
    return "".join(kept)


class Counted:
    """An iterable whose turns are paid for; as long as what it wraps."""

    __slots__ = ("_iterable",)

    def __init__(self, iterable: Iterable):
        self._iterable = iterable

    def __iter__(self) -> Iterator:
        budget = current_budget()
        for item in self._iterable:
            budget.spend(1)
            yield item

    def __len__(self) -> int:
        return len(cast(Sized, self._iterable))  # a TypeError for a generator, as jinja2's loop expects
