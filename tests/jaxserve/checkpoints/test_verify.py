"""`verify` and every load find any flipped byte, any missing file and any file too many, and name it."""

import hashlib
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import EngineConfig
from jaxserve.build import build
from jaxserve.checkpoints import digests, manifest, orbax_store, records
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints.load import load_parameters
from jaxserve.checkpoints.verify import verify
from jaxserve.errors import CheckpointError, UnknownModelError
from jaxserve.model_source import find_model

FIELDS = {"dtype": "bfloat16", "tokenizer": "bytes"}


@pytest.fixture(scope="module")
def checkpoints(make_llama, tmp_path_factory):
    """{how its files are recorded: directory}. Not to be changed by tests."""
    root = tmp_path_factory.mktemp("recorded")
    source = make_llama(**FIELDS)
    convert(source, root / "orbax", show_progress=False)
    convert(root / "orbax", root / "huggingface", to="huggingface", max_shard_bytes=30_000, show_progress=False)
    _cache(make_llama(**FIELDS, num_shards=2), root / "hub")
    return {
        "manifest.json": root / "orbax",
        "jaxserve_manifest.json": root / "huggingface",
        "the Hugging Face cache": root / "hub/models--org--name/snapshots/abc",
    }


def _cache(source, hub):
    """Lays a repository out as huggingface_hub does: large files under their sha256, small ones as git names them."""
    blobs, snapshot = hub / "models--org--name/blobs", hub / "models--org--name/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        data = path.read_bytes()
        is_large = path.suffix == ".safetensors"
        name = hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (blobs / name).write_bytes(data)
        os.symlink(f"../../blobs/{name}", snapshot / path.name)


@pytest.fixture(params=["manifest.json", "jaxserve_manifest.json", "the Hugging Face cache"])
def recorded(request, checkpoints, tmp_path):
    """(what records the files, a copy of such a directory)."""
    path = checkpoints[request.param]
    if request.param == "the Hugging Face cache":
        shutil.copytree(path.parents[2], tmp_path / "hub", symlinks=True)
        return request.param, tmp_path / "hub/models--org--name/snapshots/abc"
    return request.param, shutil.copytree(path, tmp_path / "model")


def _files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def _entrances(parameters, abstract):
    """Every way in: the command's, a researcher's, and the engine's, which reads config.json and the tokenizer first."""
    return {
        "verify": lambda path: verify(path, show_progress=False),
        "load_parameters": lambda path: load_parameters(path, parameters, abstract),
        "LLM": lambda path: build(EngineConfig(model=str(path), max_model_len=16), show_progress=False),
    }


def _damage(original, generator):
    """A flip of one bit at the beginning, in the middle, at the end and anywhere; a byte fewer, a byte more, nothing at all."""
    for byte in {0, len(original) // 2, len(original) - 1, generator.integers(len(original))} if original else ():
        flipped = bytearray(original)
        flipped[byte] ^= 1 << generator.integers(8)
        yield bytes(flipped)
    yield original + b"\0"
    if original:
        yield original[:-1]
        yield b""


@pytest.mark.parametrize("takes_turns", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_any_damage_to_any_file_is_found_and_named_by_verify_and_every_load(
    recorded, parameters_of, abstract_of, takes_turns
):
    """`verify` sees every damage; the loads, which all begin with it, take turns but in the slow tests."""
    _, root = recorded
    generator = np.random.default_rng(0)
    entrances = _entrances(parameters_of(root), abstract_of(root))
    turns = itertools.cycle(sorted(entrances.keys() - {"verify"}))
    names = _files(root)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} < set(names)
    for name in names:
        path = root / name
        original = path.read_bytes()
        for data in _damage(original, generator):
            path.write_bytes(data)
            for entrance in ("verify", next(turns)) if takes_turns else entrances:
                with pytest.raises(CheckpointError) as caught:
                    entrances[entrance](root)
                assert name in str(caught.value), (entrance, name)
                assert "\n" not in str(caught.value)
        path.write_bytes(original)
    entrances["verify"](root)
    entrances["load_parameters"](root)


def test_a_missing_file_is_named(recorded, parameters_of, abstract_of):
    source, root = recorded
    if source == "the Hugging Face cache":
        (root / "model-00001-of-00002.safetensors").unlink()  # the cache does not say what else there should be
        with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is missing"):
            verify(root, show_progress=False)
        return
    entrances = _entrances(parameters_of(root), abstract_of(root))
    for name in _files(root):
        if name == "jaxserve_manifest.json":
            continue
        path = root / name
        path.rename(root.parent / "away")
        for entrance, attempt in entrances.items():
            with pytest.raises(CheckpointError) as caught:
                attempt(root)
            assert name in str(caught.value), (entrance, name)
        (root.parent / "away").rename(path)


def test_a_file_that_would_be_read_and_was_not_there_is_named(recorded, parameters_of, abstract_of):
    source, root = recorded
    entrances = _entrances(parameters_of(root), abstract_of(root))
    payload = "params/state/d/0" if source == "manifest.json" else "model.safetensors"
    for name in ("chat_template.jinja", "added_tokens.json", payload):
        (root / name).write_text("{}")
        for attempt in entrances.values():
            with pytest.raises(CheckpointError, match=rf"{name} is not in {source}, but would be read"):
                attempt(root)
        (root / name).unlink()


def test_files_that_nobody_reads_are_listed_and_no_damage(recorded):
    source, root = recorded
    (root / "README.md").write_text("a model")
    (root / "modeling_own.py").write_text("1 / 0")
    found = verify(root, show_progress=False)
    assert found.record == source
    assert found.unread == ("README.md", "modeling_own.py")
    assert "Not checked, as no load reads them: README.md, modeling_own.py." in str(found)


def test_every_damaged_file_is_named_at_once(checkpoints, tmp_path):
    root = shutil.copytree(checkpoints["jaxserve_manifest.json"], tmp_path / "m")
    names = [name for name in _files(root) if name != manifest.HUGGINGFACE_NAME]
    for name in names:
        data = bytearray((root / name).read_bytes())
        data[-2] ^= 1
        (root / name).write_bytes(data)
    (root / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(root, show_progress=False)
    assert len(names) > 6
    for name in names:
        assert f"{name} {'is missing' if name == 'tokenizer.json' else 'has another sha256'}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "was", "is_now"),
    [
        ("config.json", b'"hidden_act": "silu"', b'"hidden_act": "sigu"'),
        ("config.json", b'"LlamaForCausalLM"', b'"MlamaForCausalLM"'),
        ("tokenizer.json", b'"BPE"', b'"BPF"'),
        ("tokenizer_config.json", b'"eos_token": ', b'"eos_token"; '),
    ],
)
def test_damage_is_told_as_damage_before_anything_is_made_of_it(name, was, is_now, checkpoints, tmp_path):
    """Otherwise it would be a setting that is not supported, or a tokenizer that cannot be read."""
    root = shutil.copytree(checkpoints["jaxserve_manifest.json"], tmp_path / "m")
    data = (root / name).read_bytes()
    assert was in data
    (root / name).write_bytes(data.replace(was, is_now))
    with pytest.raises(CheckpointError, match=rf"{name} has another sha256"):
        build(EngineConfig(model=str(root)), show_progress=False)


def test_a_tokenizer_of_another_directory_is_checked_too(checkpoints, tmp_path):
    other = shutil.copytree(checkpoints["manifest.json"], tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<s>", b"<t>", 1))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has another sha256"):
        find_model(str(checkpoints["manifest.json"]), str(other))


def test_a_directory_from_elsewhere_has_nothing_to_compare_with_until_it_is_recorded(make_llama, tmp_path):
    root = shutil.copytree(make_llama(**FIELDS), tmp_path / "model")
    found = verify(root, show_progress=False)
    assert found.record is None
    assert "there is nothing to compare the files with" in str(found)
    assert verify(root, write=True, show_progress=False).record == manifest.HUGGINGFACE_NAME
    assert verify(root, show_progress=False).record == manifest.HUGGINGFACE_NAME
    assert manifest.read(root, manifest.HUGGINGFACE_NAME).files.keys() == set(_files(root)) - {manifest.HUGGINGFACE_NAME}
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(CheckpointError, match=r"config.json has .*jaxserve verify --write"):
        verify(root, show_progress=False)
    verify(root, write=True, show_progress=False)
    assert verify(root, show_progress=False).record == manifest.HUGGINGFACE_NAME


def test_only_hugging_face_directories_are_recorded(checkpoints):
    with pytest.raises(CheckpointError, match=r"has its manifest.json already"):
        verify(checkpoints["manifest.json"], write=True, show_progress=False)
    with pytest.raises(CheckpointError, match=r"is in the Hugging Face cache, which names files by their hash"):
        verify(checkpoints["the Hugging Face cache"], write=True, show_progress=False)


def test_the_structure_is_checked_with_and_without_a_record(make_llama, tmp_path):
    root = shutil.copytree(make_llama(**FIELDS), tmp_path / "model")
    tensors = load_file(root / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, root / "model.safetensors")
    for write in (False, True):
        with pytest.raises(CheckpointError, match=r"1 missing \(model.norm.weight\)"):
            verify(root, write=write, show_progress=False)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnknownModelError, match="architectures in config.json"):
        verify(root, show_progress=False)
    assert manifest.HUGGINGFACE_NAME not in _files(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update(more=((1,), "float32")),
            r"params holds nothing as more, manifest.json says \(\(1,\), 'float32'\)",
        ),
        (lambda p: p.pop("b"), r"params holds \(\(3,\), 'float32'\) as b, manifest.json says nothing"),
        (lambda p: p.update(a=((2, 4), "float32")), r"holds \(\(4, 2\), 'float32'\) as a, .* says \(\(2, 4\), 'float32'\)"),
        (lambda p: p.update(a=((4, 2), "float16")), r"holds \(\(4, 2\), 'float32'\) as a, .* says \(\(4, 2\), 'float16'\)"),
    ],
)
def test_a_manifest_that_lies_about_its_payload_is_refused(change, message, tmp_path):
    """Orbax answers an unknown name, or another shape, with the question."""
    params = {"a": np.ones((4, 2), np.float32), "b": np.ones(3, np.float32)}
    orbax_store.save(tmp_path / "m", params, {})
    (tmp_path / "m" / manifest.NAME).unlink()
    claimed = {name: (array.shape, array.dtype.name) for name, array in params.items()}
    change(claimed)
    manifest.write(tmp_path / "m", "somebody", claimed, 44)
    with pytest.raises(CheckpointError, match=message):
        orbax_store.OrbaxSource(tmp_path / "m")


def test_a_path_relative_to_the_working_directory_will_do(checkpoints, parameters_of, abstract_of, monkeypatch):
    root = checkpoints["manifest.json"]
    monkeypatch.chdir(root.parent)
    verify("orbax", show_progress=False)
    assert len(load_parameters("orbax", parameters_of(root), abstract_of(root))) == len(parameters_of(root))


def test_the_bar_counts_the_bytes_of_all_files(checkpoints, capsys, monkeypatch):
    told = []
    root = checkpoints["manifest.json"]
    records.check(root, told.append)
    assert sum(told) == sum((root / name).stat().st_size for name in records.readable(root))
    verify(root)
    assert capsys.readouterr().err == ""


def test_files_larger_than_a_block_are_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_BLOCK_BYTES", 7)
    data = bytes(range(100))
    (tmp_path / "a").write_bytes(data)
    assert digests.of_files(tmp_path, ["a"])["a"] == digests.Digest("sha256", hashlib.sha256(data).hexdigest(), 100)
