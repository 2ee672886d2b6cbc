"""The environment that chat templates run in: jinja2's immutable sandbox, with Hugging Face's names and a budget.

A template comes with a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from running code; it does
not keep it from eating the machine. Here every render has a `Budget` of work (characters and elements made, loop turns, calls) and of time,
and each construct that can make much out of little pays before it makes it. What a template can hold is
thereby never larger than its budget.

What remains: one operation of the library on a budget's worth of characters, some 0.1 s at worst. A budget is looked at
between operations, so render off the event loop.

Source of the Hugging Face names: transformers 5.23, utils/chat_template_utils.py, _compile_jinja_template.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

_ELEMENT_COST = 16  # an element of a list weighs about as much memory as 16 characters
_MAX_INT_BITS = 4096
_MAX_SMALL = 1000  # widths, fill counts, sets of characters to strip
_MAX_DIGITS = 32

# Everything a str can do that is of use in a template and makes no more than it is given; replace and join pay in advance.
_STR_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower"
    " isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind"
    " rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
# Left out, because they format, pad or search without bound: center, filesizeformat, format, pprint, striptags, urlize,
# wordwrap, xmlattr; and random, because a prompt is a function of the request.
_FILTERS = frozenset(
    "abs attr batch capitalize count d default dictsort e escape first float forceescape groupby indent int items join"
    " last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort"
    " string sum title tojson trim truncate unique upper urlencode wordcount".split()
)
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*[\d*]")


class TemplateLimitError(jinja2.TemplateError):
    """A template that would use more than its budget."""


class TemplateRaisedError(jinja2.TemplateError):
    """The template itself refused, by `raise_exception`."""


class Budget:
    """What one render may still use."""

    __slots__ = ("_deadline", "_left")

    def __init__(self, work: int, seconds: float):
        """Starts now.

        Args:
            work: characters and elements.
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
            raise TemplateLimitError("it makes too much text or turns too often for a chat of this size")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError("it takes too long")

    def spend_whole(self, value: Any) -> None:
        """Pays for a container as if it were printed: shared parts count each time."""
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, dict):
                self.spend(2 * _ELEMENT_COST * len(value))
                pending += value.keys()
                pending += value.values()
            elif isinstance(value, (list, tuple)):
                self.spend(_ELEMENT_COST * len(value))
                pending += value
            else:
                self.spend(1)

    def spend_result(self, value: Any) -> None:
        """Pays for what an operation returned."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(_ELEMENT_COST * len(value))


_current: ContextVar[Budget] = ContextVar("chat_template_budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Lets this thread's templates compile and render on the budget."""
    token = _current.set(budget)
    try:
        yield
    finally:
        _current.reset(token)


class _Counted:
    """An iterable whose turns are paid for; as long as what it wraps."""

    __slots__ = ("_iterable",)

    def __init__(self, iterable: Iterable):
        self._iterable = iterable

    def __iter__(self) -> Iterator:
        spend = _current.get().spend
        for item in self._iterable:
            spend(1)
            yield item

    def __len__(self) -> int:
        return len(self._iterable)  # a TypeError for a generator, as jinja2's loop expects


class _Instrument(NodeTransformer):
    """Makes the constructs pay that jinja2 compiles to plain Python: loops, literals and `~`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._call("counted", [node.iter], node)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("joined", node.nodes, node)

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("paid", [node], node)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("paid", [node], node) if node.ctx == "load" else node

    @staticmethod
    def _call(name: str, arguments: list, like: jinja2.nodes.Node) -> jinja2.nodes.Node:
        target = jinja2.nodes.EnvironmentAttribute(name)
        call = jinja2.nodes.Call(target, arguments, [], None, None)
        return call.set_lineno(like.lineno).set_environment(like.environment)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """Hugging Face's environment, on a budget. Shared by all threads; the budget is the thread's."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        """Takes away what is not needed and adds Hugging Face's names."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self.concat = _bounded_concat
        self.filters = {name: _paying(_BOUNDED.get(name, self.filters[name])) for name in _FILTERS}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    def instrumented(self, source: str) -> jinja2.Template:
        """Compiles a template whose loops and literals pay."""
        tree = _Instrument().visit(self.parse(source))
        return self.from_string(tree)

    def counted(self, iterable: Iterable) -> Iterable:
        """A loop's iterable."""
        return _Counted(iterable)

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        return _bounded_concat([part if isinstance(part, str) else str(part) for part in parts])

    def paid(self, container: Any) -> Any:
        """What a literal makes."""
        _current.get().spend_whole(container)
        return container

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Narrows jinja2's answer: of a str only what is listed, of a number nothing."""
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Not at all: `format` is not among a str's methods here."""
        return

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pays for what an operator is about to make."""
        budget = _current.get()
        sized = (str, list, tuple)
        if operator == "+":
            for side in (left, right):
                budget.spend_whole(side) if isinstance(side, sized) else budget.spend(1)
        elif operator == "%":
            if isinstance(left, str):
                if _WIDE_FORMAT.search(left):
                    raise SecurityError("a width or a precision in a % format is not allowed")
                budget.spend_whole([left, right])
        elif isinstance(left, sized) or isinstance(right, sized):
            text, times = (left, right) if isinstance(left, sized) else (right, left)
            if isinstance(times, int) and times > 0:
                budget.spend(times)
                budget.spend(times * _whole_cost(budget, text))
        else:
            _check_integers(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Pays for a call; the odd names leave all others to the template, as in jinja2."""
        budget = _current.get()
        budget.spend(1)
        is_str_method = isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str)
        if is_str_method:
            _check_str_method(budget, __obj, args)
        elif isinstance(__obj, (jinja2.runtime.Macro, _TemplateDict)) or __obj == __obj_fromkeys(__obj):
            budget.spend_whole([*args, *kwargs.values()])
        elif isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (_Counted(args[0]), *args[1:])
        result = super().call(__context, __obj, *args, **kwargs)
        if is_str_method:
            budget.spend_result(result)
        return result
