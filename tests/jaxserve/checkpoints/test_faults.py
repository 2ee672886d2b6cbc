"""What can be wrong with a checkpoint, times every way to it: one clear error, nothing written, nothing run.

Directories here have no record of hashes, or a manifest that agrees with the fault: what is damaged is found before (see
test_verify), this is about checkpoints that somebody made so.
"""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jaxserve.checkpoints import manifest
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints.load import load_parameters
from jaxserve.checkpoints.verify import verify
from jaxserve.errors import CheckpointError, UnknownModelError
from jaxserve.models.weights import flatten, unflatten
from serve import cli

ROOT = Path(__file__).resolve().parents[3]
NORM = "model.norm.weight"
MAX_MESSAGE = 600


def _tree(root):
    return {p.relative_to(root).as_posix(): p.is_file() and p.read_bytes() for p in root.rglob("*") if not p.is_fifo()}


# Faults of a Hugging Face directory: (what is done to it, pattern of the message).


def _tensors(change):
    def damage(root):
        tensors = {name: tensor.copy() for name, tensor in load_file(root / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})

    return damage


def _header(change):
    """Rewrites the header; `change` takes its text or, if it is a dict, the parsed header."""

    def damage(root):
        data = (root / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = change(json.loads(data[8 : 8 + length]))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        (root / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def _entry(**fields):
    return _header(lambda header: header | {NORM: header[NORM] | fields})


def _offsets(move):
    def change(header):
        begin, end = header[NORM]["data_offsets"]
        return header | {NORM: header[NORM] | {"data_offsets": move(begin, end)}}

    return _header(change)


def _weights(data):
    return lambda root: (root / "model.safetensors").write_bytes(data)


def _replaced(make):
    def damage(root):
        (root / "model.safetensors").unlink()
        make(root / "model.safetensors")

    return damage


def _config(**fields):
    return lambda root: (root / "config.json").write_text(
        json.dumps(json.loads((root / "config.json").read_text()) | fields)
    )


def _cut(root):
    os.truncate(root / "model.safetensors", (root / "model.safetensors").stat().st_size - 1)


def _sparse_header(length):
    """A file that is long enough for the header that it announces, without occupying it."""

    def make(path):
        path.write_bytes(struct.pack("<Q", length) + b"{")
        os.truncate(path, 8 + length)

    return _replaced(make)


def _pickle(sung):
    code = f"open({str(sung)!r}, 'w').close()".encode()
    return b"\x80\x02cbuiltins\nexec\nX" + len(code).to_bytes(4, "little") + code + b"\x85R."


SUNG = Path("/tmp/jaxserve-test-a-pickle-was-run")  # never made; each test looks

INCOMPLETE = r"model\.safetensors is not a complete safetensors file"
HUGGINGFACE = {
    "truncated": (_cut, INCOMPLETE),
    "empty": (_weights(b""), INCOMPLETE),
    "missing tensor": (_tensors(lambda t: t.pop(NORM)), rf"1 missing \({NORM}\)"),
    "extra tensor": (_tensors(lambda t: t.update(surprise=np.zeros(2, np.float32))), r"1 unknown \(surprise\)"),
    "wrong shape": (
        _tensors(lambda t: t.update({NORM: np.zeros(31, np.float32)})),
        rf"{NORM} has shape \(31,\), the configuration says \(32,\)",
    ),
    "wrong rank": (_tensors(lambda t: t.update({NORM: np.zeros((1, 32), np.float32)})), rf"{NORM} has shape \(1, 32\)"),
    **{
        f"dtype {name}": (
            _tensors(lambda t, dtype=dtype: t.update({NORM: np.zeros(32, dtype)})),
            rf"model\.safetensors: {NORM} has dtype {name}; allowed are F32, BF16, F16; start from",
        )
        for name, dtype in {"I64": np.int64, "BOOL": np.bool_, "U8": np.uint8, "F64": np.float64}.items()
    },
    "dtype F8": (
        lambda root: (_tensors(lambda t: t.update({NORM: np.zeros(32, np.uint8)}))(root), _entry(dtype="F8_E4M3")(root)),
        rf"{NORM} has dtype F8_E4M3; allowed are",
    ),
    "unknown dtype": (_entry(dtype="F99"), INCOMPLETE),
    "unknown architecture": (_config(architectures=["MambaForCausalLM"]), r"architectures in config.json must name one of"),
    "no architecture": (_config(architectures=None), r"architectures in config.json must name one of"),
    "overlapping offsets": (_offsets(lambda b, e: [b - 4, e - 4]), INCOMPLETE),
    "negative offsets": (_offsets(lambda b, e: [-128, 0]), INCOMPLETE),
    "swapped offsets": (_offsets(lambda b, e: [e, b]), INCOMPLETE),
    "offsets beyond the end": (_offsets(lambda b, e: [b + (1 << 40), e + (1 << 40)]), INCOMPLETE),
    "offsets that are no integers": (_offsets(lambda b, e: [0.5, 128.5]), INCOMPLETE),
    "offsets beyond 64 bits": (_offsets(lambda b, e: [1 << 64, (1 << 64) + 128]), INCOMPLETE),
    "shape and offsets disagree": (_entry(shape=[33]), INCOMPLETE),
    "negative shape": (_entry(shape=[-32]), INCOMPLETE),
    "shape that overflows": (_entry(shape=[2**62, 2**62]), INCOMPLETE),
    "a hole": (_header(lambda h: {name: entry for name, entry in h.items() if name != NORM}), INCOMPLETE),
    "a name twice": (
        _header(lambda h: json.dumps(h)[:-1].encode() + f', "{NORM}": {json.dumps(h[NORM])}}}'.encode()),
        rf"model\.safetensors \(header\): the key '{NORM}' is there twice",
    ),
    "a header of 2^40 bytes": (_weights(struct.pack("<Q", 1 << 40) + b"{"), INCOMPLETE),
    "a header of 2^63 bytes": (_weights(struct.pack("<Q", 1 << 63) + b"{"), INCOMPLETE),
    "a header of 100 MB": (_sparse_header(100_000_000), rf"{INCOMPLETE}: .* header has 100000000 bytes, more than the"),
    "a header nested deeply": (_header(lambda h: b'{"x":' * 100_000 + b"1" + b"}" * 100_000), INCOMPLETE),
    "NaN in the header": (
        _header(lambda h: json.dumps(h).encode().replace(b'"shape": [32]', b'"shape": [NaN]')),
        INCOMPLETE,
    ),
    "metadata that is no text": (_header(lambda h: h | {"__metadata__": {"format": {"a": [1]}}}), INCOMPLETE),
    "a header that is a list": (_header(lambda h: b"[" + json.dumps(h).encode() + b"]"), INCOMPLETE),
    "a header that is not UTF-8": (_header(lambda h: b'{"\xff\xfe": 1}'), INCOMPLETE),
    "a pickle": (
        _weights(_pickle(SUNG)),
        r"model\.safetensors is a pickle, .*never opened.*Convert it to safetensors first",
    ),
    "a zip": (_weights(b"PK\x03\x04" + b"\0" * 60), r"model\.safetensors is a zip archive .*never opened"),
    "pickles alone": (
        lambda root: (root / "model.safetensors").unlink() or (root / "pytorch_model.bin").write_bytes(_pickle(SUNG)),
        r"weights as pickles \(pytorch_model.bin\), .*never opened.*Convert it to safetensors first",
    ),
    "a named pipe": (_replaced(os.mkfifo), r"model\.safetensors is not a regular file"),
    "a directory": (_replaced(os.mkdir), r"model\.safetensors is not a regular file"),
    "a link outwards": (_replaced(lambda path: path.symlink_to("/etc/hostname")), "outside the model directory"),
    "config not JSON": (lambda root: (root / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config nested deeply": (
        lambda root: (root / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
        r"config\.json is not JSON that can be read",
    ),
}


# Faults of an Orbax directory, with a manifest that was made for it.


def _payload(change):
    def damage(root):
        leaves = flatten(ocp.load(str(root / "params")))
        change(leaves)
        shutil.rmtree(root / "params")
        ocp.save(str(root / "params"), unflatten(leaves))
        specs = {path: (leaf.shape, leaf.dtype.name) for path, leaf in leaves.items()}
        manifest.write(
            root,
            "somebody",
            specs,
            1,
            files=[n for n, data in _tree(root).items() if data is not False and n != manifest.NAME],
        )

    return damage


def _restated(change):
    """Leaves the payload and changes what the manifest says of it."""

    def damage(root):
        said = dict(manifest.read(root).parameters)
        change(said)
        files = manifest.read(root).files
        manifest.write(root, "somebody", said, 1, files=files)

    return damage


def _emptied(root):
    largest = max((p for p in (root / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    read = manifest.read(root)
    manifest.write(root, "somebody", read.parameters, 1, files=read.files)


SCALE = "norm/scale"
ORBAX = {
    # What Orbax misses depends on which of its records lie in the half that is gone, and that on how its writers took turns.
    "truncated": (_emptied, r"params (cannot be (restored|read) by Orbax|holds no tree of tensors)"),
    "missing tensor": (_payload(lambda t: t.pop(SCALE)), rf"1 missing \({SCALE}\)"),
    "extra tensor": (_payload(lambda t: t.update(surprise=np.zeros(2, np.float32))), r"1 unknown \(surprise\)"),
    "wrong shape": (_payload(lambda t: t.update({SCALE: np.zeros(31, np.float32)})), rf"{SCALE} has shape \(31,\)"),
    "wrong dtype": (_payload(lambda t: t.update({SCALE: np.zeros(32, np.int32)})), rf"{SCALE} has dtype int32; allowed are"),
    "a tensor that is not there": (_restated(lambda s: s.update(ghost=((2,), "float32"))), r"ghost"),
    "a tensor that is not said": (_restated(lambda s: s.pop(SCALE)), rf"{SCALE}"),
    "another shape than said": (
        _restated(lambda s: s.update({"embed_tokens/embedding": ((32, 320), "bfloat16")})),
        r"embed_tokens/embedding",
    ),
    "another type than said": (
        _restated(lambda s: s.update({SCALE: ((32,), "float32")})),
        rf"as {SCALE}, manifest.json says",
    ),
    "payload gone": (lambda root: shutil.rmtree(root / "params"), r"has manifest.json but no params/"),
    "manifest gone": (lambda root: (root / "manifest.json").unlink(), r"has params/ but no manifest.json"),
}


# Watching: nothing is imported, compiled, unpickled or started while a checkpoint is looked at.

_seen: list[tuple[str, str]] = []
_is_watching = False
_RUNS = {
    "import",
    "exec",
    "compile",
    "pickle.find_class",
    "marshal.loads",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "ctypes.dlopen",
}


def _hook(event, arguments):
    if _is_watching and event in _RUNS:
        _seen.append((event, repr(arguments)[:2000]))


@contextlib.contextmanager
def _nothing_from(root):
    """Fails if anything that lies in `root` is run. The package's own lazy imports are no business of it."""
    global _is_watching
    if not hasattr(_nothing_from, "is_hooked"):
        sys.addaudithook(_hook)  # cannot be removed again
        _nothing_from.is_hooked = True
    _seen.clear()
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False
    assert not [entry for entry in _seen if str(root) in entry[1] or entry[0] == "pickle.find_class"]
    assert not SUNG.exists()


def _check(source, message, destination, parameters, abstract):
    attempts = {
        "to orbax": lambda: convert(source, destination, overwrite=True, show_progress=False),
        "to huggingface": lambda: convert(source, destination, to="huggingface", overwrite=True, show_progress=False),
        "load": lambda: load_parameters(source, parameters, abstract),
        "verify": lambda: verify(source, show_progress=False),
    }
    if "config" in message:  # loading is told what config.json said
        del attempts["load"]
    folder = destination.parent
    before = _tree(folder)
    for entrance, attempt in attempts.items():
        with _nothing_from(folder), pytest.raises((CheckpointError, UnknownModelError), match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value), entrance
        assert len(str(caught.value)) < MAX_MESSAGE, entrance
        assert _tree(folder) == before, entrance


@pytest.fixture
def destination(make_llama, tmp_path):
    """A checkpoint that a faulty one must not touch, though it may be overwritten."""
    (tmp_path / "work").mkdir()
    return shutil.copytree(make_llama(dtype="bfloat16"), tmp_path / "work/destination")


@pytest.mark.parametrize("fault", HUGGINGFACE)
def test_a_faulty_hugging_face_directory_is_one_error(fault, make_llama, destination, parameters_of, abstract_of):
    original = make_llama()
    source = shutil.copytree(original, destination.parent / "source")
    damage, message = HUGGINGFACE[fault]
    damage(source)
    _check(source, message, destination, parameters_of(original), abstract_of(original))


# Where one of Orbax's reads fails, the others answer an event loop that it has closed (orbax-checkpoint 0.12.8, 2026-11-25).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ORBAX)
def test_a_faulty_orbax_directory_is_one_error(fault, shared_orbax, destination, parameters_of, abstract_of):
    source = shutil.copytree(shared_orbax, destination.parent / "source")
    damage, message = ORBAX[fault]
    damage(source)
    if fault == "truncated":  # the manifest agrees with it, so only Orbax's own reading finds it
        parameters, abstract = parameters_of(shared_orbax), abstract_of(shared_orbax)
        before = _tree(destination.parent)
        for to in ("orbax", "huggingface"):
            with pytest.raises(CheckpointError, match=message):
                convert(source, destination, to=to, overwrite=True, show_progress=False)
        with pytest.raises(CheckpointError, match=message):
            load_parameters(source, parameters, abstract)
        assert _tree(destination.parent) == before
        time.sleep(1)  # for the reads that are left, so that no other test hears of them
        return
    _check(source, message, destination, parameters_of(shared_orbax), abstract_of(shared_orbax))


@pytest.mark.parametrize(
    "fault", ["truncated", "wrong shape", "unknown architecture", "pickles alone", "a header of 100 MB"]
)
def test_the_command_says_it_on_one_line(fault, make_llama, destination, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    source = shutil.copytree(make_llama(), destination.parent / "source")
    HUGGINGFACE[fault][0](source)
    before = _tree(destination.parent)
    for command in (["convert", str(source), str(destination), "--overwrite"], ["verify", str(source)]):
        result = CliRunner().invoke(cli.app, command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert _tree(destination.parent) == before


def test_a_destination_that_is_taken_is_left_alone(make_llama, destination, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = _tree(destination.parent)
    for to in ("orbax", "huggingface"):
        result = CliRunner().invoke(cli.app, ["convert", str(make_llama()), str(destination), "--to", to])
        assert result.exit_code == 1
        assert result.stderr == (
            f"error: {destination} exists and is not empty; choose another, or pass --overwrite (overwrite=True).\n"
        )
    assert _tree(destination.parent) == before


# A disk that is full, for real: the kernel refuses to let a file grow.

_FULL = """
import resource, sys
from serve import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv[:2] = ["jaxserve"]
cli.main()
"""


@pytest.mark.parametrize(
    ("to", "limit"),
    [
        ("orbax", 60_000),
        pytest.param("orbax", 300, marks=pytest.mark.slow),  # Orbax's own files
        pytest.param("huggingface", 60_000, marks=pytest.mark.slow),
        pytest.param("huggingface", 300, marks=pytest.mark.slow),
    ],
)
def test_a_file_that_may_not_grow_is_one_line_and_leaves_the_old_checkpoint(to, limit, make_llama, destination):
    before = _tree(destination.parent)
    command = ["convert", str(make_llama(dtype="float32")), str(destination), "--to", to, "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(limit), *command],
        cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {destination} cannot be written")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert _tree(destination.parent) == before


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_checkpoint(to, make_llama, destination, monkeypatch):
    """Some file systems say so only when data are flushed."""
    before = _tree(destination.parent)

    def fsync(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"destination cannot be written: .*No space left on device"):
        convert(make_llama(), destination, to=to, overwrite=True, show_progress=False)
    assert _tree(destination.parent) == before
