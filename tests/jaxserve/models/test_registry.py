"""Which family serves which config.json, what is said when none does, and a family from outside the tree."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, ConfigError, SamplingParams, UnknownModelError
from jaxserve.models import registry
from jaxserve.models.registry import Family, make_model
from jaxserve.models.toy import Toy, continuation
from jaxserve.testing.tiny_checkpoint import TinyLlama

CONFIG = TinyLlama().config()


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(
        UnknownModelError, match=r"Gemma2ForCausalLM, .*JaxserveToy, LlamaForCausalLM, .*got \['GPT9'\].*register"
    ):
        make_model({"architectures": ["GPT9"]})
    with pytest.raises(UnknownModelError):
        make_model({})


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_hidden_layers"]
)
def test_a_missing_field_is_named(field):
    config = {name: value for name, value in CONFIG.items() if name != field}
    with pytest.raises(ConfigError, match=f"lacks '{field}'"):
        make_model(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"sliding_window": 4}, "sliding_window must be absent or false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be absent"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a finite number above 0, got 'x'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, got 0"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"architectures": 5}, r"got \[5\]"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, got 'gelu'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"rope_scaling": {"type": "su"}}, "rope_type must be one of default, linear, dynamic, llama3, yarn, got 'su'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type must be one of .*got \['yarn'\]"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "lacks 'factor'"),
        ({"rope_scaling": {"full_attention": {}}}, "rope_parameters by layer type belong to another family"),
        ({"rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be absent or 1 for this family, got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor .*got 0.25"),
        ({"head_dim": 15}, "head_dim must be even for rotary positions.*got 15"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must be absent"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    ],
)
def test_what_the_family_does_not_implement_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_model(CONFIG | change)


def test_both_spellings_of_rope():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = make_model(CONFIG | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = make_model({**CONFIG, "rope_theta": None, "rope_scaling": None, "rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old.config.ropes == new.config.ropes
    assert old.config.ropes[0].theta == 5e5


class Contrary(Toy):
    """A family from outside: says what the toy says, one token id further."""

    def logits(self, params, hidden_SD, ctx):
        return jnp.roll(super().logits(params, hidden_SD, ctx), 1, axis=-1)


def test_a_family_from_outside_the_tree(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register("Contrary", Family(Contrary.from_huggingface, Contrary.sizes_for))
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 64, "num_pages": 8}
    config = {"architectures": ["Contrary"]}
    with LLM(params={"scale": np.ones(1, np.float32)}, config=config, use_tqdm=False, **limits) as llm:
        params = SamplingParams(temperature=0, max_tokens=1)
        (output,) = llm.generate([[65, 66, 67]], params, use_tqdm=False)
        assert output.outputs[0].token_ids == [continuation([65, 66, 67], 1)[0] + 1]
