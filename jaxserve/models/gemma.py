"""Gemma: a Llama with scaled embeddings, norms around 1, a GELU gate and a tied table. Source: Gemma Team 2024."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import count, flag, one_of, refuse
from jaxserve.models.decoder_config import DecoderConfig, read_decoder


def read_gemma(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a GemmaForCausalLM; its released `hidden_act` "gelu" always meant the tanh form."""
    one_of(config, "hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
    return read_any_gemma(config)


def read_any_gemma(config: Mapping[str, Any], **switches: Any) -> DecoderConfig:
    """Reads what all versions share."""
    refuse(config, "use_bidirectional_attention", "mlp_bias")
    one_of(config, "hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    has_bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        default_head_dim=256,
        is_tied_by_default=True,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        norm_offset=1.0,
        embedding_scale=count(config, "hidden_size") ** 0.5,
        activation="gelu_tanh",
        **switches,
    )
