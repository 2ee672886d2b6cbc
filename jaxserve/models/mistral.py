"""Mistral: a Llama in which every layer may see a sliding window only. Source: Jiang et al. 2023."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import count, count_layers, optional, refuse
from jaxserve.models.decoder_config import DecoderConfig, read_decoder

DEFAULT_WINDOW = 4096
"""Where config.json has no such field, as the first release's does; null is full attention."""


def read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a MistralForCausalLM."""
    refuse(config, "attention_bias", "mlp_bias", "layer_types")
    window = optional(count, config, "sliding_window", DEFAULT_WINDOW)
    return read_decoder(config, windows=(window,) * count_layers(config))
