"""Where a model comes from: a name to look up, or parameters that the caller already has.

Knows names and trees; reads nothing but `config.json`. Loading and laying out is `build`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoints import directory, hub, records
from jaxserve.checkpoints.flax_trees.pieces import convert_in_memory
from jaxserve.errors import CheckpointError, ConfigError, InvalidRequestError
from jaxserve.models.registry import make_model
from jaxserve.models.weights import flatten
from jaxserve.request import SamplingParams
from jaxserve.tokenization.ascii_tokenizer import AsciiTokenizer
from jaxserve.tokenization.loading import load_tokenizer
from jaxserve.tokenization.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
_SAMPLING_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""Field of generation_config.json -> field of SamplingParams: those that vLLM takes."""

EMBEDDED = Path(__file__).parent / "embedded_model"
TOY = "toy"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is found and not yet loaded.

    Attributes:
        name: how the service calls it.
        config: config.json as a dict.
        path: directory with the parameters; None when `params` has them.
        params: canonical leaves {path: array}; None when `path` has them.
        tokenizer: None where there is none: token ids in, token ids out.
    """

    name: str
    config: Mapping[str, Any]
    path: Path | None
    params: Mapping[str, Any] | None
    tokenizer: Tokenizer | None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's, or else what config.json names."""
        if self.tokenizer is not None:
            return tuple(self.tokenizer.eos_token_ids)
        declared = self.config.get("eos_token_id")
        if declared is None:
            return ()
        return (declared,) if isinstance(declared, int) else tuple(declared)


def find_model(
    model: str | None,
    tokenizer: str | Tokenizer | None,
    *,
    revision: str | None = None,
    skip_tokenizer: bool = False,
) -> ModelSource:
    """Returns the model of this name: None is the embedded one, "toy" the toy, else a directory or a Hub id.

    Raises:
        ModelNotFoundError, CheckpointError: it is not there, or not a model.
    """
    if model == TOY:
        import numpy as np

        config = {"architectures": ["JaxserveToy"], "model_type": TOY}
        own = None if skip_tokenizer else _tokenizer(tokenizer) or AsciiTokenizer()
        return ModelSource(TOY, config, None, {"scale": np.ones(1, np.float32)}, own)
    path = EMBEDDED if model is None else hub.resolve(model, revision)
    records.check_sidecars(path)
    return ModelSource(
        name="embedded" if model is None else (model if not Path(model).exists() else path.resolve().name),
        config=directory.read_json(path, directory.CONFIG),
        path=path,
        params=None,
        tokenizer=None if skip_tokenizer else _tokenizer(tokenizer) or load_tokenizer(path),
    )


def own_model(params: Any, config: Any, tokenizer: str | Tokenizer | None) -> ModelSource:
    """Returns the caller's own parameters as a model.

    Args:
        params: an NNX module or state, a Linen FrozenDict (with or without its "params" level), or a plain nested dict, in the
            canonical tree of `jaxserve.models.weights` or in a layout of `jaxserve.checkpoints.flax_trees`, which is detected.
        config: a Hugging Face configuration, as a dict or an object with `to_dict()`.
        tokenizer: a directory, a Tokenizer, or None for token ids alone.
    """
    if config is None:
        raise ConfigError("config must be given with params: a dict like a Hugging Face config.json.")
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise ConfigError(f"config must be a dict or have to_dict(), got {type(config).__name__}.")
        config = config.to_dict()
    return ModelSource("params", dict(config), None, canonical_leaves(params, config), _tokenizer(tokenizer))


def sampling_defaults(source: ModelSource, generation_config: str) -> dict[str, Any]:
    """Returns the fields of SamplingParams that a generation_config.json sets.

    Args:
        generation_config: "auto" takes the model's file, if it has one; "vllm" none; else a directory with such a file.

    Raises:
        CheckpointError: the file is damaged, or sets what SamplingParams does not take.
    """
    if generation_config == "vllm":
        return {}
    root = source.path if generation_config == "auto" else Path(generation_config)
    if root is None or (generation_config == "auto" and not (root / GENERATION_CONFIG).exists()):
        return {}
    file = directory.read_json(root, GENERATION_CONFIG)
    defaults = {ours: file[theirs] for theirs, ours in _SAMPLING_DEFAULTS.items() if file.get(theirs) is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise CheckpointError(
            f"{root / GENERATION_CONFIG}: {error} Correct the file, or start with generation_config='vllm'."
        ) from None
    return defaults


def canonical_leaves(params: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {canonical path: array} of a tree in the canonical layout or in one of `checkpoints.flax_trees`.

    Raises:
        ConfigError, CheckpointError: it is no tree of arrays, or not that of the configuration's model.
    """
    leaves = _leaves(params)
    parameters = make_model(config).parameters()
    if {path: tuple(leaf.shape) for path, leaf in leaves.items()} == {p.path: p.shape for p in parameters}:
        return leaves
    return convert_in_memory(leaves, parameters, config, "params")


def _leaves(params: Any) -> dict[str, Any]:
    """Returns {path: array} of an NNX module or state, a Linen FrozenDict, or a nested dict."""
    from flax import nnx

    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    if not isinstance(params, Mapping):
        raise ConfigError(
            f"params must be an NNX module or state, a Linen FrozenDict or a nested dict, got {type(params).__name__}."
        )
    if set(params) == {"params"}:
        params = params["params"]
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ConfigError(f"params: {path} must be an array, got {type(leaf).__name__}.")
    return leaves


def _tokenizer(tokenizer: str | Tokenizer | None) -> Tokenizer | None:
    if isinstance(tokenizer, (str, Path)):
        if Path(tokenizer).is_dir():
            records.check_sidecars(Path(tokenizer))
        return load_tokenizer(tokenizer)
    if tokenizer is not None and not hasattr(tokenizer, "encode"):
        raise ConfigError(f"tokenizer must be a directory, a Tokenizer or None, got {tokenizer!r}.")
    return tokenizer
