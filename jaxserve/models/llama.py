"""Llama 2 and 3: the plain decoder. Sources: Touvron et al. 2023; Grattafiori et al. 2024."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import flag, refuse
from jaxserve.models.decoder_config import DecoderConfig, read_decoder


def read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a LlamaForCausalLM."""
    refuse(config, "sliding_window", "layer_types")
    has_bias = flag(config, "attention_bias")
    return read_decoder(config, has_qkv_bias=has_bias, has_o_bias=has_bias, has_mlp_bias=flag(config, "mlp_bias"))
