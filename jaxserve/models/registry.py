"""Which family serves which checkpoint, by the `architectures` of its config.json.

Families from outside the tree register too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ConfigError, UnknownModelError
from jaxserve.models.decoder import Decoder, ReadConfig, sizes_for
from jaxserve.models.gemma import read_gemma
from jaxserve.models.gemma2 import read_gemma2
from jaxserve.models.gemma3 import read_gemma3
from jaxserve.models.llama import read_llama
from jaxserve.models.mistral import read_mistral
from jaxserve.models.model import Model
from jaxserve.models.qwen2 import read_qwen2
from jaxserve.models.qwen3 import read_qwen3
from jaxserve.models.toy import Toy
from sharding.mesh import TensorParallelism


@dataclass(frozen=True, slots=True)
class Family:
    """How to make a model of one family.

    Attributes:
        make: (config.json as a dict, tensor_parallel_size, dtype) -> Model.
        sizes_for: (config.json as a dict, limit) -> the tensor_parallel_sizes up to it that work.
    """

    make: Callable[..., Model]
    sizes_for: Callable[[Mapping[str, Any], int], tuple[int, ...]]


_FAMILIES: dict[str, Family] = {}


def register(architecture: str, family: Family) -> None:
    """Makes checkpoints whose config.json names `architecture` known; a second registration of a name replaces the first."""
    _FAMILIES[architecture] = family


def known_architectures() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
        UnknownModelError: none of its architectures is registered; lists those that are.
    """
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if isinstance(name, str) and name in _FAMILIES:
            return _FAMILIES[name]
    raise UnknownModelError(
        f"architectures in config.json must name one of {', '.join(known_architectures())}, got {names}. "
        "Register a family of your own with jaxserve.models.registry.register."
    )


def make_model(config: Mapping[str, Any], *, tensor_parallel_size: int = 1, dtype: Any = "float32") -> Model:
    """Returns the model of a config.json, cut over `tensor_parallel_size` devices.

    Raises:
        UnknownModelError: see `family_of`.
        ConfigError: the size does not divide the model; names the sizes that would.
    """
    family = family_of(config)
    sizes = family.sizes_for(config, max(tensor_parallel_size, 64))
    if tensor_parallel_size not in sizes:
        raise ConfigError(
            f"tensor_parallel_size must divide the model's heads and feed-forward, so it is one of "
            f"{', '.join(map(str, sizes))}; got {tensor_parallel_size}."
        )
    return family.make(config, tensor_parallel_size, dtype)


def decoder_family(read: ReadConfig) -> Family:
    """Returns the family of decoders whose switches `read` takes from a config.json."""

    def make(config: Mapping[str, Any], size: int, dtype: Any) -> Decoder:
        parsed = read(config)
        return Decoder(parsed, TensorParallelism.of(size, parsed.num_kv_heads), dtype)

    return Family(make, lambda config, limit: sizes_for(read(config), limit))


register("GemmaForCausalLM", decoder_family(read_gemma))
register("Gemma2ForCausalLM", decoder_family(read_gemma2))
register("Gemma3ForCausalLM", decoder_family(read_gemma3))
register("LlamaForCausalLM", decoder_family(read_llama))
register("MistralForCausalLM", decoder_family(read_mistral))
register("Qwen2ForCausalLM", decoder_family(read_qwen2))
register("Qwen3ForCausalLM", decoder_family(read_qwen3))
register("JaxserveToy", Family(Toy.from_huggingface, Toy.sizes_for))
