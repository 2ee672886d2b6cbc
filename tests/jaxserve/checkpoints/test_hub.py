"""A name becomes a directory, or one error that says why not. The Hub itself is never asked."""

import os
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxserve.checkpoints import hub, huggingface
from jaxserve.errors import ModelNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_repository(make_llama, tmp_path, monkeypatch):
    """org/name in the cache as huggingface_hub lays it out: a snapshot of links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for number, path in enumerate(sorted(make_llama(dtype="bfloat16", num_shards=3).iterdir())):
        (repository / "blobs" / f"b{number}").write_bytes(path.read_bytes())
        os.symlink(f"../../blobs/b{number}", snapshot / path.name)
    return snapshot


@pytest.fixture
def fake_hub(monkeypatch):
    """Returns a function that makes the network's answer an exception, or a directory; the cache is empty."""
    asked = []

    def fake(answer):
        def snapshot_download(model, *, revision=None, local_files_only=False, **patterns):
            asked.append((model, revision, local_files_only, patterns))
            if local_files_only:
                raise errors.LocalEntryNotFoundError("not cached")
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake


def _http(kind, status):
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=status))


def _caused(error, cause):
    error.__cause__ = cause
    return error


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert hub.resolve("~/m") == tmp_path / "m"
    with pytest.raises(ModelNotFoundError, match="revision must be left out for the local directory"):
        hub.resolve(str(tmp_path), revision="main")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ModelNotFoundError, match="is a file; give the directory"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_a_cached_repository_needs_no_network_and_loads_through_its_links(cached_repository, parameters_of, abstract_of):
    path = hub.resolve("org/name")
    assert path == cached_repository
    assert hub.resolve("org/name", revision=COMMIT) == cached_repository
    assert len(huggingface.load(path, parameters_of(path), abstract_of(path))) == len(parameters_of(path))


@pytest.mark.parametrize("gone", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_what_is_half_in_the_cache_is_not_taken(gone, cached_repository):
    """Other programs cache a config.json alone. Offline, that is the error for both."""
    (cached_repository / gone).unlink()
    with pytest.raises(ModelNotFoundError, match=r"org/name is not complete in the Hugging Face cache .*HF_HUB_OFFLINE"):
        hub.resolve("org/name")


def test_offline_and_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"org/name at revision 'v1' is not complete .*HF_HUB_OFFLINE forbids"):
        hub.resolve("org/name", revision="v1")


def test_no_network_at_all(tmp_path, monkeypatch):
    """The library's own way through a refused connection, on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelNotFoundError, match=r"not in the Hugging Face cache and could not be fetched .*check the network"
    ):
        hub.resolve("org/name")


def test_the_cache_is_asked_first_and_then_only_for_what_is_needed(fake_hub, make_llama):
    asked = fake_hub(make_llama())
    assert hub.resolve("org/name", "v1") == make_llama()
    assert [local for _, _, local, _ in asked] == [True, False]
    for model, revision, _, patterns in asked:
        assert (model, revision) == ("org/name", "v1")
        assert set(patterns["allow_patterns"]) >= {"*.safetensors", "*.json", "*.model", "*.jinja"}
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns["allow_patterns"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            _http(errors.GatedRepoError, 403),
            r"is gated: accept its terms on https://huggingface.co/org/name and set HF_TOKEN",
        ),
        (_http(errors.RepositoryNotFoundError, 404), r"is not on the Hugging Face Hub, or is private; .*HF_TOKEN"),
        (_http(errors.RevisionNotFoundError, 404), r"org/name has no revision 'v1'"),
        (_http(errors.HfHubHTTPError, 401), r"may not be read with this token \(HTTP 401\); set HF_TOKEN"),
        (_http(errors.HfHubHTTPError, 503), r"the Hugging Face Hub answered HTTP 503; try again later"),
        (
            _caused(errors.LocalEntryNotFoundError("x"), _http(errors.HfHubHTTPError, 500)),
            r"answered HTTP 500",
        ),
        (
            _caused(errors.LocalEntryNotFoundError("x"), httpx2.ConnectError("Name or service not known")),
            r"could not be fetched \(Name or service not known\); check the network",
        ),
        (_caused(errors.LocalEntryNotFoundError("x"), errors.OfflineModeIsEnabled("off")), r"HF_HUB_OFFLINE forbids"),
        (errors.HFValidationError("too long"), r"is no valid Hugging Face id: too long"),
        (OSError(28, "No space left on device"), r"No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_failure_is_one_error_with_its_remedy(answer, message, fake_hub):
    fake_hub(answer)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        hub.resolve("org/name", "v1")
    assert "\n" not in str(caught.value)


def test_a_repository_of_pickles_is_told_apart(fake_hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    fake_hub(tmp_path)
    with pytest.raises(
        ModelNotFoundError,
        match=r"lacks config.json or safetensors weights after fetching .*Other formats \(pickles, GGUF\)",
    ):
        hub.resolve("org/name")


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "../x", "org/..", "/no/such", "org/na me", "org/--x", "https://x/y"])
def test_what_is_neither_path_nor_id_is_not_looked_up(name, fake_hub):
    asked = fake_hub(RuntimeError("must not be asked"))
    if name == "":
        name = "\0"
    with pytest.raises(ModelNotFoundError, match="is neither an existing directory nor a Hugging Face id"):
        hub.resolve(name)
    assert asked == []
