"""What each family reads from a config.json beyond the shared fields, and what it refuses."""

import pytest

from jaxserve import ConfigError
from jaxserve.models.registry import make_model
from jaxserve.testing.tiny_checkpoint import FAMILIES, TinyModel


def read(family, **fields):
    config = TinyModel(family, num_layers=4).config() | fields
    return make_model({name: value for name, value in config.items() if value != "absent"}).config


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {"sliding_window": 24}, [24] * 4),
        ("mistral", {"sliding_window": "absent"}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"use_sliding_window": False}, [None] * 4),
        ("qwen2", {"max_window_layers": 3}, [None, None, None, 24]),
        ("qwen2", {"max_window_layers": 0}, [24] * 4),
        ("qwen2", {"sliding_window": None}, [None] * 4),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, [None, None, 9, 9]),
        ("qwen3", {"layer_types": ["full_attention"] * 4}, [None] * 4),
        ("gemma", {}, [None] * 4),
        ("gemma2", {}, [24, None, 24, None]),
        ("gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, [None, None, None, 24]),
        ("gemma3", {"sliding_window_pattern": "absent"}, [24] * 4),
        ("gemma3", {"sliding_window_pattern": 3}, [24, 24, None, 24]),
    ],
)
def test_windows(family, fields, windows):
    assert list(read(family, **fields).windows) == windows


def test_defaults_of_absent_fields():
    assert read("qwen3", head_dim="absent").head_dim == 128
    assert read("mistral", head_dim="absent").head_dim == 64 // 4
    assert not read("qwen2", tie_word_embeddings="absent").is_tied
    assert read("gemma", tie_word_embeddings="absent", head_dim="absent").is_tied
    assert read("gemma2", final_logit_softcapping="absent").logit_soft_cap == 30
    assert read("gemma2", final_logit_softcapping=None).logit_soft_cap is None
    assert read("gemma3", final_logit_softcapping="absent").logit_soft_cap is None


NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
}


def test_both_spellings_of_gemma_3s_rotary_positions():
    new = read("gemma3", rope_parameters=NESTED, rope_theta="absent", rope_local_base_freq="absent")
    old = read("gemma3", rope_scaling={"type": "linear", "factor": 8.0}, rope_theta=3e5, rope_local_base_freq=2e3)
    assert new.ropes == old.ropes
    assert len(set(new.ropes)) == 2
    assert new.max_model_len == 512, "its scaling is part of max_position_embeddings"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be absent"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be absent or 1"),
        ({"rope_scaling": {"type": "longrope"}}, "one of default, linear, dynamic, llama3, yarn, got 'longrope'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096, got 1000000000"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 without a rope_type; it must be one of default, linear"),
    ],
)
def test_what_every_family_refuses(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(family, **fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ("mistral", {"attention_bias": True}, "attention_bias must be absent or false"),
        ("qwen3", {"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        ("llama", {"sliding_window": 8}, "sliding_window must be absent"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1e-3}}, "longest context 0 tokens"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 1e308}}, r"longest context 2.15e\+09 tokens"),
        ("llama", {"rope_parameters": NESTED}, "by layer type belong to another family"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types must be absent"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number of at least 1, got 0"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types must have one of full_attention, .* each of 4"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types must have one of"),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
            "so sliding_window must be set and in use",
        ),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act must be one of silu"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act must be one of gelu, gelu_pytorch_tanh"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation must be one of gelu_pytorch_tanh"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be absent"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be absent"),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters must have full_attention and sliding_attention",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention must be an object, got 3"),
    ],
)
def test_what_a_family_refuses(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        read(family, **fields)
