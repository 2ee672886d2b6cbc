"""Reading a Hugging Face directory: `config.json` and safetensors, in one file or in several with an index.

Knows the files, their names and what may be ignored. Does not know how bytes lie in a file (`safetensors_file`) nor how to
write (`huggingface_writer`). Holds no state but the parsed headers of a directory that is open.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.checkpoints import directory, safetensors_file
from jaxserve.checkpoints.directory import INDEX, SINGLE
from jaxserve.checkpoints.safetensors_file import StoredTensor
from jaxserve.checkpoints.source import TensorSpec, float_dtype
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter, check_complete

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Buffers that older exports hold and that follow from the configuration.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "self_attn.masked_bias")

_NUM_READERS = 4
_COMPARED_ROWS = 1024  # 16 MB of an embedding 8,192 wide in bfloat16
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns config.json."""
    return directory.read_json(Path(path), directory.CONFIG)


def read_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Returns where every tensor of a directory lies, all headers checked.

    Raises:
        CheckpointError: no safetensors there (pickles are refused by name), a shard missing or damaged, an index that
            does not say what the files hold.
    """
    root = Path(path)
    if (root / SINGLE).exists():
        return safetensors_file.read_header(directory.member(root, SINGLE), root / SINGLE)
    if (root / INDEX).exists():
        return _read_indexed(root)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory.")
    names = sorted(p.name for p in root.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{root} has its weights as pickles ({', '.join(pickles[:3])}), which can run code and are never opened. "
            "Convert it to safetensors first, or take a revision that has .safetensors files."
        )
    loose = [name for name in names if name.endswith(".safetensors")]
    found = f"it has {', '.join(loose[:3])}, whose names say nothing about order or completeness" if loose else "no weights"
    raise CheckpointError(f"{root} must hold {SINGLE} or {INDEX} with the files that it names; {found}.")


def load(
    path: str | Path, parameters: Sequence[Parameter], abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads parameters straight to their shards; the host holds one tensor at a time, or the part that it needs of it.

    Args:
        parameters: every tensor that the model of config.json has.
        abstract: {path: shape, dtype to cast to, sharding}; without a sharding, the first device.

    Raises:
        CheckpointError: names file and tensor that is missing, unknown, damaged or of another shape or type.
    """
    source = HuggingFaceSource(path, parameters)
    check_complete(parameters, {name: tuple(target.shape) for name, target in abstract.items()}, "the abstract tree")
    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for parameter in source.in_file_order():
            array = _place(source, parameter, abstract[parameter.path], pool)
            # Without this wait the host would run ahead of the transfers and hold several tensors.
            arrays[parameter.path] = jax.block_until_ready(array)
    return arrays


def _place(source: "HuggingFaceSource", parameter: Parameter, target: jax.ShapeDtypeStruct, pool: Executor) -> jax.Array:
    """Reads the smallest box that holds all of this host's shards, once, and hands out its parts."""
    shape = parameter.shape
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def bounds(index: Any) -> list[tuple[int, int]]:
        return [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]

    local = [bounds(index) for index in sharding.addressable_devices_indices_map(shape).values()]
    box = [(min(b[d][0] for b in local), max(b[d][1] for b in local)) for d in range(len(shape))]
    values = source.read(parameter, tuple(slice(*b) for b in box), float_dtype(target.dtype), pool)

    def part(index: Any) -> np.ndarray:
        return values[tuple(slice(b - o, e - o) for (b, e), (o, _) in zip(bounds(index), box, strict=True))]

    return jax.make_array_from_callback(shape, sharding, part)


class HuggingFaceSource:
    """The canonical parameters of a directory, read one at a time.

    Raises:
        CheckpointError: the tensors there are not those that `parameters` declare.
    """

    def __init__(self, path: str | Path, parameters: Sequence[Parameter]):
        self._root = Path(path)
        self._parameters = {p.path: p for p in parameters}
        self._stored = self._match(read_tensors(path))
        self.specs: Mapping[str, TensorSpec] = {
            p.path: TensorSpec(p.shape, self._stored[p.path].spec.dtype) for p in parameters
        }

    def in_file_order(self) -> list[Parameter]:
        def place(parameter: Parameter) -> tuple[str, int]:
            stored = self._stored[parameter.path]
            return stored.file.name, stored.begin

        return sorted(self._parameters.values(), key=place)

    def iterate(self, paths: Iterable[str], dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for path in paths:
                parameter = self._parameters[path]
                whole = (slice(None),) * len(parameter.shape)
                yield path, self.read(parameter, whole, dtype or self.specs[path].dtype, pool)

    def read(self, parameter: Parameter, index: tuple[slice, ...], dtype: np.dtype, pool: Executor) -> np.ndarray:
        """Returns a part of a tensor in canonical orientation."""
        is_transposed = parameter.is_transposed_in_huggingface
        file_index = index[::-1] if is_transposed else index
        stored = self._stored[parameter.path]
        return safetensors_file.read(stored, file_index, dtype, is_transposed=is_transposed, pool=pool)

    def _match(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Returns {path: where it lies}."""
        by_name = {p.huggingface_name: p for p in self._parameters.values()}
        if _HEAD not in tensors and _HEAD in by_name and _EMBEDDING in tensors:
            raise CheckpointError(
                f"{self._root}: {_HEAD} is missing, and config.json does not say that the embeddings are tied; set "
                "tie_word_embeddings to true there if they are."
            )
        if _HEAD in tensors and _HEAD not in by_name and _EMBEDDING in by_name:
            self._check_tied(tensors)
            tensors = {name: tensor for name, tensor in tensors.items() if name != _HEAD}
        tensors = {
            name: tensor for name, tensor in tensors.items() if name in by_name or not name.endswith(IGNORED_SUFFIXES)
        }
        for tensor in tensors.values():
            _ = tensor.spec  # a quantised checkpoint is named as such, before its unknown names are
        expected = [Parameter(p.huggingface_name, p.huggingface_shape, p.axes) for p in by_name.values()]
        check_complete(expected, {name: tensor.shape for name, tensor in tensors.items()}, str(self._root))
        return {p.path: tensors[name] for name, p in by_name.items()}

    def _check_tied(self, tensors: dict[str, StoredTensor]) -> None:
        head, embedding = tensors[_HEAD], tensors.get(_EMBEDDING)
        if embedding is None:
            return  # reported with the other missing names
        is_same = head.shape == embedding.shape and head.dtype == embedding.dtype
        if is_same:
            with ThreadPoolExecutor(_NUM_READERS) as pool:
                is_same = all(
                    np.array_equal(_rows(head, start, pool), _rows(embedding, start, pool))
                    for start in range(0, head.shape[0], _COMPARED_ROWS)
                )
        if not is_same:
            raise CheckpointError(
                f"{self._root}: config.json says that the embeddings are tied, but {head.file.name} has a {_HEAD} that "
                "differs from them; set tie_word_embeddings to false if it is meant to be used."
            )


def _rows(tensor: StoredTensor, start: int, pool: Executor) -> np.ndarray:
    """Returns the bits of some rows."""
    index = (slice(start, start + _COMPARED_ROWS), *(slice(None),) * (len(tensor.shape) - 1))
    return safetensors_file.read(tensor, index, tensor.spec.dtype, is_transposed=False, pool=pool).view(np.uint8)


def _read_indexed(root: Path) -> dict[str, StoredTensor]:
    index = directory.read_json(root, INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{root / INDEX}: weight_map must map tensor names to file names.")
    paths: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{root / INDEX} names {file!r}; only .safetensors files are read. Convert it to safetensors first."
            )
        paths[file] = directory.member(root, file)
        if not paths[file].is_file():
            raise CheckpointError(f"{root / file} is missing, {INDEX} names it; copy or download it again.")
    tensors: dict[str, StoredTensor] = {}
    for file, path in paths.items():
        held = safetensors_file.read_header(path, root / file)
        for name in held:
            if weight_map.get(name) != file:
                says = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{root / file} holds {name}, which {INDEX} says is {says}.")
        tensors.update(held)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{root / weight_map[missing[0]]} lacks {missing[0]}, which {INDEX} says is there.")
    return tensors
