"""A destination appears whole or stays as it was."""

import os

import pytest

from jaxserve.checkpoints.staging import staged
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
