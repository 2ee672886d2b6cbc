"""The environment that chat templates run in: jinja2's immutable sandbox with Hugging Face's names, on a budget.

A template comes with a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from running code; it does
not keep it from eating the machine (9 of 13 bombs hang or take gigabytes). Here each construct that can make much out of
little pays a `Budget` before it makes it: operators, literals, loops, calls, filters, `set` blocks, the output.

What remains is one library operation on a budget's worth of characters, some 0.1 s at worst, because a budget is looked
at between operations. So render off the event loop.

Source of the names: transformers 5.23, utils/chat_template_utils.py, _compile_jinja_template.
"""

import re
from collections.abc import Iterable
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxserve.tokenization.template_budget import (
    Counted,
    TemplateLimitError,
    bounded_concat,
    current_budget,
    shallow_price,
)
from jaxserve.tokenization.template_filters import STR_METHODS, check_str_method, paying_filters

_MAX_INT_BITS = 4096
_MAX_DATE_FORMAT_CHARS = 100
_MAX_NESTED_STATEMENTS = 40  # Python itself takes 20 nested loops; templates in use nest up to 12
_SIZED = (str, list, tuple)
_WIDE_FORMAT = re.compile(r"%\(|%[^a-zA-Z%]*[\d*]")


class TemplateRaisedError(jinja2.TemplateError):
    """The template itself refused, by `raise_exception`."""


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """Shared by all threads; the budget is the thread's."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        """Takes away what is not needed and adds Hugging Face's names."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.concat = bounded_concat
        self.filters = paying_filters()
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace

    def compile_paying(self, source: str) -> jinja2.Template:
        """Compiles a template whose loops, literals and `~` pay, too."""
        return self.from_string(_Instrument(self).visit(self.parse(source)))

    def counted(self, iterable: Iterable) -> Counted:
        """A loop's iterable."""
        return Counted(iterable)

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        return bounded_concat(map(str, parts))

    def paid(self, container: Any) -> Any:
        """What a list, a tuple or a dict in the template's text makes."""
        current_budget().spend_whole(container)
        return container

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Narrows jinja2's answer: of a str only what is listed, of a number nothing."""
        if isinstance(obj, str):
            return attr in STR_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No wrapper: `format` is not among a str's methods here."""
        del value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pays for what an operator is about to make."""
        budget = current_budget()
        if operator == "+":
            budget.spend_whole(left)
            budget.spend_whole(right)
        elif operator == "%" and isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise SecurityError("a width or a precision in a % format is not allowed")
            budget.spend_whole([left, right])
        elif operator == "*" and (isinstance(left, _SIZED) or isinstance(right, _SIZED)):
            text, times = (left, right) if isinstance(left, _SIZED) else (right, left)
            if isinstance(times, int) and times > 0:
                budget.spend(times * budget.spend_whole(text))
        else:
            _check_integers(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Pays for a call; the odd names leave all others to the template, as in jinja2."""
        budget = current_budget()
        budget.spend(1)
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            check_str_method(__obj, args, kwargs)
            result = super().call(__context, __obj, *args, **kwargs)
            budget.spend(shallow_price(result))
            return result
        if isinstance(__obj, jinja2.runtime.Macro):
            budget.spend_whole([args, kwargs])  # they can come back as the macro's varargs and kwargs
        elif isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (Counted(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)


class _Instrument(NodeTransformer):
    """Makes the constructs pay that jinja2 compiles to plain Python; refuses nesting that takes it seconds to compile."""

    def __init__(self, environment: jinja2.Environment):
        self._environment = environment
        self._depth = 0

    def visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node, jinja2.nodes.Stmt):
            return super().visit(node, *args, **kwargs)
        if self._depth >= _MAX_NESTED_STATEMENTS:
            raise TemplateLimitError(f"it nests more than {_MAX_NESTED_STATEMENTS} statements")
        self._depth += 1
        visited = super().visit(node, *args, **kwargs)
        self._depth -= 1
        return visited

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("counted", [node.iter], node)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("joined", node.nodes, node)

    def visit_List(self, node: jinja2.nodes.List | jinja2.nodes.Dict) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("paid", [node], node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("paid", [node], node) if node.ctx == "load" else node

    def _call(self, name: str, arguments: list, like: jinja2.nodes.Node) -> jinja2.nodes.Node:
        target = jinja2.nodes.EnvironmentAttribute(name)
        call = jinja2.nodes.Call(target, arguments, [], None, None)
        return call.set_lineno(like.lineno).set_environment(self._environment)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Reads up to the closing tag."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, not the bare body, so that names set inside stay inside, as in transformers.
        return jinja2.nodes.CallBlock(self.call_method("body_text"), [], [], body).set_lineno(lineno)

    @staticmethod
    def body_text(caller: jinja2.runtime.Macro) -> str:
        """The rendered body."""
        return caller()


class _TemplateDict:
    """`dict`, without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        made = dict(*args, **kwargs)
        current_budget().spend_whole(made)
        return made

    def fromkeys(self, *args: Any) -> dict:
        """As `dict.fromkeys`."""
        made = dict.fromkeys(*args)
        current_budget().spend_whole(made)
        return made


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace`, which takes no names with a leading underscore and prints no contents (they may hold it itself)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # The signature leaves `self` to the template, as jinja2's own does.
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: rename it, without the leading underscore")


def _check_integers(operator: str, left: Any, right: Any) -> None:
    """Keeps `*` and `**` from making integers of more than 1,200 digits."""
    if operator == "%" or not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
    if bits > _MAX_INT_BITS:
        raise TemplateLimitError(f"it makes an integer of more than {_MAX_INT_BITS} bits")


def _raise_exception(message: Any) -> None:
    raise TemplateRaisedError(message if isinstance(message, str) else type(message).__name__)


def _strftime_now(format: str) -> str:  # noqa: A002
    if not isinstance(format, str) or len(format) > _MAX_DATE_FORMAT_CHARS:
        raise SecurityError(f"strftime_now takes a format of at most {_MAX_DATE_FORMAT_CHARS} characters")
    return datetime.now().strftime(format)  # local time, as in transformers
