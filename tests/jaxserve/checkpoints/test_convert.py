"""Conversion: there and back bit for bit, streamed, nothing executed, nothing left behind."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints import huggingface_writer, orbax_store
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints.load import load_parameters
from jaxserve.errors import CheckpointError, UnknownModelError
from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING

ROOT = Path(__file__).resolve().parents[3]


def _tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def copy_of(make_llama, tmp_path):
    def copy_of(**fields):
        return shutil.copytree(make_llama(**fields), tmp_path / "source")

    return copy_of


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer": "bytes"},
        {"dtype": "bfloat16", "is_tied": True, "tokenizer": "sentencepiece"},
        {"dtype": "float16", "rope_scaling": LLAMA3_ROPE_SCALING},
    ],
    ids=str,
)
def test_there_and_back_gives_every_file_byte_for_byte(fields, make_llama, tmp_path):
    source = make_llama(**fields)
    there = convert(source, tmp_path / "orbax", show_progress=False)
    back = convert(tmp_path / "orbax", tmp_path / "back", to="huggingface", show_progress=False)
    written = _tree(tmp_path / "back")
    assert "model.safetensors" in json.loads(written.pop("jaxserve_manifest.json"))["files"]
    assert written == _tree(source)
    assert (there.format, back.format) == ("orbax", "huggingface")
    assert there.dtype == back.dtype == fields.get("dtype", "float32")
    assert there.num_parameters == sum(tensor.size for tensor in load_file(source / "model.safetensors").values())
    assert set(there.files) == {name for name in _tree(source) if name != "model.safetensors"}


def test_several_files_there_and_back_hold_the_same_tensors(make_llama, tmp_path):
    source = make_llama(dtype="bfloat16", num_shards=3)
    convert(source, tmp_path / "orbax", show_progress=False)
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface", max_shard_bytes=30_000, show_progress=False)
    tensors = [{}, {}]
    for held, path in zip(tensors, (source, tmp_path / "back"), strict=True):
        for file in path.glob("*.safetensors"):
            held.update(load_file(file))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].tobytes() == tensors[1][name].tobytes() for name in tensors[0])


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_a_cast_is_written_and_the_configuration_says_so(to, make_llama, tmp_path, parameters_of, abstract_of):
    source = make_llama()
    summary = convert(source, tmp_path / "out", dtype="bfloat16", to=to, show_progress=False)
    assert summary.dtype == "bfloat16"
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    abstract = abstract_of(source, ml_dtypes.bfloat16)
    loaded = load_parameters(tmp_path / "out", parameters_of(source), abstract)
    direct = load_parameters(source, parameters_of(source), abstract)
    assert all(np.asarray(loaded[path]).tobytes() == np.asarray(direct[path]).tobytes() for path in abstract)


def test_both_spellings_of_the_type_are_kept_true(make_llama, tmp_path):
    source = make_llama(extra_config={"dtype": "float32"})
    convert(source, tmp_path / "out", dtype="float16", show_progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["torch_dtype"] == "float16"


def _cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "weights cut": (lambda p: _cut(p / "model.safetensors", -1), CheckpointError, "model.safetensors is not a complete"),
    "weights gone": (lambda p: (p / "model.safetensors").unlink(), CheckpointError, "is no checkpoint"),
    "config gone": (lambda p: (p / "config.json").unlink(), CheckpointError, "config.json cannot be read"),
    "config cut": (lambda p: _cut(p / "config.json", 40), CheckpointError, "config.json is not valid JSON"),
    "unknown family": (
        lambda p: _edit(p / "config.json", architectures=["MambaForCausalLM"]),
        UnknownModelError,
        r"architectures in config.json must name one of .*LlamaForCausalLM",
    ),
    "another width": (lambda p: _edit(p / "config.json", hidden_size=64), CheckpointError, "has shape"),
    "another depth": (lambda p: _edit(p / "config.json", num_hidden_layers=3), CheckpointError, "9 missing"),
    "untied": (lambda p: _edit(p / "config.json", tie_word_embeddings=True), CheckpointError, "tied"),
    "a pickle beside it": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        CheckpointError,
        "never opened",
    ),
    "a link outwards": (
        lambda p: os.symlink("/etc/hostname", p / "tokenizer.json"),
        CheckpointError,
        "outside the model directory",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_source_that_cannot_be_converted_is_one_error_and_leaves_nothing(case, copy_of, tmp_path):
    damage, error, message = DAMAGE[case]
    source = copy_of()
    damage(source)
    before = _tree(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out", show_progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert _tree(source) == before


def test_a_damaged_orbax_source_is_found_before_anything_is_written(orbax_copy, tmp_path):
    payload = max((p for p in (orbax_copy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[100] ^= 1
    payload.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{payload.name} has another sha256"):
        convert(orbax_copy, tmp_path / "out", to="huggingface", show_progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["orbax"]


def test_a_value_that_does_not_fit_stops_half_way_and_leaves_the_old_one(copy_of, make_llama, tmp_path):
    """The last tensor is the one that overflows, so most of the destination had been written."""
    source = copy_of()
    tensors = {name: tensor.copy() for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["lm_head.weight"][-1, -1] = 1e30
    save_file(tensors, source / "model.safetensors")
    convert(make_llama(), tmp_path / "out", show_progress=False)
    before = _tree(tmp_path)
    for to in ("orbax", "huggingface"):
        with pytest.raises(CheckpointError, match=r"lm_head.weight holds values beyond the range of float16"):
            convert(source, tmp_path / "out", to=to, dtype="float16", overwrite=True, show_progress=False)
        assert _tree(tmp_path) == before


@pytest.mark.parametrize(("to", "module"), [("orbax", orbax_store), ("huggingface", huggingface_writer)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupts_and_full_disks_leave_nothing(to, module, error, make_llama, tmp_path, monkeypatch):
    def write_files(root, config, files):
        raise error

    monkeypatch.setattr(module, "write_files", write_files)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected) as caught:
        convert(make_llama(), tmp_path / "out", to=to, show_progress=False)
    assert list(tmp_path.iterdir()) == []
    assert error is KeyboardInterrupt or "out cannot be written: [Errno 28] No space left" in str(caught.value)


def test_too_little_room_is_said_before_anything_is_written(make_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"has 1000 bytes free, the checkpoint needs \d+"):
        convert(make_llama(), tmp_path / "out", show_progress=False)


def test_destinations_that_are_taken_or_entangled_are_refused(copy_of, tmp_path):
    source = copy_of()
    for destination in (source, source / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="must not lie in one another"):
            convert(source, destination, overwrite=True, show_progress=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(source, tmp_path / "taken", show_progress=False)
    with pytest.raises(CheckpointError, match="to must be one of orbax, huggingface, got 'gguf'"):
        convert(source, tmp_path / "out", to="gguf", show_progress=False)
    with pytest.raises(CheckpointError, match="dtype must be one of float32, bfloat16, float16, got int8"):
        convert(source, tmp_path / "out", dtype="int8", show_progress=False)


def test_the_bar_counts_bytes_and_is_silent_off_a_terminal(make_llama, tmp_path, capsys, monkeypatch):
    convert(make_llama(), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    convert(make_llama(), tmp_path / "loud")
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "144k/144k" in shown.replace("kB", "k")
    convert(make_llama(), tmp_path / "asked", show_progress=False)
    assert capsys.readouterr().err == ""


# Nothing from a model directory is ever run.

_watched: list[tuple[str, tuple]] = []
_watching = False


def _hook(event, args):
    if _watching:
        _watched.append((event, args))


@contextlib.contextmanager
def _audit():
    """Collects audit events. A hook cannot be removed, so it is added once and asks a flag."""
    global _watching
    if not hasattr(_audit, "is_hooked"):
        sys.addaudithook(_hook)
        _audit.is_hooked = True
    _watched.clear()
    _watching = True
    try:
        yield _watched
    finally:
        _watching = False


def _canary(path):
    """A pickle that creates a file when it is loaded."""
    code = f"open({str(path)!r}, 'w').close()".encode()
    return b"\x80\x02cbuiltins\nexec\nX" + len(code).to_bytes(4, "little") + code + b"\x85R."


def test_no_pickle_and_no_custom_code_is_run(copy_of, tmp_path):
    source = copy_of(extra_config={"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "trust_remote_code": True})
    sung = tmp_path / "sung"
    (source / "modeling_evil.py").write_text(f"open({str(sung)!r}, 'w').close()")
    (source / "pytorch_model.bin").write_bytes(_canary(sung))
    with _audit() as events:
        convert(source, tmp_path / "out", show_progress=False)
        (source / "model.safetensors").write_bytes(_canary(sung))
        with pytest.raises(CheckpointError, match="is a pickle"):
            convert(source, tmp_path / "never", show_progress=False)
        (source / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="never opened"):
            convert(source, tmp_path / "never", show_progress=False)
    assert not sung.exists()
    assert not any(event == "pickle.find_class" for event, _ in events)
    opened = {str(args[0]) for event, args in events if event == "open"}
    assert str(source / "config.json") in opened
    assert not any(name.endswith((".py", ".bin")) and name.startswith(str(source)) for name in opened)
    imported = {args[0] for event, args in events if event == "import"}
    assert not any("evil" in name for name in imported)
    assert not any(p.suffix in (".py", ".bin") for p in (tmp_path / "out").iterdir())


def test_the_canary_does_sing(tmp_path):
    with _audit() as events:
        pickle.loads(_canary(tmp_path / "sung"))
    assert (tmp_path / "sung").exists()
    assert any(event == "pickle.find_class" for event, _ in events)


# In a process of its own, with a checkpoint that takes a while to write.

_CHILD = """
import os, signal, sys, threading
from jaxserve.checkpoints import orbax_store
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints import orbax_arrays
import jax; jax.devices()
source, destination, to, group = sys.argv[1:]
orbax_store.GROUP_BYTES = int(group)
save = orbax_arrays.write
def interrupted(*args):
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    save(*args)
orbax_arrays.write = interrupted
convert(source, destination, to=to)
"""


def _child(*args):
    command = [sys.executable, "-c", _CHILD, *map(str, args)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def large(make_llama):
    """About 300 MB in bfloat16, the largest tensor 33 MB."""
    return make_llama(
        hidden_size=1024, num_layers=10, num_heads=16, num_kv_heads=8, head_dim=64, intermediate_size=2816, vocab_size=16000,
        dtype="bfloat16", num_shards=2,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_orbax_writes_leaves_nothing(large, tmp_path):
    done = _child(large, tmp_path / "out", "orbax", 200 << 20)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []
