"""Which of the two formats a directory has, and its parameters on devices. The entrance that `build` uses.

Knows how the formats are told apart. Holds no state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxserve.checkpoints import directory, huggingface, manifest, records, staging
from jaxserve.checkpoints.flax_trees.orbax_item import find_item
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter, check_complete

Format = Literal["orbax", "huggingface"]
FORMATS: tuple[Format, ...] = ("orbax", "huggingface")


def detect(path: str | Path) -> Format:
    """Returns the format of a checkpoint directory, by the files that are there.

    Raises:
        CheckpointError: neither; says what was looked for.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory.")
    if staging.is_staging(root):
        raise CheckpointError(
            f"{root} is what a conversion that was killed left behind; run it again, which removes this directory too."
        )
    if not (root / manifest.NAME).exists() and find_item(root) is not None:
        raise CheckpointError(
            f"{root} is an Orbax checkpoint that another Flax program wrote; `jaxserve convert {root} DESTINATION --config "
            "config.json` makes it one that can be served."
        )
    if (root / directory.PARAMS).is_dir():
        if not (root / manifest.NAME).exists():
            raise CheckpointError(f"{root} has {directory.PARAMS}/ but no {manifest.NAME}; copy the checkpoint again.")
        return "orbax"
    weights = (".safetensors", ".safetensors.index.json", *huggingface.PICKLE_SUFFIXES)
    if any(p.name.endswith(weights) for p in root.iterdir()):
        return "huggingface"
    if (root / manifest.NAME).exists():
        raise CheckpointError(f"{root} has {manifest.NAME} but no {directory.PARAMS}/; copy the checkpoint again.")
    raise CheckpointError(
        f"{root} is no checkpoint: it has neither {manifest.NAME} (Orbax, as `jaxserve convert` writes it) nor "
        f"{huggingface.SINGLE} or {huggingface.INDEX} (Hugging Face)."
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """Returns config.json of a checkpoint of either format."""
    return directory.read_json(Path(path), directory.CONFIG)


def load_parameters(
    path: str | Path,
    parameters: Sequence[Parameter],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    verify: bool = True,
) -> dict[str, jax.Array]:
    """Reads a checkpoint of either format straight to its shards.

    Args:
        parameters: every tensor that the model of config.json has.
        abstract: {path: shape, dtype to cast to, sharding}; without a sharding, the first device.
        verify: check the recorded hashes first (`records`). A Hugging Face directory from elsewhere has none; headers and
            index are always checked.

    Raises:
        CheckpointError: names file and tensor.
    """
    found = detect(path)
    if verify:
        records.check_sidecars(Path(path))  # a damaged config.json would be told as a tensor that is missing
    if found == "huggingface":
        if verify:
            records.check(Path(path))
        return huggingface.load(path, parameters, abstract)
    check_complete(parameters, {name: tuple(target.shape) for name, target in abstract.items()}, "the abstract tree")
    from jaxserve.checkpoints import orbax_store  # Orbax: 0.5 s to import, and a Hugging Face directory needs none of it

    return orbax_store.load(path, abstract, verify=verify)
