"""One tiny Llama, and its tensors as other programs arrange them.

The arrangements are written from those programs' own conversion code, with numpy and in the other direction than ours, so that a
mistake in a mapping does not repeat itself here. No two sizes are equal, head_dim apart from the powers that `HEADS` says.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxserve.models.registry import make_model
from jaxserve.testing.tiny_checkpoint import TinyLlama

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Known:
    """A tiny Llama: its configuration, Hugging Face tensors and the canonical tensors that every conversion must give."""

    def __init__(self, **fields):
        shape = {
            "hidden_size": 40,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
        }
        self.model = TinyLlama(**(shape | {"vocab_size": 100} | fields))
        self.config = self.model.config()
        self.tensors = self.model.tensors()
        self.parameters = make_model(self.config).parameters()
        self.canonical = {
            p.path: self.tensors[p.huggingface_name].T if p.path.endswith("/kernel") else self.tensors[p.huggingface_name]
            for p in self.parameters
        }

    def weight(self, name, layer=None):
        return self.tensors[f"model.layers.{layer}.{name}.weight" if layer is not None else f"{name}.weight"]

    def heads(self, name, layer):
        """Returns a projection [D, heads, H]."""
        return self.weight(f"self_attn.{name}_proj", layer).T.reshape(self.model.hidden_size, -1, self.model.head_dim)

    def heads_out(self, layer):
        """Returns the output projection [N, H, D]."""
        return self.weight("self_attn.o_proj", layer).T.reshape(-1, self.model.head_dim, self.model.hidden_size)

    def write_config(self, path):
        path.write_text(json.dumps(self.config))
        return path


@pytest.fixture(scope="session")
def known():
    made = {}

    def known(**fields):
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = Known(**fields)
        return made[key]

    return known


def maxtext(known, *, is_stacked):
    """Returns the tree below `params/params`, as maxtext/checkpoint_conversion/to_maxtext.py makes it from Hugging Face."""
    m = known.model
    scale = np.float32(1 / np.sqrt(m.head_dim))

    def interleaved(heads):  # adjust_rope
        if known.config["rope_scaling"] is None:
            return heads
        half = m.head_dim // 2
        return np.stack([heads[..., :half], heads[..., half:]], axis=-1).reshape(heads.shape)

    def scaled(heads):  # scale_query_layer
        return (heads.astype(np.float32) * scale).astype(heads.dtype)

    def layer(index):
        return {
            "self_attention": {
                "query": {"kernel": scaled(interleaved(known.heads("q", index)))},
                "key": {"kernel": interleaved(known.heads("k", index))},
                "value": {"kernel": known.heads("v", index)},
                "out": {"kernel": known.heads_out(index)},
            },
            "mlp": {
                name: {"kernel": known.weight(f"mlp.{hf}_proj", index).T}
                for name, hf in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
            },
            "pre_self_attention_layer_norm": {"scale": known.weight("input_layernorm", index)},
            "post_self_attention_layer_norm": {"scale": known.weight("post_attention_layernorm", index)},
        }

    layers = [layer(index) for index in range(m.num_layers)]
    padding = np.zeros((28, m.hidden_size), known.weight("model.norm").dtype)  # MaxText pads the vocabulary to a multiple
    decoder = {
        "decoder_norm": {"scale": known.weight("model.norm")},
        "logits_dense": {"kernel": np.concatenate([known.weight("lm_head"), padding]).T},
    }
    if is_stacked:
        decoder["layers"] = _stack(layers, axis=1)
    else:
        decoder |= {f"layers_{index}": tree for index, tree in enumerate(layers)}
    embedding = np.concatenate([known.weight("model.embed_tokens"), padding])
    return {"token_embedder": {"embedding": embedding}, "decoder": decoder}


def gemma_layer(known, index, *, is_transposed=True):
    """Returns one layer as gemma/gm/nn/_modules.py declares it, as many norms as the family has."""
    gating = np.stack([known.weight(f"mlp.{name}_proj", index) for name in ("gate", "up")])  # [2, F, D]
    attention = {
        "q_einsum": {"w": known.heads("q", index).swapaxes(0, 1)},
        "kv_einsum": {"w": np.stack([known.heads(name, index).swapaxes(0, 1) for name in "kv"])},
        "attn_vec_einsum": {"w": known.heads_out(index)},
    }
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if known.model.family in ("gemma2", "gemma3"):
        norms |= {"post_attention_norm": "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
        norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
    if known.model.family == "gemma3":
        attention["_query_norm"] = {"scale": known.weight("self_attn.q_norm", index)}
        attention["_key_norm"] = {"scale": known.weight("self_attn.k_norm", index)}
    return {
        "attn": attention,
        "mlp": {
            "gating_einsum": gating if is_transposed else gating.swapaxes(1, 2),
            "linear": known.weight("mlp.down_proj", index).T,
        },
    } | {name: {"scale": known.weight(norm, index)} for name, norm in norms.items()}


def gemma(known, form):
    """Returns a checkpoint of google-deepmind/gemma: "nested", "nested, [2, D, F]", "flat" or "stacked"."""
    top = {
        "embedder": {"input_embedding": known.weight("model.embed_tokens")},
        "final_norm": {"scale": known.weight("model.norm")},
    }
    layers = [
        gemma_layer(known, index, is_transposed=form != "nested, [2, D, F]") for index in range(known.model.num_layers)
    ]
    if form.startswith("nested"):
        return top | {f"layer_{index}": layer for index, layer in enumerate(layers)}
    for layer in layers:
        layer["mlp"] = {name: {"w": value} for name, value in layer["mlp"].items()}
    named = [(f"layer_{index}", layer) for index, layer in enumerate(layers)]
    if form == "stacked":  # six kinds of layers in turn; the first ones have a layer more
        named = [
            (f"stacked_layers/attention_type_{kind}", _stack(layers[kind::6], axis=0)) for kind in range(min(6, len(layers)))
        ]
    flat = {f"transformer/{name}": leaves for name, leaves in top.items()}
    for name, layer in named:
        for path, leaf in flat_paths(layer).items():
            *module, last = path.split("/")
            flat.setdefault(f"transformer/{name}/{'/'.join(module)}", {})[last] = leaf
    return flat | {"SigLiPFromPatches_0/siglip_encoder": {"pos_embedding": np.zeros((1, 4, 3), np.float32)}}


def flat_paths(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf for key, child in tree.items() for path, leaf in flat_paths(child, f"{prefix}/{key}".lstrip("/")).items()
    }


def _stack(trees, axis):
    if isinstance(trees[0], dict):
        return {key: _stack([tree[key] for tree in trees], axis) for key in trees[0]}
    return np.stack(trees, axis=min(axis, trees[0].ndim))


@pytest.fixture(scope="session")
def trees():
    """The builders above, as attributes."""
    import types

    return types.SimpleNamespace(maxtext=maxtext, gemma=gemma, stack=_stack, flat_paths=flat_paths)
