"""What mapping files may ask of a configuration: its fields, and the few that Hugging Face leaves to be derived.

Holds no state.
"""

from collections.abc import Mapping
from typing import Any


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json, those of its `text_config` in front, with head_dim and rope_type filled in."""
    text = config.get("text_config")
    facts = dict(config) | (dict(text) if isinstance(text, Mapping) else {})
    if facts.get("head_dim") is None and facts.get("num_attention_heads"):
        facts["head_dim"] = facts.get("hidden_size", 0) // facts["num_attention_heads"]
    if facts.get("num_key_value_heads") is None:
        facts["num_key_value_heads"] = facts.get("num_attention_heads")
    rope = facts.get("rope_parameters") or facts.get("rope_scaling")
    facts["rope_type"] = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, Mapping) else "default"
    return facts
