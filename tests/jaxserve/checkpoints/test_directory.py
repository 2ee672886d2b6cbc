"""Files beside the tensors: what is followed, and how JSON that is not what it should be is told."""

import os

import pytest

from jaxserve.checkpoints import directory
from jaxserve.errors import CheckpointError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text('{"key": 1}')
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["", "..", "../secret.json", "/etc/passwd", "a/../../secret.json", "a\\b", "a\0b"])
def test_names_that_lead_out_are_refused(name, root):
    with pytest.raises(CheckpointError, match="is not a file name inside the model directory"):
        directory.member(root, name)


def test_links_stay_inside(root, tmp_path):
    (root / "real.json").write_text("{}")
    os.symlink("real.json", root / "inside.json")
    assert directory.read_json(root, "inside.json") == {}
    os.symlink(tmp_path / "secret.json", root / "outside.json")
    with pytest.raises(CheckpointError, match=r"outside.json is a link to .*secret.json.*copy the file itself"):
        directory.read_json(root, "outside.json")
    os.symlink(tmp_path, root / "up")
    with pytest.raises(CheckpointError, match="outside the model directory"):
        directory.read_json(root, "up/secret.json")


def test_a_root_that_is_itself_a_link_is_followed(root, tmp_path):
    (root / "config.json").write_text("{}")
    os.symlink(root, tmp_path / "latest")
    assert directory.read_json(tmp_path / "latest", "config.json") == {}


def test_the_hub_cache_may_point_at_its_own_blobs_only(tmp_path):
    repository = tmp_path / "hub/models--org--name"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/123").write_text('{"a": 1}')
    os.symlink("../../blobs/123", snapshot / "config.json")
    assert directory.read_json(snapshot, "config.json") == {"a": 1}
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("{}")
    os.symlink("../../refs/main", snapshot / "tokenizer.json")
    with pytest.raises(CheckpointError, match="outside the model directory"):
        directory.read_sidecars(snapshot)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[]", "must hold a JSON object, it holds a list"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON that can be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
    ],
)
def test_json_that_is_not_is_one_error_with_the_file(data, message, root):
    (root / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        directory.read_json(root, "config.json")
    assert str(root / "config.json") in str(caught.value)


def test_files_that_cannot_be_read_are_named(root):
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: No such file"):
        directory.read_json(root, "config.json")
    (root / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json is not a regular file"):
        directory.read_json(root, "config.json")
    (root / "tokenizer.json").write_bytes(b"x" * 11)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 11 bytes, more than the 10 allowed"):
        directory.read_bytes(root, "tokenizer.json", 10)


def test_sidecars_are_those_of_the_list_and_never_code(root):
    for name in ("tokenizer.json", "modeling_llama.py", "README.md", "chat_template.jinja"):
        (root / name).write_text(name)
    assert directory.read_sidecars(root) == {
        "tokenizer.json": b"tokenizer.json",
        "chat_template.jinja": b"chat_template.jinja",
    }
