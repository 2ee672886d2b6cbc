"""The `jaxserve` command. Knows arguments, terminals and exit statuses, and imports what a command needs when it runs.

Exit statuses: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 nothing to compare with (`verify`), 130 Ctrl-C.
Standard output has the result alone: the completion of `generate`, the ready lines of `serve`, what `verify` found.
"""

import contextlib
import io
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, JaxserveError
from serve.flags import with_flags
from serve.settings import ServerConfig, load

if TYPE_CHECKING:
    from serve.doors import Endpoints

TRACEBACK_VARIABLE = "JAXSERVE_TRACEBACK"
EXAMPLE_PROMPT = "def fib(n):"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve language models with JAX, generate text, convert checkpoints.",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.yaml", help="Settings as a YAML mapping, keys spelled as the flags with underscores."
    ),
]


def main() -> None:
    """The console script."""
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        import jaxserve

        typer.echo(f"jaxserve {jaxserve.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve language models with JAX, generate text, convert checkpoints."""


@app.command()
@with_flags(EngineConfig, ServerConfig)
def serve(*, config: ConfigOption = None, **settings: Any) -> None:
    """Serve a model over gRPC and HTTP until SIGTERM.

    Every setting is a flag, a JAXSERVE_* environment variable (JAXSERVE_GRPC_PORT) or a key of --config; the first of
    these that has it wins.
    """
    with _errors_on_one_line():
        engine_config, server_config = load(settings, config)
        _log_to_stderr(server_config.log_level)
        import asyncio

        from serve import lifecycle

        def build() -> Any:
            from jaxserve.build import build

            return build(engine_config)

        status = asyncio.run(lifecycle.run(build, server_config, _say_ready))
        lifecycle.leave(status)


@app.command()
@with_flags(EngineConfig, without=("seed",))  # here it is the request's
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads it from standard input.")],
    *,
    endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A running server; without it the model is loaded here.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token always, so that a run can be repeated.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of likely tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="As many most likely tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability relative to the most likely token's.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a run with a temperature repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the completion; may be repeated.")] = None,
    min_tokens: Annotated[int, typer.Option(help="No end before as many tokens.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after as many seconds (with --endpoint).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors on stderr.")] = False,
    config: ConfigOption = None,
    **settings: Any,
) -> None:
    """Stream a completion to standard output; everything else goes to stderr."""
    with _errors_on_one_line():
        from jaxserve.request import SamplingParams
        from serve import generation

        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stop,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
        )
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ConfigError("The prompt must be valid UTF-8; it holds bytes that are not.")
        _check_generate(endpoint, timeout_s, config, settings)
        with _Writer() as writer:
            if endpoint is not None:
                summary = generation.generate_remotely(endpoint, text, sampling, writer.write, timeout_s)
            else:
                with _engine_here(settings, config, show_progress=not quiet) as built:
                    summary = generation.generate_here(built, text, sampling, writer.write)
        if not quiet:
            typer.echo(writer.describe(summary), err=True)


def _show_mapping(name: str | None) -> None:
    if name is not None:
        with _errors_on_one_line():
            from jaxserve.checkpoints.flax_trees import mapping

            typer.echo(mapping.text_of(name), nl=False)
        raise typer.Exit


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory or a Hub id.")],
    destination: Annotated[Path, typer.Argument(help="A directory that does not exist yet, or is empty.")],
    *,
    dtype: Annotated[str | None, typer.Option(help="Of the parameters; the source's own by default.")] = None,
    to: Annotated[Literal["orbax", "huggingface"], typer.Option(help="The format to write.")] = "orbax",
    tree: Annotated[
        Literal["auto", "canonical", "maxtext", "linen", "nnx", "tunix", "gemma"],
        typer.Option(help="The layout of a Flax program's own Orbax checkpoint."),
    ] = "auto",
    mapping: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Which leaf of such a checkpoint is which tensor, instead of --tree."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Its Hugging Face config.json, or a directory that has one.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its tokenizer files; those beside the configuration by default.")
    ] = None,
    show_mapping: Annotated[
        str | None,
        typer.Option(
            metavar="TREE",
            is_eager=True,
            callback=_show_mapping,
            help="Print a layout's mapping, to start one's own, and exit.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at the destination.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but errors on stderr.")] = False,
) -> None:
    """Convert a checkpoint: Hugging Face safetensors to Orbax, and back; MaxText, Tunix, gemma and other Flax trees to either.

    A Flax program's own checkpoint is an Orbax directory, a step of one (of several the latest is taken) or an item of a step.
    A mapping file is YAML or JSON, `rules: [...]`, tried in order. A rule such as
    {from: decoder/layers_{layer}/self_attention/query/kernel, to: {"layers/{layer}/self_attn/q_proj/kernel": "D N H -> D (N H)"}}
    names a leaf and the canonical tensor that it is, with its axes: {layer} there is the axis of stacked layers, a number
    the slice that is taken. More keys: value, one operation such as x * sqrt(head_dim); when, fields of config.json. Beside
    rules: roots, where the tree begins, and ignore. --show-mapping prints complete ones.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the host converts; a GPU's memory stays free
    with _errors_on_one_line():
        from jaxserve.checkpoints import hub
        from jaxserve.checkpoints.convert import convert as convert_checkpoint
        from jaxserve.checkpoints.flax_trees.checkpoint import FlaxOptions

        found = hub.resolve(source)
        is_flax = tree != "auto" or any(option is not None for option in (mapping, config, tokenizer))
        flax = FlaxOptions(tree, mapping, config, tokenizer) if is_flax else None
        options = {"dtype": dtype, "to": to, "show_progress": not quiet, "overwrite": overwrite, "flax": flax}
        summary = convert_checkpoint(found, destination, **options)
        if not quiet:
            typer.echo(f"{destination} holds {source} ({summary.layout}) for {to}", err=True)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A directory or a Hub id.")],
    *,
    write: Annotated[
        bool, typer.Option("--write", help="Record a Hugging Face directory as it is now; every later load compares.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing but errors on stderr, and nothing on stdout.")
    ] = False,
) -> None:
    """Check a checkpoint: the hash of every file, the name, shape and type of every tensor.

    The exit status is 0 if all is as it was written, 1 if not (the files are named), and 3 if the structure is sound and no
    hashes were ever recorded.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with _errors_on_one_line():
        from jaxserve.checkpoints import hub
        from jaxserve.checkpoints.verify import verify as verify_checkpoint

        found = verify_checkpoint(hub.resolve(model), write=write, show_progress=not quiet)
        if not quiet:
            typer.echo(str(found), err=found.record is None)
    if found.record is None:
        raise typer.Exit(3)


class _Writer:
    """Standard output as a stream of text, and how fast it came."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._first_s: float | None = None
        self._last_s = 0.0
        self._ends_line = True

    def write(self, text: str) -> None:
        self._last_s = time.monotonic()
        if self._first_s is None:
            self._first_s = self._last_s
        if text:
            self._ends_line = text.endswith("\n")
            sys.stdout.write(text)
            sys.stdout.flush()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the line for a person, also after Ctrl-C; a pipe gets the completion and nothing else."""
        if not self._ends_line and sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()

    def describe(self, summary: Any) -> str:
        duration_s = self._last_s - (self._first_s or self._last_s)
        rate = f", {(summary.num_completion_tokens - 1) / duration_s:.1f} tokens/s" if duration_s else ""
        cached = f" ({summary.num_cached_tokens} cached)" if summary.num_cached_tokens else ""
        return (
            f"[{summary.finish_reason}: {summary.num_prompt_tokens} prompt tokens{cached}, "
            f"{summary.num_completion_tokens} generated{rate}]"
        )


def _check_generate(endpoint: str | None, timeout_s: float | None, config: Path | None, settings: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if endpoint is not None and (given or config is not None):
        flag = given[0] if given else "--config"
        raise ConfigError(f"{flag} is about an engine in this process; with --endpoint the server has its own settings.")
    if endpoint is not None and not re.fullmatch(r"[^\s:/]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", endpoint):
        raise ConfigError(f"--endpoint must be HOST:PORT such as 127.0.0.1:8001, got {endpoint!r}.")
    if timeout_s is not None and (endpoint is None or not timeout_s > 0):
        raise ConfigError("--timeout-s must be more than 0 seconds, and needs --endpoint.")


@contextlib.contextmanager
def _engine_here(settings: dict[str, Any], config: Path | None, *, show_progress: bool) -> Iterator[Any]:
    engine_config, _ = load(settings, config)
    _log_to_stderr("warning")
    from jaxserve.build import build

    built = build(engine_config, show_progress=show_progress)
    try:
        yield built
    finally:
        built.close()


@contextlib.contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """An error is one line on stderr and exit status 1; a traceback only for who asks for it."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        text = " ".join(str(error).split()) or repr(error)
        if not isinstance(error, (JaxserveError, OSError)):
            text = f"{type(error).__name__}: {text} ({TRACEBACK_VARIABLE}=1 shows where)"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(1) from None


def _log_to_stderr(level: str) -> None:
    """Our own loggers at the level; others, of which jax is a talkative one, from WARNING up."""
    logging.basicConfig(
        stream=sys.stderr, level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for name in ("serve", "jaxserve", "kernels_pallas", "sharding"):
        logging.getLogger(name).setLevel(level.upper())


def _say_ready(model: str, endpoints: "Endpoints", seconds: float) -> None:
    endpoint = _reachable(endpoints.grpc)
    api = "" if endpoints.http is None else f", OpenAI API http://{_reachable(endpoints.http)}/v1"
    typer.echo(f"jaxserve ready: model {model}, endpoint {endpoint}{api}, started in {seconds:.1f} s")
    typer.echo(f'try: {how_to_call()} generate "{EXAMPLE_PROMPT}" --endpoint {endpoint}')
    sys.stdout.flush()


def _reachable(endpoint: str) -> str:
    for host, reachable in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if endpoint.startswith(host):
            return reachable + endpoint.removeprefix(host)
    return endpoint


def how_to_call() -> str:
    """What a person types here to run this very command: its name where that finds it, otherwise a path."""
    program = Path(sys.argv[0])
    if program.name == "cli.py":
        return f"{_shortest(Path(sys.executable))} -m serve.cli"
    found = shutil.which(program.name)
    if found is not None and Path(found).resolve() == program.resolve():
        return program.name
    return _shortest(program)


def _shortest(path: Path) -> str:
    absolute = Path(os.path.abspath(path))  # not resolved: the python of a virtual environment is a link out of it
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


if __name__ == "__main__":
    main()
