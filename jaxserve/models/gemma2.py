"""Gemma 2: norms before and after, soft caps, and a sliding window in every other layer. Source: Gemma Team 2024."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config_fields import count, optional, positive
from jaxserve.models.decoder_config import DecoderConfig, read_windows
from jaxserve.models.gemma import read_any_gemma


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config.json of a Gemma2ForCausalLM."""
    window = optional(count, config, "sliding_window", 4096)
    return read_any_gemma(
        config,
        windows=read_windows(config, window, lambda index: index % 2 == 0),
        query_scale=positive(config, "query_pre_attn_scalar", 256) ** -0.5,
        has_post_norms=True,
        attention_soft_cap=optional(positive, config, "attn_logit_softcapping", 50.0),
        logit_soft_cap=optional(positive, config, "final_logit_softcapping", 30.0),
    )
