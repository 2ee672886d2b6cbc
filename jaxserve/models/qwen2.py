"""Qwen 2 and 2.5: biases on q, k and v; the upper layers may see a sliding window. Source: Yang et al. 2024."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import count, flag, optional, refuse
from jaxserve.models.decoder_config import DecoderConfig, read_decoder, read_windows


def read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a Qwen2ForCausalLM."""
    refuse(config, "mlp_bias")
    return read_decoder(config, windows=read_upper_windows(config), has_qkv_bias=True)


def read_upper_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Returns each layer's window: layers from `max_window_layers` on have one, if `use_sliding_window` says so."""
    window = optional(count, config, "sliding_window", 4096) if flag(config, "use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    first = first if first == 0 else count(config, "max_window_layers", 28)
    return read_windows(config, window, lambda index: window is not None and index >= first)
