"""From the fields of a settings dataclass to command line flags: one flag a field, spelled alike, its text from the docstring.

Knows dataclasses and typer, and no setting by name: a new field of `EngineConfig` is a flag without a line here.
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Container
from typing import Annotated, Any

import typer

from serve.settings import is_list

PANELS = {"EngineConfig": "Engine", "ServerConfig": "Service"}
"""Dataclass -> heading of its flags in the help text."""


def with_flags(*kinds: type, without: Container[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces a command's `**settings` by a flag for each field of the dataclasses.

    A flag that is not given is None in `settings`: whoever merges the sources knows the defaults.

    Args:
        without: fields that get no flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [(kind, field) for kind in kinds for field in dataclasses.fields(kind) if field.name not in without]
        flags = [_parameter(kind, field) for kind, field in fields]
        command.__signature__ = signature.replace(parameters=own + flags)
        command.__annotations__ = {p.name: p.annotation for p in own + flags}
        return command

    return decorate


def documentation(kind: type) -> dict[str, str]:
    """What a Google docstring's "Attributes:" section says about each field."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
        name, _, text = entry.partition(":")
        if name.isidentifier():
            texts[name] = " ".join(text.split())
    return texts


def _parameter(kind: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    hint = typing.get_type_hints(kind)[field.name]
    spelled = field.name.replace("_", "-")
    name = f"--{spelled}/--no-{spelled}" if hint is bool else f"--{spelled}"
    text = documentation(kind).get(field.name, "")
    if field.default is not None:
        text = f"{text} [default: {field.default}]"
    text = text.replace("[", "\\[")  # rich takes [tokens] for markup
    option = typer.Option(name, help=text, show_default=False, rich_help_panel=PANELS.get(kind.__name__))
    if is_list(hint):
        hint = str  # `--token-buckets 32,128`: the merge splits it, as it does with the environment's
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, option]
    )
