"""Plans: which leaf is which tensor, and one error that says all of what is wrong."""

import numpy as np
import pytest

from jaxserve.checkpoints.flax_trees import mapping
from jaxserve.checkpoints.flax_trees.facts import facts_of
from jaxserve.checkpoints.flax_trees.plan import Piece, detect, make_plan
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import Parameter, flatten


@pytest.fixture
def maxtext(known, trees):
    """Returns (shapes of a MaxText tree, parameters, facts); the shapes may be changed."""
    known = known()
    tree = {"params": {"params": trees.maxtext(known, is_stacked=False)}, "step": np.zeros(())}
    return {path: leaf.shape for path, leaf in trees.flat_paths(tree).items()}, known.parameters, facts_of(known.config)


def check(shapes, parameters, facts, name="maxtext", **fields):
    plan = make_plan(mapping.built_in(name), shapes, parameters, facts)
    plan.check("ckpt")
    return plan


LAYER = "params/params/decoder/layers_1"


def test_a_plan_names_the_leaf_as_it_is_spelt(maxtext):
    plan = check(*maxtext)
    assert plan.root == "params/params"
    assert plan.pieces["layers/1/mlp/gate_proj/kernel"] == Piece(f"{LAYER}/mlp/wi_0/kernel", None)
    assert "step" not in {piece.leaf for piece in plan.pieces.values()}


def _rename(shapes):
    shapes[f"{LAYER}/mlp/wi_7/kernel"] = shapes.pop(f"{LAYER}/mlp/wi_1/kernel")


def _tie(parameters):
    return [p for p in parameters if p.path != "lm_head/kernel"]


FAULTS = {
    "renamed": (
        lambda s, p: (_rename(s), p)[1],
        r"leaves left over: 1\): no rule gives layers/1/mlp/up_proj/kernel; nearest left over: .*wi_7/kernel; no rule takes "
        r"params/params/decoder/layers_1/mlp/wi_7/kernel; nearest pattern: decoder/layers.*/mlp/wi_",
    ),
    "without a head": (
        lambda s, p: (s.pop("params/params/decoder/logits_dense/kernel"), p)[1],
        "no rule gives lm_head/kernel; set tie_word_embeddings to true",
    ),
    "a head beside tied embeddings": (
        lambda s, p: _tie(p),
        r"the configuration has no lm_head/kernel \(from params/params/decoder/logits_dense/kernel\); config.json says",
    ),
    "a layer more": (
        lambda s, p: (s.update({k.replace("layers_1", "layers_3"): v for k, v in s.items() if "layers_1" in k}), p)[1],
        "the configuration has no layers/3/self_attn/q_proj/kernel, .* and 6 more",
    ),
    "another width": (
        lambda s, p: (s.update({f"{LAYER}/mlp/wo/kernel": (48, 41)}), p)[1],
        r"layers_1/mlp/wo/kernel gives layers/1/mlp/down_proj/kernel the shape \(48, 41\), the configuration says \(48, 40\)",
    ),
    "another rank": (
        lambda s, p: (s.update({f"{LAYER}/self_attention/key/kernel": (40, 32)}), p)[1],
        r"key/kernel has shape \(40, 32\), its axes are 'D K H -> D \(K H\)'",
    ),
    "a smaller vocabulary": (
        lambda s, p: (s.update({"params/params/token_embedder/embedding": (99, 40)}), p)[1],
        "token_embedder/embedding: axes 'V<vocab_size D -> V D': an axis of 99 has no 100 elements",
    ),
    "LoRA": (
        lambda s, p: (s.update({f"{LAYER}/self_attention/query/lora_a.kernel": (40, 2)}), p)[1],
        "no rule takes .*query/lora_a.kernel",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_one_error_with_the_nearest_names(case, maxtext):
    shapes, parameters, facts = maxtext
    change, message = FAULTS[case]
    parameters = change(shapes, parameters)
    with pytest.raises(CheckpointError, match=message) as caught:
        check(shapes, parameters, facts)
    assert str(caught.value).startswith("ckpt does not fit the mapping maxtext (root params/params; ")


def test_two_sources_for_one_target(maxtext):
    text = "rules: [{from: a, to: norm/scale}, {from: b, to: norm/scale}, {from: c, to: norm/scale}]"
    parameters = [Parameter("norm/scale", (4,), (None,))]
    plan = make_plan(mapping.parse(text, "my.yaml"), {"a": (4,), "b": (4,)}, parameters, {})
    with pytest.raises(CheckpointError, match="b and a both give norm/scale; nothing matches the pattern c"):
        plan.check("ckpt")
    with pytest.raises(CheckpointError, match="layers_0/w and layers/0/w are the same path|layers/0/w and layers_0/w"):
        make_plan(mapping.parse(text, "my.yaml"), {"layers_0/w": (4,), "layers/0/w": (4,)}, parameters, {})


def test_square_axes_that_fit_in_two_ways_are_not_guessed(known, trees):
    known = known(is_tied=True, intermediate_size=40)
    shapes = {path: leaf.shape for path, leaf in trees.flat_paths(trees.gemma(known, "nested")).items()}
    message = r"gating_einsum of shape \(2, 40, 40\) fits '0 F D -> D F' or '0 D F -> D F' alike; a mapping file"
    with pytest.raises(CheckpointError, match=message):
        check(shapes, known.parameters, facts_of(known.config), "gemma")


def test_rules_are_tried_in_order():
    text = 'rules: [{from: a/w, to: norm/scale}, {from: "a/{+rest}", to: "other/{+rest}"}]'
    parameters = [Parameter("norm/scale", (4,), (None,)), Parameter("other/v", (4,), (None,))]
    plan = make_plan(mapping.parse(text, "my.yaml"), {"a/w": (4,), "a/v": (4,)}, parameters, {})
    plan.check("ckpt")
    assert {target: piece.leaf for target, piece in plan.pieces.items()} == {"norm/scale": "a/w", "other/v": "a/v"}


def test_detection_says_what_was_found_and_what_is_nearest(maxtext):
    shapes, parameters, facts = maxtext
    assert detect(shapes, parameters, facts, "ckpt").mapping.name == "maxtext"
    _rename(shapes)
    with pytest.raises(CheckpointError) as caught:
        detect(shapes, parameters, facts, "ckpt")
    message = str(caught.value)
    assert "ckpt is a tree of no known layout: 31 leaves (params/params/token_embedder/embedding, " in message
    assert (
        "choose one of canonical, maxtext, linen, nnx, tunix, gemma, or a mapping file. The nearest is maxtext, but"
        in message
    )
    assert "no rule gives layers/1/mlp/up_proj/kernel" in message


def test_detection_of_two_layouts_that_disagree(maxtext, monkeypatch):
    shapes, parameters, facts = maxtext
    text = mapping.text_of("maxtext").replace("x * sqrt(head_dim)", "x * 4")
    monkeypatch.setattr(
        mapping, "text_of", lambda name, original=mapping.text_of: text if name == "gemma" else original(name)
    )
    with pytest.raises(CheckpointError, match="ckpt can be read as maxtext and as gemma, which disagree; choose one of"):
        detect(shapes, parameters, facts, "ckpt")


# Families whose tables are checked against a list of parameters declared here, by Hugging Face's names.


def declared(layer, num_layers, *, is_tied=True):
    top = {"embed_tokens/embedding": (100, 40), "norm/scale": (40,)} | ({} if is_tied else {"lm_head/kernel": (40, 100)})
    layers = {f"layers/{index}/{path}": shape for index in range(num_layers) for path, shape in layer.items()}
    return [Parameter(path, shape, (None,) * len(shape)) for path, shape in (top | layers).items()]


BLOCK = {
    "input_layernorm/scale": (40,),
    "self_attn/q_proj/kernel": (40, 64),
    "self_attn/k_proj/kernel": (40, 32),
    "self_attn/v_proj/kernel": (40, 32),
    "self_attn/o_proj/kernel": (64, 40),
    "post_attention_layernorm/scale": (40,),
    "mlp/gate_proj/kernel": (40, 48),
    "mlp/up_proj/kernel": (40, 48),
    "mlp/down_proj/kernel": (48, 40),
}
QK_NORMS = {"self_attn/q_norm/scale": (16,), "self_attn/k_norm/scale": (16,)}
BIASES = {"self_attn/q_proj/bias": (64,), "self_attn/k_proj/bias": (32,), "self_attn/v_proj/bias": (32,)}
FFW_NORMS = {"pre_feedforward_layernorm/scale": (40,), "post_feedforward_layernorm/scale": (40,)}
CONFIG = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}


def maxtext_block(suffix="", *, layer_norms=True, extra=()):
    pre, post = ("pre_self_attention_layer_norm", "post_self_attention_layer_norm") if layer_norms else (
        f"pre_self_attention_norm{suffix}", f"post_self_attention_norm{suffix}")  # fmt: skip
    block = {
        f"self_attention{suffix}/query/kernel": (40, 4, 16),
        f"self_attention{suffix}/key/kernel": (40, 2, 16),
        f"self_attention{suffix}/value/kernel": (40, 2, 16),
        f"self_attention{suffix}/out/kernel": (4, 16, 40),
        f"mlp{suffix}/wi_0/kernel": (40, 48),
        f"mlp{suffix}/wi_1/kernel": (40, 48),
        f"mlp{suffix}/wo/kernel": (48, 40),
        f"{pre}/scale": (40,),
        f"{post}/scale": (40,),
    }
    norms = {"query_norm/scale": (16,), "key_norm/scale": (16,)} if "qk_norm" in extra else {}
    biases = {"query/bias": (4, 16), "key/bias": (2, 16), "value/bias": (2, 16)} if "bias" in extra else {}
    block |= {f"self_attention{suffix}/{name}": shape for name, shape in (norms | biases).items()}
    if not layer_norms:
        block |= {f"pre_ffw_norm{suffix}/scale": (40,), f"post_ffw_norm{suffix}/scale": (40,)}
    return block


def stacked(block, count):
    return {path: (shape[0], count, *shape[1:]) for path, shape in block.items()}


def below(prefix, block):
    return {f"decoder/{prefix}/{path}": shape for path, shape in block.items()}


GEMMA2 = maxtext_block("_local", layer_norms=False) | maxtext_block("_global", layer_norms=False)
GEMMA3 = maxtext_block(layer_norms=False, extra=("qk_norm",))
QWEN2, QWEN3 = maxtext_block(extra=("bias",)), maxtext_block(extra=("qk_norm",))
GEMMA3_SCANNED = {
    path: shape
    for slot in range(6)
    for path, shape in below(f"layers/layers_{slot}", stacked(GEMMA3, 2)).items()
} | {path: shape for slot in range(2) for path, shape in below(f"layers_remainder/layers_{slot}", GEMMA3).items()}  # fmt: skip

MAXTEXT = {
    "qwen2 stacked": ("qwen2", BLOCK | BIASES, 4, below("layers", stacked(QWEN2, 4))),
    "qwen3 apart": ("qwen3", BLOCK | QK_NORMS, 2, below("layers_0", QWEN3) | below("layers_1", QWEN3)),
    "gemma2 stacked": ("gemma2", BLOCK | FFW_NORMS, 6, below("layers", stacked(GEMMA2, 3))),
    "gemma2 apart": ("gemma2", BLOCK | FFW_NORMS, 4, below("layers_0", GEMMA2) | below("layers_1", GEMMA2)),
    "gemma3 stacked": ("gemma3_text", BLOCK | QK_NORMS | FFW_NORMS, 14, GEMMA3_SCANNED),
    "gemma3 apart": ("gemma3_text", BLOCK | QK_NORMS | FFW_NORMS, 1, below("layers_0", GEMMA3)),
}


@pytest.mark.parametrize("case", MAXTEXT)
def test_maxtext_families(case):
    model_type, layer, num_layers, decoder = MAXTEXT[case]
    shapes = decoder | {"token_embedder/embedding": (128, 40), "decoder/decoder_norm/scale": (40,)}
    facts = facts_of(CONFIG | {"model_type": model_type, "num_hidden_layers": num_layers})
    plan = detect(shapes, declared(layer, num_layers), facts, "ckpt")
    assert plan.mapping.name == "maxtext"
    values = {path.partition("layers/0/")[2] or path: piece.value for path, piece in plan.pieces.items()}
    is_gemma = "gemma" in model_type
    assert {values[path] for path in values if "norm" in path} == ({"x - 1"} if is_gemma else {None})
    # gemma2: attention without a scale of its own; gemma3 and Qwen have one
    assert values["self_attn/q_proj/kernel"] == ("x * sqrt(head_dim)" if model_type == "gemma2" else None)
    assert values["self_attn/k_proj/kernel"] is values["mlp/up_proj/kernel"] is None
    scale = {"gemma2": "x / sqrt(hidden_size)", "gemma3_text": "x / bfloat16(sqrt(hidden_size))"}
    assert values["embed_tokens/embedding"] == scale.get(model_type)


def test_maxtext_layers_of_patterns_are_numbered_as_hugging_face_does():
    """param_mapping.py: Gemma 2 `range(0, n, 2)` and `range(1, n, 2)`; Gemma 3 `range(slot, scanned, 6)`, then the rest."""
    for case, expected in {
        "gemma2 stacked": {5: ("decoder/layers/mlp_global/wo/kernel", 2), 2: ("decoder/layers/mlp_local/wo/kernel", 1)},
        "gemma3 stacked": {
            10: ("decoder/layers/layers_4/mlp/wo/kernel", 1),
            13: ("decoder/layers_remainder/layers_1/mlp/wo/kernel", None),
        },
    }.items():
        model_type, layer, num_layers, decoder = MAXTEXT[case]
        shapes = decoder | {"token_embedder/embedding": (128, 40), "decoder/decoder_norm/scale": (40,)}
        facts = facts_of(CONFIG | {"model_type": model_type, "num_hidden_layers": num_layers})
        pieces = detect(shapes, declared(layer, num_layers), facts, "ckpt").pieces
        for index, (leaf, captured) in expected.items():
            piece = pieces[f"layers/{index}/mlp/down_proj/kernel"]
            assert (piece.leaf, next(iter(piece.captures.values()), None)) == (leaf, captured)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("layout", ["gemma", "tunix"])
def test_gemmas_own_names_of_four_norms(model_type, layout):
    norms = ["pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"]
    block = {f"{name}/scale": (40,) for name in norms} | {
        "attn/q_einsum/w": (4, 40, 16),
        "attn/kv_einsum/w": (2, 2, 40, 16),
        "attn/attn_vec_einsum/w": (4, 16, 40),
    }
    if layout == "gemma":
        block |= {"mlp/gating_einsum": (2, 48, 40), "mlp/linear": (48, 40)}
        prefix = "layer_0"
    else:
        block |= {path: BLOCK[path] for path in BLOCK if path.startswith("mlp/")}
        prefix = "layers/0"
        if model_type == "gemma2":
            block["post_attn_norm/scale"] = block.pop("post_attention_norm/scale")
    has_qk_norms = model_type == "gemma3_text"
    if has_qk_norms:
        block |= {"attn/_query_norm/scale": (16,), "attn/_key_norm/scale": (16,)}
    shapes = {f"{prefix}/{path}": shape for path, shape in block.items()}
    shapes |= {"embedder/input_embedding": (100, 40), "final_norm/scale": (40,)}
    layer = BLOCK | FFW_NORMS | (QK_NORMS if has_qk_norms else {})
    facts = facts_of(CONFIG | {"model_type": model_type, "num_hidden_layers": 1})
    plan = detect(shapes, declared(layer, 1), facts, "ckpt")
    assert plan.mapping.name == layout
    assert plan.pieces["layers/0/pre_feedforward_layernorm/scale"].leaf == f"{prefix}/pre_ffw_norm/scale"
    assert plan.pieces["layers/0/post_attention_layernorm/scale"].leaf.startswith(f"{prefix}/post_att")


@pytest.mark.parametrize(("model_type", "extra"), [("qwen2", BIASES), ("qwen3", QK_NORMS)])
def test_tunix_qwen(model_type, extra):
    block = {
        "attn/q_proj/w": (40, 4, 16),
        "attn/k_proj/w": (40, 2, 16),
        "attn/v_proj/w": (40, 2, 16),
        "attn/o_proj/w": (4, 16, 40),
        "input_layernorm/w": (40,),
        "post_attention_layernorm/w": (40,),
        "mlp/gate_proj/kernel": (40, 48),
        "mlp/up_proj/kernel": (40, 48),
        "mlp/down_proj/kernel": (48, 40),
    }
    own = {"qwen2": {"attn/q_bias": (64,), "attn/k_bias": (32,), "attn/v_bias": (32,)},
           "qwen3": {"attn/q_norm/w": (16,), "attn/k_norm/w": (16,)}}[model_type]  # fmt: skip
    shapes = {f"layers/0/{path}": shape for path, shape in (block | own).items()}
    shapes |= {"embedder/input_embedding": (100, 40), "final_norm/w": (40,)}
    plan = detect(shapes, declared(BLOCK | extra, 1), facts_of(CONFIG | {"model_type": model_type}), "ckpt")
    assert plan.mapping.name == "tunix"


def test_facts():
    config = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 40, "num_attention_heads": 4},
    }
    assert facts_of(config)["model_type"] == "gemma3_text"
    assert facts_of(config)["head_dim"] == 10
    assert facts_of(config)["rope_type"] == "default"
    assert facts_of({"rope_scaling": {"type": "llama3"}})["rope_type"] == "llama3"
    assert facts_of({"rope_parameters": {"rope_type": "llama3"}, "head_dim": 7})["rope_type"] == "llama3"
    assert flatten({"a_0": 1}) == {mapping.normal_path("a_0"): 1}
