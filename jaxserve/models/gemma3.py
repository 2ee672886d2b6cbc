"""Gemma 3, text: a norm on queries and keys; local and global layers turn by bases of their own. Source: Gemma Team 2025."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.config_fields import count, optional, positive, refuse, section
from jaxserve.models.decoder_config import LAYER_TYPES, DecoderConfig, read_layer_types, read_windows
from jaxserve.models.gemma import read_any_gemma
from jaxserve.models.rope import Rope


def read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a Gemma3ForCausalLM."""
    refuse(config, "attn_logit_softcapping")
    window, pattern = optional(count, config, "sliding_window", 4096), count(config, "sliding_window_pattern", 6)

    def is_sliding(index: int) -> bool:
        return (index + 1) % pattern != 0

    ropes = _read_ropes(config)
    return read_any_gemma(
        config,
        windows=read_windows(config, window, is_sliding),
        ropes=tuple(ropes[layer_type] for layer_type in read_layer_types(config, is_sliding)),
        max_model_len=count(config, "max_position_embeddings", 131072),  # its RoPE scaling is part of that number
        query_scale=positive(config, "query_pre_attn_scalar", 256) ** -0.5,
        has_qk_norm=True,
        has_post_norms=True,
        logit_soft_cap=optional(positive, config, "final_logit_softcapping", None),
    )


def _read_ropes(config: Mapping[str, Any]) -> dict[str, Rope]:
    """Returns the rotary positions by layer type; `rope_scaling` of transformers 4 is that of the global layers."""
    by_type = section(config, "rope_parameters")
    full, sliding = (section(by_type, name) for name in LAYER_TYPES)
    if by_type and not (full or sliding):
        raise ConfigError(f"config.json: rope_parameters must have {' and '.join(LAYER_TYPES)}, got {by_type!r}.")
    full = {**full, **section(config, "rope_scaling")}
    head_dim = count(config, "head_dim", 256)
    full_theta, sliding_theta = positive(config, "rope_theta", 1e6), positive(config, "rope_local_base_freq", 1e4)
    ropes = (
        Rope.from_parameters(full, config, head_dim, full_theta),
        Rope.from_parameters(sliding, config, head_dim, sliding_theta),
    )
    return dict(zip(LAYER_TYPES, ropes, strict=True))
