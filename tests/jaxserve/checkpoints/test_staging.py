"""A destination appears whole or stays as it was."""

import errno
import os
import subprocess
import sys

import pytest

from jaxserve.checkpoints import staging
from jaxserve.checkpoints.staging import clear_abandoned, is_staging, staged
from jaxserve.errors import CheckpointError


def _tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path / "model"


def test_it_appears_at_the_end(tmp_path):
    with staged(tmp_path / "model") as root:
        (root / "a").write_text("1")
        assert root.parent == tmp_path
        assert not (tmp_path / "model").exists()
    assert _tree(tmp_path) == {"model/a": b"1"}


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "model").mkdir()
    with staged(tmp_path / "model") as root:
        (root / "a").write_text("1")
    assert _tree(tmp_path) == {"model/a": b"1"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_things_as_they_were(error, overwrite, checkpoint, tmp_path):
    destination = checkpoint if overwrite else tmp_path / "other"
    with pytest.raises(error), staged(destination, overwrite=overwrite) as root:
        (root / "a").write_text("1")
        raise error
    assert _tree(tmp_path) == {"model/config.json": b"{}"}


def test_a_failing_rename_puts_the_old_one_back(checkpoint, tmp_path):
    with (
        pytest.raises(CheckpointError, match="model cannot be written: .*No such file"),
        staged(checkpoint, overwrite=True) as root,
    ):
        root.rmdir()
    assert _tree(tmp_path) == {"model/config.json": b"{}"}


def test_overwriting_replaces_all_of_a_checkpoint(checkpoint, tmp_path):
    with staged(checkpoint, overwrite=True) as root:
        (root / "a").write_text("1")
    assert _tree(tmp_path) == {"model/a": b"1"}


def test_a_destination_that_is_taken_is_refused_before_and_after(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="exists and is not empty; choose another, or pass --overwrite"):
        staged(checkpoint).__enter__()
    with pytest.raises(CheckpointError, match="exists and is not empty"), staged(tmp_path / "late") as root:
        (root / "a").write_text("1")
        (tmp_path / "late").mkdir()
        (tmp_path / "late/someone").write_text("else's")
    assert _tree(tmp_path) == {"model/config.json": b"{}", "late/someone": b"else's"}


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"does not look like a checkpoint .* not overwritten"):
        staged(tmp_path / "home", overwrite=True).__enter__()
    (tmp_path / "file").write_text("x")
    os.symlink(tmp_path / "home", tmp_path / "link")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="is not a plain directory"):
            staged(tmp_path / name, overwrite=True).__enter__()
    with pytest.raises(CheckpointError, match=r"parent directory does not exist; create .*nowhere first"):
        staged(tmp_path / "nowhere/model").__enter__()


def test_everything_is_on_the_disk_before_the_name_changes(checkpoint, tmp_path, monkeypatch):
    """And the new name is, before the writer is told that all is well."""
    steps = []
    fsync, exchange = os.fsync, staging._exchange
    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(staging, "_exchange", lambda one, other: steps.append("exchange") or exchange(one, other))
    with staged(checkpoint, overwrite=True) as root:
        (root / "params").mkdir()
        for name in ("config.json", "params/0", "tokenizer.json"):
            (root / name).write_text(name)
    assert steps == ["0", "params", "tokenizer.json", "config.json", root.name, "exchange", tmp_path.name]


def test_names_are_exchanged_in_one_step_where_the_system_can(checkpoint, monkeypatch):
    monkeypatch.setattr(os, "rename", None)
    with staged(checkpoint, overwrite=True) as root:
        (root / "a").write_text("1")
        monkeypatch.setattr(type(root), "rename", None)
    assert _tree(checkpoint) == {"a": b"1"}


@pytest.mark.parametrize("fails", [False, True])
def test_two_steps_do_where_it_cannot(fails, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    if not fails:
        with staged(checkpoint, overwrite=True) as root:
            (root / "a").write_text("1")
        assert _tree(tmp_path) == {"model/a": b"1"}
        return
    with pytest.raises(CheckpointError, match="cannot be written"), staged(checkpoint, overwrite=True) as root:
        monkeypatch.setattr(staging, "_flush", lambda root: root.rmdir())
    assert _tree(tmp_path) == {"model/config.json": b"{}"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM])
def test_only_a_system_that_cannot_exchange_falls_back(number, tmp_path, monkeypatch):
    def refuse(*arguments):
        staging.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *args, **options: type("C", (), {"renameat2": staticmethod(refuse)}))
    if number == errno.EINVAL:
        assert not staging._exchange(tmp_path / "a", tmp_path / "b")
    else:
        with pytest.raises(PermissionError):
            staging._exchange(tmp_path / "a", tmp_path / "b")


_WRITER = """
import sys
from pathlib import Path
from jaxserve.checkpoints.staging import staged
with staged(Path(sys.argv[1])) as root:
    (root / "config.json").write_text("{}")
    print(root.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "model")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        name = writer.stdout.readline().strip()
        others = [".tmp-model-x-0123abcd", ".tmp-other-0123abcd", ".tmp-model-0123abc", "model-0123abcd"]
        for other in (*others, ".old-model-0123abcd"):
            (tmp_path / other).mkdir()
        clear_abandoned(tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, *others])
        assert is_staging(tmp_path / name)
        writer.kill()
        writer.wait()
        clear_abandoned(tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_the_files_that_make_a_checkpoint_go_first(checkpoint, monkeypatch):
    """A kill in the middle of removing an old checkpoint leaves nothing that anybody takes for a model."""
    monkeypatch.setattr(staging.shutil, "rmtree", lambda path, ignore_errors: None)
    (checkpoint / "model.safetensors").write_text("x")
    staging._discard(checkpoint)
    assert _tree(checkpoint) == {"model.safetensors": b"x"}
