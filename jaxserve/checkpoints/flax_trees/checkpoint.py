"""A Flax program's own checkpoint with what it lacks: which tree of it, whose configuration and tokenizer, by which mapping.

Such checkpoints hold arrays alone. The configuration is a Hugging Face config.json, given or found beside the arrays; tokenizer
files come from a directory that is given, or from where the configuration is. Reads no tensors. Holds no state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import directory, manifest
from jaxserve.checkpoints.flax_trees.mapping import Mapping as NameMapping
from jaxserve.checkpoints.flax_trees.orbax_item import METADATA, Item, find_item
from jaxserve.checkpoints.flax_trees.source import AUTO, FlaxTreeSource, choose_mapping
from jaxserve.checkpoints.source import ParameterSource
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter


@dataclass(frozen=True, slots=True)
class FlaxOptions:
    """What the caller says about a foreign checkpoint.

    Attributes:
        tree: the layout: "auto" or one of `mapping.BUILT_IN`.
        mapping: a file instead of a built-in layout, see `mapping`.
        config: config.json, or a directory that has it; None looks beside the checkpoint.
        tokenizer: a directory with tokenizer files; None takes those beside the configuration.
    """

    tree: str = AUTO
    mapping: Path | None = None
    config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True, slots=True)
class FlaxCheckpoint:
    """A foreign checkpoint that was found."""

    item: Item
    mapping: NameMapping | None
    config_path: Path
    tokenizer: Path | None

    def read_config(self) -> bytes:
        return directory.read_bytes(self.config_path.parent, self.config_path.name, directory.MAX_JSON_BYTES)

    def read_files(self) -> dict[str, bytes]:
        """Returns {name: content} of the tokenizer and template files."""
        return directory.read_sidecars(self.tokenizer or self.config_path.parent)

    def open(self, parameters: Sequence[Parameter], config: Mapping[str, Any]) -> tuple[ParameterSource, str]:
        """Returns the tensors, and what they are called: "maxtext tree of step 7"."""
        tensors = FlaxTreeSource(self.item.path, parameters, config, self.mapping)
        step = f" of step {self.item.step}" if self.item.step is not None else ""
        return tensors, f"{tensors.mapping_name} tree{step}"


def find_checkpoint(source: Path, options: FlaxOptions | None) -> FlaxCheckpoint | None:
    """Returns the foreign checkpoint at `source`; None if it is none and nobody said that it is.

    Raises:
        CheckpointError: `options` are given and it is none; there is no configuration; the mapping file is wrong.
    """
    if options is None and (source / manifest.NAME).exists():
        return None
    item = find_item(source)
    if item is None and options is None:
        return None
    if item is None:
        raise CheckpointError(
            f"{source} holds no Orbax tree (there is no {METADATA} in it, in its items or in its steps); --tree, --mapping, "
            "--config and --tokenizer are about a Flax program's own checkpoint."
        )
    options = options or FlaxOptions()
    if options.mapping is not None and options.tree != AUTO:
        raise CheckpointError(f"give --tree or --mapping, not both; got {options.tree} and {options.mapping}.")
    if options.tokenizer is not None and not options.tokenizer.is_dir():
        raise CheckpointError(f"--tokenizer must be a directory with tokenizer files, got {options.tokenizer}.")
    mapping = choose_mapping(options.tree, options.mapping)
    return FlaxCheckpoint(item, mapping, _find_config(source, item, options.config), options.tokenizer)


def _find_config(source: Path, item: Item, given: Path | None) -> Path:
    if given is not None:
        path = given / directory.CONFIG if given.is_dir() else given
        if not path.is_file():
            raise CheckpointError(f"--config must be a Hugging Face config.json or a directory that has one, got {given}.")
        return path
    beside = dict.fromkeys([item.path, item.path.parent, source, source.resolve().parent])
    for folder in beside:
        if (folder / directory.CONFIG).is_file():
            return folder / directory.CONFIG
    raise CheckpointError(
        f"{source} is a Flax program's own checkpoint and has no {directory.CONFIG} (looked in "
        f"{', '.join(map(str, beside))}); give the model's Hugging Face configuration with --config."
    )
