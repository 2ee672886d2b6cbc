"""Every kind of checkpoint that Flax programs write converts in one command to the very bits it came from."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from orbax.checkpoint import v1
from typer.testing import CliRunner

from jaxserve import LLM
from jaxserve.checkpoints import orbax_store
from jaxserve.models.weights import flatten
from jaxserve.request import SamplingParams
from jaxserve.testing.tiny_checkpoint import LLAMA3_ROPE_SCALING, write_tiny_llama
from serve.cli import app


@pytest.fixture
def converted(tmp_path):
    """Returns a function that runs `jaxserve convert` and returns the tensors that Orbax finds in the result."""

    def converted(source, known, *arguments, dtype=None):
        config = known.write_config(tmp_path / "config.json")
        destination = tmp_path / "converted"
        result = CliRunner().invoke(app, ["convert", str(source), str(destination), "--config", str(config), *arguments])
        assert result.exit_code == 0, result.stderr
        assert dtype or (destination / "config.json").read_bytes() == config.read_bytes()
        orbax_store.verify(destination)
        return flatten(v1.load(str(destination / "params"))), result.stderr

    return converted


def assert_same_bits(tensors, expected):
    assert tensors.keys() == expected.keys()
    for path, tensor in tensors.items():
        assert tensor.shape == expected[path].shape and tensor.dtype == expected[path].dtype, path
        assert np.asarray(tensor).tobytes() == np.ascontiguousarray(expected[path]).tobytes(), path


def save_by_manager(path, tree, *steps):
    """As MaxText does: an item `items`, OCDBT and zarr3."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    with ocp.CheckpointManager(path, item_names=("items",), item_handlers={"items": handler}) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))
        manager.wait_until_finished()


def save_standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


ROPE = {"rope_scaling": LLAMA3_ROPE_SCALING}


@pytest.mark.parametrize("has_train_state", [False, True], ids=["parameters", "train state"])
@pytest.mark.parametrize(
    ("is_stacked", "fields"),
    [(True, {"dtype": "bfloat16"}), (False, {}), (True, ROPE), (False, ROPE | {"dtype": "bfloat16"})],
    ids=["stacked", "unstacked", "stacked, interleaved", "unstacked, interleaved"],
)
def test_maxtext(is_stacked, fields, has_train_state, known, trees, converted, tmp_path):
    known = known(**fields)
    params = {"params": jax.tree.map(jnp.asarray, trees.maxtext(known, is_stacked=is_stacked))}
    source = tmp_path / "maxtext"
    if has_train_state:
        state = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-3))
        save_by_manager(source, state, 3, 12)
    else:
        ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=True).save(source, {"params": params})
    tensors, said = converted(source, known)
    assert_same_bits(tensors, known.canonical)
    assert ("(maxtext tree of step 12)" if has_train_state else "(maxtext tree)") in said


def test_a_train_state_without_the_second_params_level(known, trees, converted, tmp_path):
    known = known()
    save_by_manager(tmp_path / "maxtext", {"step": 1, "params": trees.maxtext(known, is_stacked=True), "opt_state": [{}]}, 0)
    assert_same_bits(converted(tmp_path / "maxtext", known)[0], known.canonical)


def maxtext_export(kernel, head_dim):
    """What MaxText's own to_huggingface does to a query kernel's values (scale_query_layer)."""
    return (kernel.astype(np.float32) * np.dtype("float32").type(np.sqrt(head_dim))).astype(kernel.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_dim_of_no_power_of_four_gives_the_bits_of_maxtexts_own_export(dtype, known, trees, converted, tmp_path):
    """sqrt(8) is no power of two: MaxText's import has rounded, and the original is lost. What MaxText exports comes out."""
    known = known(dtype=dtype, head_dim=8)
    tree = trees.maxtext(known, is_stacked=False)
    expected = dict(known.canonical)
    for index in range(known.model.num_layers):
        stored = tree["decoder"][f"layers_{index}"]["self_attention"]["query"]["kernel"]
        expected[f"layers/{index}/self_attn/q_proj/kernel"] = maxtext_export(stored, 8).reshape(known.model.hidden_size, -1)
    query = "layers/0/self_attn/q_proj/kernel"
    assert expected[query].tobytes() != np.ascontiguousarray(known.canonical[query]).tobytes()
    ocp.PyTreeCheckpointer().save(tmp_path / "maxtext", {"params": {"params": tree}})
    assert_same_bits(converted(tmp_path / "maxtext", known)[0], expected)


def test_a_float32_checkpoint_of_a_bfloat16_model_comes_back_exactly_whatever_its_head_dim(
    known, trees, converted, tmp_path
):
    """MaxText keeps weights in float32 unless told otherwise: what its import rounds is far below a step of bfloat16."""
    known = known(dtype="bfloat16", head_dim=8)
    wide = types.SimpleNamespace(**vars(known))
    wide.tensors = {name: tensor.astype(np.float32) for name, tensor in known.tensors.items()}
    for method in ("weight", "heads", "heads_out"):
        setattr(wide, method, types.MethodType(getattr(type(known), method), wide))
    tree = trees.maxtext(wide, is_stacked=True)
    assert tree["decoder"]["layers"]["self_attention"]["query"]["kernel"].dtype == np.float32
    ocp.PyTreeCheckpointer().save(tmp_path / "maxtext", {"params": {"params": tree}})
    assert_same_bits(converted(tmp_path / "maxtext", known, "--dtype", "bfloat16", dtype="bfloat16")[0], known.canonical)


@pytest.mark.parametrize("form", ["nested", "nested, [2, D, F]", "flat", "stacked"])
def test_gemma(form, known, trees, converted, tmp_path):
    known = known(is_tied=True, num_layers=7 if form == "stacked" else 3, dtype="float32" if form == "flat" else "bfloat16")
    save_standard(tmp_path / "gemma", trees.gemma(known, form))
    tensors, said = converted(tmp_path / "gemma", known)
    assert_same_bits(tensors, known.canonical)
    assert "(gemma tree)" in said


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("form", ["nested", "stacked"])
def test_each_gemma(family, form, known, trees, converted, tmp_path):
    known = known(family=family, is_tied=True, num_layers=7 if form == "stacked" else 2, dtype="bfloat16")
    save_standard(tmp_path / "gemma", trees.gemma(known, form))
    tensors, said = converted(tmp_path / "gemma", known)
    assert_same_bits(tensors, known.canonical)
    assert "(gemma tree)" in said


def test_gemma_with_one_matrix_for_queries_keys_and_values(known, trees, converted, tmp_path):
    """Gemma 7B has as many key and value heads as query heads; its train state is Kauldron's."""
    known = known(is_tied=True, num_kv_heads=4)
    tree = trees.gemma(known, "nested")
    for index in range(known.model.num_layers):
        attention = tree[f"layer_{index}"]["attn"]
        query, pair = attention.pop("q_einsum")["w"], attention.pop("kv_einsum")["w"]
        attention["qkv_einsum"] = {"w": np.stack([query, *pair])}
    save_by_manager(tmp_path / "gemma", {"step": 3, "params": tree, "opt_state": {"mu": tree}}, 3)
    assert_same_bits(converted(tmp_path / "gemma", known)[0], known.canonical)


class Attention(nn.Module):
    """Heads as an axis of their own, as flax.linen.MultiHeadDotProductAttention has them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, x):
        def heads(name, count):
            return nn.DenseGeneral((count, self.head_dim), use_bias=False, name=name)(x)

        heads("k_proj", self.num_kv_heads), heads("v_proj", self.num_kv_heads)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="o_proj")(heads("q_proj", self.num_heads))


class Layer(nn.Module):
    model: object

    @nn.compact
    def __call__(self, x, _=None):
        m = self.model
        y = nn.RMSNorm(name="input_layernorm")(x)
        x = x + Attention(m.num_heads, m.num_kv_heads, m.head_dim, name="self_attn")(y)
        return x + Mlp(m.intermediate_size, name="mlp")(nn.RMSNorm(name="post_attention_layernorm")(x)), None


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = [nn.Dense(self.width, use_bias=False, name=name)(x) for name in ("gate_proj", "up_proj")]
        return nn.Dense(x.shape[-1], use_bias=False, name="down_proj")(hidden[0] * hidden[1])


class Layers(nn.Module):
    model: object

    @nn.compact
    def __call__(self, x):
        for index in range(self.model.num_layers):
            x, _ = Layer(self.model, name=str(index))(x)
        return x


class Backbone(nn.Module):
    model: object
    is_scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.model.vocab_size, self.model.hidden_size, name="embed_tokens")(tokens)
        if self.is_scanned:
            scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.model.num_layers)
            x, _ = scan(self.model, name="layers")(x, None)
        else:
            x = Layers(self.model, name="layers")(x)
        return nn.RMSNorm(name="norm")(x)


class CausalLM(nn.Module):
    """A Linen Llama with the names of Hugging Face."""

    model: object
    is_scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = Backbone(self.model, self.is_scanned, name="model")(tokens)
        return nn.Dense(self.model.vocab_size, use_bias=False, name="lm_head")(x)


def canonical_of(path):
    return flatten({path.removeprefix("model/"): None}).popitem()[0]


def filled(params, known, *, is_scanned=False):
    """Returns a module's fresh parameters with the known values in their places."""

    def value(keys, leaf):
        path = canonical_of("/".join(str(getattr(key, "key", key)) for key in keys))
        if is_scanned and path.startswith("layers/"):
            rest = path.removeprefix("layers/")
            known_value = np.stack([known.canonical[f"layers/{index}/{rest}"] for index in range(known.model.num_layers)])
        else:
            known_value = known.canonical[path]
        return jnp.asarray(known_value.reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(value, params)


@pytest.mark.parametrize("is_scanned", [False, True], ids=["layers apart", "nn.scan"])
def test_linen(is_scanned, known, converted, tmp_path):
    known = known(dtype="bfloat16" if is_scanned else "float32")
    module = CausalLM(known.model, is_scanned)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = filled(shapes, known, is_scanned=is_scanned)
    if is_scanned:
        v1.save(str(tmp_path / "linen"), {"params": params})
    else:
        with ocp.CheckpointManager(tmp_path / "linen") as manager:
            manager.save(5, args=ocp.args.StandardSave(params))
    tensors, said = converted(tmp_path / "linen", known)
    assert_same_bits(tensors, known.canonical)
    assert "(linen tree" in said


def test_linen_norms_with_a_weight_and_without_a_head(known, converted, tmp_path):
    """As the Flax models of transformers had them."""
    known = known(is_tied=True, dtype="bfloat16")
    tree = {}
    for path, leaf in known.canonical.items():
        keys = ("model/" + path.replace("norm/scale", "norm/weight")).split("/")
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "linen", tree)
    assert_same_bits(converted(tmp_path / "linen", known)[0], known.canonical)


LINEAR = {"use_bias": False, "kernel_init": nnx.initializers.zeros_init()}  # random numbers would only take time


class NnxAttention(nnx.Module):
    def __init__(self, m, rngs):
        shape = (m.num_heads, m.head_dim)
        self.q_proj = nnx.LinearGeneral(m.hidden_size, shape, **LINEAR, rngs=rngs)
        self.k_proj = nnx.LinearGeneral(m.hidden_size, (m.num_kv_heads, m.head_dim), **LINEAR, rngs=rngs)
        self.v_proj = nnx.LinearGeneral(m.hidden_size, (m.num_kv_heads, m.head_dim), **LINEAR, rngs=rngs)
        self.o_proj = nnx.LinearGeneral(shape, m.hidden_size, axis=(-2, -1), **LINEAR, rngs=rngs)


class NnxMlp(nnx.Module):
    def __init__(self, m, rngs):
        self.gate_proj = nnx.Linear(m.hidden_size, m.intermediate_size, **LINEAR, rngs=rngs)
        self.up_proj = nnx.Linear(m.hidden_size, m.intermediate_size, **LINEAR, rngs=rngs)
        self.down_proj = nnx.Linear(m.intermediate_size, m.hidden_size, **LINEAR, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class NnxLayer(nnx.Module):
    def __init__(self, m, rngs):
        self.input_layernorm = nnx.RMSNorm(m.hidden_size, rngs=rngs)
        self.self_attn = NnxAttention(m, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(m.hidden_size, rngs=rngs)
        self.mlp = NnxMlp(m, rngs)


class NnxCausalLM(nnx.Module):
    """An NNX Llama with the names of Hugging Face and random state of its own."""

    def __init__(self, m, rngs):
        self.embed_tokens = nnx.Embed(m.vocab_size, m.hidden_size, embedding_init=LINEAR["kernel_init"], rngs=rngs)
        self.layers = nnx.List([NnxLayer(m, rngs) for _ in range(m.num_layers)])
        self.norm = nnx.RMSNorm(m.hidden_size, rngs=rngs)
        self.lm_head = nnx.Linear(m.hidden_size, m.vocab_size, **LINEAR, rngs=rngs)


def nnx_state(known):
    module = NnxCausalLM(known.model, nnx.Rngs(0))
    nnx.update(module, filled(nnx.to_pure_dict(nnx.state(module, nnx.Param)), known))
    return nnx.state(module)


@pytest.mark.parametrize("form", ["nnx.State", "pure dict in a train state"])
def test_nnx(form, known, converted, tmp_path):
    known = known(dtype="bfloat16" if form == "nnx.State" else "float32")
    state = nnx_state(known)
    if form == "nnx.State":
        save_standard(tmp_path / "nnx", state)
    else:
        model = nnx.to_pure_dict(nnx.filter_state(state, nnx.Param))
        v1.save(
            str(tmp_path / "nnx"), {"model": model, "optimizer": {"step": jnp.zeros((), jnp.uint32), "opt_state": model}}
        )
    tensors, said = converted(tmp_path / "nnx", known)
    assert_same_bits(tensors, known.canonical)
    assert "(nnx tree)" in said


class Einsum(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(jnp.asarray(w))


class Holder(nnx.Module):
    """A module with the given attributes."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


def tunix_llama(known):
    """tunix/models/llama3/model.py, which Qwen's follow."""

    def kernel(name, index):
        return Holder(kernel=nnx.Param(jnp.asarray(known.weight(f"mlp.{name}_proj", index).T)))

    def layer(index):
        attention = {f"{name}_proj": Einsum(known.heads(name, index)) for name in "qkv"}
        if known.model.family == "qwen2":  # tunix/models/qwen2/model.py
            biases = {name: known.tensors[f"model.layers.{index}.self_attn.{name}_proj.bias"] for name in "qkv"}
            attention |= {f"{name}_bias": nnx.Param(jnp.asarray(bias)) for name, bias in biases.items()}
        if known.model.family == "qwen3":  # tunix/models/qwen3/model.py
            attention |= {f"{name}_norm": Einsum(known.weight(f"self_attn.{name}_norm", index)) for name in "qk"}
        return Holder(
            input_layernorm=Einsum(known.weight("input_layernorm", index)),
            attn=Holder(**attention, o_proj=Einsum(known.heads_out(index))),
            mlp=Holder(**{f"{name}_proj": kernel(name, index) for name in ("gate", "up", "down")}),
            post_attention_layernorm=Einsum(known.weight("post_attention_layernorm", index)),
        )

    return Holder(
        embedder=Holder(input_embedding=nnx.Param(jnp.asarray(known.weight("model.embed_tokens")))),
        layers=nnx.List([layer(index) for index in range(known.model.num_layers)]),
        final_norm=Einsum(known.weight("model.norm")),
        lm_head=Einsum(known.weight("lm_head").T),
    )


def test_tunix(known, converted, tmp_path):
    """As its trainer saves: Orbax v1's training Checkpointer, `model_params` beside `optimizer_state`."""
    known = known(dtype="bfloat16")
    model = tunix_llama(known)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    checkpointables = {"model_params": nnx.state(model), "optimizer_state": nnx.state(optimizer, nnx.optimizer.OptState)}
    with v1.training.Checkpointer(str(tmp_path / "tunix")) as checkpointer:
        checkpointer.save_checkpointables(20, checkpointables)
    tensors, said = converted(tmp_path / "tunix", known)
    assert_same_bits(tensors, known.canonical)
    assert "(tunix tree of step 20)" in said


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_tunix_qwen(family, known, converted, tmp_path):
    fields = {"extra_config": {"attention_bias": False}} if family == "qwen3" else {}
    known = known(family=family, dtype="bfloat16", **fields)
    save_standard(tmp_path / "tunix", nnx.state(tunix_llama(known)))
    tensors, said = converted(tmp_path / "tunix", known)
    assert_same_bits(tensors, known.canonical)
    assert "(tunix tree)" in said


def test_tunix_gemma(known, trees, converted, tmp_path):
    """tunix/models/gemma/params.py: the leaves of gemma's own, gate and up apart and transposed."""
    known = known(is_tied=True)
    source = trees.gemma(known, "nested")
    tree = {name: source[name] for name in ("embedder", "final_norm")} | {"layers": {}}
    for index in range(known.model.num_layers):
        layer = source[f"layer_{index}"]
        gate, up = layer["mlp"]["gating_einsum"]
        kernels = {"gate_proj": gate.T, "up_proj": up.T, "down_proj": layer["mlp"]["linear"]}
        tree["layers"][str(index)] = layer | {"mlp": {name: {"kernel": value} for name, value in kernels.items()}}
    save_standard(tmp_path / "tunix", tree)
    tensors, said = converted(tmp_path / "tunix", known)
    assert_same_bits(tensors, known.canonical)
    assert "(tunix tree)" in said


def test_a_bare_step_directory_of_the_canonical_tree(known, converted, tmp_path):
    """The payload of one of our own checkpoints, or what a trainer with our names saves: the step itself, and the item in it."""
    known = known(dtype="bfloat16")
    tree = {}
    for path, leaf in known.canonical.items():
        tree = jax.tree.map(lambda x: x, tree)
        node = tree
        *parents, name = path.replace("layers/", "layers_").split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = jnp.asarray(leaf)
    save_by_manager(tmp_path / "run", tree, 7)
    for source in (tmp_path / "run/7", tmp_path / "run/7/items"):
        tensors, said = converted(source, known, "--overwrite")
        assert_same_bits(tensors, known.canonical)
        assert "(canonical tree)" in said


def test_the_tokens_are_those_of_the_hugging_face_directory(known, trees, tmp_path):
    """From a stacked train state to a server's directory, and the same tree given in memory."""
    known = known(**ROPE, vocab_size=320, tokenizer="bytes")
    huggingface = write_tiny_llama(tmp_path / "huggingface", known.model)
    tree = trees.maxtext(known, is_stacked=True)
    save_by_manager(tmp_path / "maxtext", {"params": {"params": tree}, "step": 3}, 3)
    arguments = [str(tmp_path / "maxtext"), str(tmp_path / "converted"), "--config", str(huggingface)]
    assert CliRunner().invoke(app, ["convert", *arguments]).exit_code == 0
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "page_size": 8, "num_pages": 16, "use_tqdm": False}
    limits["max_model_len"] = 64

    def tokens(*model, **params):
        with LLM(*model, **params, **limits) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            (output,) = llm.generate([[9, 8, 7, 50]], sampling, use_tqdm=False)
            return output.outputs[0].token_ids

    expected = tokens(str(huggingface))
    assert len(set(expected)) > 4
    assert (tmp_path / "converted/tokenizer.json").read_bytes() == (huggingface / "tokenizer.json").read_bytes()
    assert tokens(str(tmp_path / "converted")) == expected
    assert tokens(params={"params": {"params": tree}}, config=known.config) == expected
