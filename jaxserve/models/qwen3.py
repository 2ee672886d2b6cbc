"""Qwen 3: a norm on each head's query and key in place of Qwen 2's biases. Source: Yang et al. 2025."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import flag, refuse
from jaxserve.models.decoder_config import DecoderConfig, read_decoder
from jaxserve.models.qwen2 import read_upper_windows


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a Qwen3ForCausalLM."""
    refuse(config, "mlp_bias")
    has_bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        default_head_dim=128,
        windows=read_upper_windows(config),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
    )
