import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.config import EngineConfig
from serve.flags import documentation, with_flags
from serve.settings import ServerConfig


@dataclasses.dataclass
class Small:
    """A part.

    Attributes:
        max_things: most of them
            [things].
        is_quick: whether it is.
    """

    max_things: int | None = None
    is_quick: bool = True


@pytest.fixture
def parse():
    def run(*arguments):
        seen = {}
        app = typer.Typer()

        @app.command()
        @with_flags(Small)
        def command(name: str, **settings):
            seen.update(settings, name=name)

        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, seen, result.output

    return run


def test_fields_become_flags(parse):
    assert parse("n", "--max-things", "3", "--no-is-quick") == (0, {"name": "n", "max_things": 3, "is_quick": False}, "")


def test_what_is_not_given_is_none(parse):
    assert parse("n")[1] == {"name": "n", "max_things": None, "is_quick": None}


def test_a_wrong_type_is_wrong_usage(parse):
    code, seen, output = parse("n", "--max-things", "many")
    assert (code, seen) == (2, {})
    assert "--max-things" in output


def test_the_help_is_the_docstring(parse):
    output = " ".join(parse("--help")[2].replace("│", " ").split())
    assert "most of them [things]." in output
    assert "whether it is. [default: True]" in output


@pytest.mark.parametrize("kind", [EngineConfig, ServerConfig])
def test_every_setting_is_documented(kind):
    assert set(documentation(kind)) == {field.name for field in dataclasses.fields(kind)}
    assert all(documentation(kind).values())
