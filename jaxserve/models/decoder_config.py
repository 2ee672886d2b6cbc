"""The switches of a pre-norm, grouped-query decoder, and the fields of config.json that all its families share.

A family is a function from a config.json to a `DecoderConfig`; it knows which field turns which switch, and what it refuses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.config_fields import MAX_COUNT, count, count_layers, flag, one_of, positive, refuse
from jaxserve.models.rope import Rope

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of one model, and its switches as values.

    Attributes:
        max_model_len: longest context [tokens].
        windows: of each layer, how many tokens back it sees [tokens]; None sees all.
        ropes: of each layer.
        query_scale: multiplies q . k.
        has_post_norms: a norm after attention and one after the feed-forward, each before its sum, besides those before.
        norm_offset: added to the stored scale of every norm.
        embedding_scale: multiplies embeddings, rounded to their dtype.
        activation: of the gate, a name of `layers.ACTIVATIONS`.
        attention_soft_cap, logit_soft_cap: c where scores or logits x become c * tanh(x / c).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    is_tied: bool
    max_model_len: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    query_scale: float
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)


def read_decoder(
    config: Mapping[str, Any],
    *,
    default_head_dim: int | None = None,
    is_tied_by_default: bool = False,
    windows: tuple[int | None, ...] | None = None,
    **switches: Any,
) -> DecoderConfig:
    """Returns the shape in a config.json, with a family's own switches.

    Args:
        config: config.json.
        default_head_dim: where the field is absent; None divides hidden_size by the heads.
        is_tied_by_default: `tie_word_embeddings` where the field is absent.
        windows: of each layer; None is full attention everywhere.
        switches: fields of `DecoderConfig` that the family sets.

    Raises:
        ConfigError: a field that is missing, wrong, or not implemented here.
    """
    refuse(config, "quantization_config")
    if "activation" not in switches:
        one_of(config, "hidden_act", ("silu",), "silu")
    hidden_size, num_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    num_kv_heads = count(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})."
        )
    head_dim = count(config, "head_dim", default_head_dim or hidden_size // num_heads or None)
    num_layers = count_layers(config)
    if "ropes" not in switches:
        rope = Rope.from_huggingface(config, head_dim)
        switches["ropes"] = (rope,) * num_layers
        switches["max_model_len"] = max_len = rope.max_len(count(config, "max_position_embeddings", 2048))
        if not 1 <= max_len <= MAX_COUNT:
            raise ConfigError(
                f"config.json: RoPE scaling makes the longest context {max_len:.3g} tokens; give it another factor."
            )
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=count(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=count(config, "vocab_size"),
        rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
        is_tied=flag(config, "tie_word_embeddings", is_tied_by_default),
        windows=windows or (None,) * num_layers,
        **({"query_scale": head_dim**-0.5} | switches),
    )


def read_layer_types(config: Mapping[str, Any], is_sliding: Callable[[int], bool]) -> tuple[str, ...]:
    """Returns a word of LAYER_TYPES a layer: `layer_types` of transformers 5, or else the family's rule by index."""
    num_layers, types = count_layers(config), config.get("layer_types")
    if types is None:
        return tuple(LAYER_TYPES[is_sliding(index)] for index in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers or any(t not in LAYER_TYPES for t in types):
        raise ConfigError(
            f"config.json: layer_types must have one of {', '.join(LAYER_TYPES)} for each of {num_layers} layers, got {types!r}."
        )
    return tuple(types)


def read_windows(config: Mapping[str, Any], window: int | None, is_sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Returns each layer's window, or None where its layer type is full attention."""
    types = read_layer_types(config, is_sliding)
    if window is None and "sliding_attention" in types:
        raise ConfigError("config.json: layer_types has sliding_attention, so sliding_window must be set and in use.")
    return tuple(window if t == "sliding_attention" else None for t in types)
