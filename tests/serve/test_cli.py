import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import jaxserve
from jaxserve.checkpoints.flax_trees.checkpoint import FlaxOptions
from jaxserve.errors import CheckpointError
from serve import cli, lifecycle
from serve.doors import Endpoints

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture
def run():
    def invoke(*arguments, **options):
        return CliRunner().invoke(cli.app, list(arguments), **options)

    return invoke


@pytest.fixture
def configs(built, monkeypatch):
    """The engine configurations that a fake `jaxserve.build.build` has been called with."""
    seen = []

    def build(config, *, show_progress=True):
        seen.append(config)
        return built

    monkeypatch.setitem(sys.modules, "jaxserve.build", SimpleNamespace(build=build))
    return seen


def in_process(code, *arguments):
    """Runs Python code in a fresh interpreter at the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["generate", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    code = (
        "import sys; from serve.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'grpc', 'pydantic_settings', 'yaml', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    status, output, errors = in_process(code, *arguments)
    assert status == 0, errors
    assert output


def test_version(run):
    assert run("--version").output == f"jaxserve {jaxserve.__version__}\n"


def test_local_generation_streams_the_text_and_nothing_else_to_stdout(run, configs, client):
    result = run("generate", "abc", "--max-tokens", "40", "--model", "toy", "--max-num-seqs", "2")
    assert result.exit_code == 0
    assert result.stdout == "".join(chr(32 + i) for i in range(40))
    assert result.stderr.startswith("[length: 3 prompt tokens (3 cached), 40 generated")
    assert [(config.model, config.max_num_seqs) for config in configs] == [("toy", 2)]
    assert client.is_closed


def test_generate_is_greedy_and_128_tokens_unless_told_otherwise(run, configs, client):
    assert len(run("generate", "abc", "-q").stdout) == 128
    sampling = client.submitted[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0.0, 128, None)


def test_every_sampling_flag_arrives(run, configs, client):
    flags = "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 --stop x --stop y --min-tokens 2"
    assert run("generate", "abc", *flags.split(), "--ignore-eos").exit_code == 0
    sampling = client.submitted[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.9, 4)
    assert (sampling.min_p, sampling.seed, sampling.stop, sampling.min_tokens) == (0.1, 7, ("x", "y"), 2)
    assert sampling.ignore_eos


def test_quiet_says_nothing_on_stderr(run, configs):
    assert run("generate", "abc", "--quiet").stderr == ""


def test_the_prompt_may_come_from_standard_input(run, configs, client):
    assert run("generate", "-", input="from a pipe").exit_code == 0
    assert client.submitted[0].prompt == "from a pipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--top-p", "2"], "error: top_p must be in (0, 1], got 2.0.\n"),
        (["generate", ""], "error: prompt must be at least one token long, got ().\n"),
        (["generate", "a", "--endpoint", "h:1", "--model", "toy"], "error: --model is about an engine in this process; "),
        (["generate", "a", "--endpoint", "h:1", "--config", "x"], "error: --config is about an engine in this process; "),
        (["generate", "a", "--timeout-s", "3"], "error: --timeout-s must be more than 0 seconds, and needs --endpoint.\n"),
        (["generate", "a", "--page-size", "7"], "error: page_size must be a power of two in [8, 256], got 7.\n"),
        (["serve", "--grpc-port", "70000"], "error: grpc_port must be in [0, 65535], got 70000.\n"),
        (["serve", "--config", "nowhere.yaml"], "error: --config nowhere.yaml cannot be read: "),
    ],
)
def test_an_error_is_one_line_on_stderr_and_status_1(run, configs, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_an_error_in_the_middle_keeps_what_was_streamed(run, configs, client):
    client.fail_at = 5
    client.error = CheckpointError("weights are gone")
    result = run("generate", "abc")
    assert (result.exit_code, result.stdout, result.stderr) == (1, ' !"#$', "error: weights are gone\n")


def test_an_unforeseen_error_says_how_to_see_more(run, configs, client, monkeypatch):
    client.fail_at = 0
    client.error = ZeroDivisionError("nobody\nexpected this")
    result = run("generate", "abc")
    assert result.stderr == "error: ZeroDivisionError: nobody expected this (JAXSERVE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("JAXSERVE_TRACEBACK", "1")
    assert isinstance(run("generate", "abc").exception, Exception)


def test_ctrl_c_aborts_and_exits_with_130(run, configs, client, monkeypatch):
    def interrupt(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._Writer, "write", interrupt)
    result = run("generate", "abc", "--max-tokens", "4000")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert len(client.aborted) == 1
    assert client.is_closed


def test_unknown_flags_and_commands_are_wrong_usage(run):
    for arguments in (["serve", "--max-modle-len", "3"], ["explode"], ["generate"]):
        assert run(*arguments).exit_code == 2


def test_convert_finds_its_source_and_passes_its_arguments(run, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxserve.checkpoints.hub.resolve", lambda name: Path("found") / name)

    def convert(*arguments, **options):
        seen.append((arguments, options))
        return SimpleNamespace(layout="maxtext tree of step 3")

    monkeypatch.setitem(sys.modules, "jaxserve.checkpoints.convert", SimpleNamespace(convert=convert))
    assert run("convert", "SRC", "DST").stderr == "DST holds SRC (maxtext tree of step 3) for orbax\n"
    assert run("convert", "SRC", "DST", "--dtype", "bfloat16", "--to", "huggingface", "--overwrite", "-q").output == ""
    assert run("convert", "SRC", "DST", "-q", "--mapping", "m.yaml", "--config", "c", "--tokenizer", "t").output == ""
    paths = (Path("found/SRC"), Path("DST"))
    flax = FlaxOptions("auto", Path("m.yaml"), Path("c"), Path("t"))
    assert seen == [
        (paths, {"dtype": None, "to": "orbax", "show_progress": True, "overwrite": False, "flax": None}),
        (paths, {"dtype": "bfloat16", "to": "huggingface", "show_progress": False, "overwrite": True, "flax": None}),
        (paths, {"dtype": None, "to": "orbax", "show_progress": False, "overwrite": False, "flax": flax}),
    ]


def test_verify_tells_apart_what_is_sound_what_is_damaged_and_what_cannot_be_told(run, tmp_path):
    from jaxserve.testing.tiny_checkpoint import write_tiny_llama

    path = write_tiny_llama(tmp_path / "model")
    result = run("verify", str(path))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "there is nothing to compare the files with" in result.stderr
    assert result.stderr.count("\n") == 1
    assert run("verify", str(path), "--quiet").output == ""
    for arguments in (["--write"], []):
        result = run("verify", str(path), *arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(f"{path}: 21 tensors, 3 files of ")
        assert result.stdout.endswith(" are as jaxserve_manifest.json says.\n")
    (path / "config.json").write_text("{}")
    result = run("verify", str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {path}: config.json has 2 bytes instead of ")
    assert result.stderr.count("\n") == 1
    assert run("verify", str(tmp_path / "nowhere")).exit_code == 1


def test_serve_merges_its_settings_and_exits_with_the_lifecycles_status(run, configs, built, monkeypatch, tmp_path):
    seen = []

    async def fake_run(build, config, on_ready):
        assert build() is built
        seen.append(config)
        on_ready("toy", Endpoints("0.0.0.0:8001", "0.0.0.0:8000"), 1.25)
        return 7

    monkeypatch.setattr(lifecycle, "run", fake_run)
    monkeypatch.setattr(lifecycle, "leave", sys.exit)
    file = tmp_path / "serve.yaml"
    file.write_text("model: toy\ngrpc_port: 1\nlog_level: error")
    result = run("serve", "--config", str(file), "--grpc-port", "2", "--no-reflection")
    assert result.exit_code == 7
    assert configs[0].model == "toy"
    assert (seen[0].grpc_port, seen[0].reflection, seen[0].log_level) == (2, False, "error")
    first, second = result.stdout.splitlines()
    assert (
        first == "jaxserve ready: model toy, endpoint 127.0.0.1:8001, OpenAI API http://127.0.0.1:8000/v1, started in 1.2 s"
    )
    assert second.startswith("try: ")
    assert second.endswith(' generate "def fib(n):" --endpoint 127.0.0.1:8001')


def test_how_to_call_is_what_the_shell_finds_or_a_path(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "jaxserve"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert cli.how_to_call() == "jaxserve"
    monkeypatch.setenv("PATH", "/usr/bin")
    assert cli.how_to_call() == "bin/jaxserve"
    monkeypatch.chdir("/")
    assert cli.how_to_call() == str(program).removeprefix("/")
    monkeypatch.setattr(sys, "argv", [cli.__file__])
    assert cli.how_to_call().endswith("python -m serve.cli")


@pytest.mark.parametrize("endpoint", ["", "nonsense", "http://127.0.0.1:8001", "host:port", ":8001"])
def test_an_endpoint_is_a_host_and_a_port(run, endpoint):
    result = run("generate", "x", "--endpoint", endpoint)
    assert result.exit_code == 1
    assert "--endpoint must be HOST:PORT" in result.stderr


def test_a_prompt_of_broken_bytes_is_refused(run):
    result = run("generate", "\udcff", "--endpoint", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "must be valid UTF-8" in result.stderr
