"""The served layout as a permutation: which heads, columns and biases each device gets."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.registry import make_model
from jaxserve.testing.tiny_checkpoint import TinyModel

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 1), (8, 4), (2, 4), (1, 8), (4, 2)])
def test_each_device_gets_its_own_heads_and_their_biases(num_kv_heads, size):
    """Kernels and biases whose columns say which head they belong to: a device's queries must lie with their own KV heads."""
    shape = TinyModel(num_heads=8, num_kv_heads=num_kv_heads, head_dim=4, hidden_size=8, num_layers=1, extra_config=BIASES)
    model = make_model(shape.config(), tensor_parallel_size=size)
    leaves = {p.path: np.zeros(p.shape, np.float32) for p in model.parameters()}
    attention = "layers/0/self_attn"
    for leaf in ("kernel", "bias"):
        leaves[f"{attention}/q_proj/{leaf}"][...] = np.repeat(np.arange(8), 4)
        leaves[f"{attention}/k_proj/{leaf}"][...] = np.repeat(np.arange(num_kv_heads) + 100, 4)
        leaves[f"{attention}/v_proj/{leaf}"][...] = np.repeat(np.arange(num_kv_heads) + 200, 4)
    leaves[f"{attention}/o_proj/kernel"][:] = np.repeat(np.arange(8), 4)[:, None]
    layer = model._module(model.served_layout({path: jnp.asarray(leaf) for path, leaf in leaves.items()})).layers[0]
    qkv = np.asarray(layer.qkv.get_value())[:, 0].reshape(size, -1, 4)[:, :, 0]
    np.testing.assert_array_equal(np.asarray(layer.qkv_bias.get_value()), np.asarray(layer.qkv.get_value())[:, 0])
    o = np.asarray(layer.o.get_value())[0].reshape(size, -1, 4)[:, :, 0]
    num_q, num_kv = 8 // size, max(1, num_kv_heads // size)
    seen = []
    for device in range(size):
        queries, keys, values = np.split(qkv[device], [num_q, num_q + num_kv])
        np.testing.assert_array_equal(keys - 100, values - 200)
        own = [int(q) // (8 // num_kv_heads) for q in queries]
        local = [int(keys[i // (num_q // num_kv)]) - 100 for i in range(num_q)]
        assert own == local, "query i of a device reads its local KV head i // (N / K)"
        np.testing.assert_array_equal(queries, o[device])
        seen += queries.astype(int).tolist()
    assert sorted(seen) == list(range(8))


def test_gate_and_up_lie_side_by_side_on_each_device():
    model = make_model(TinyModel(num_layers=1, intermediate_size=8, extra_config=BIASES).config(), tensor_parallel_size=2)
    leaves = {p.path: np.zeros(p.shape, np.float32) for p in model.parameters()}
    for leaf in ("kernel", "bias"):
        leaves[f"layers/0/mlp/gate_proj/{leaf}"][...] = np.arange(8)
        leaves[f"layers/0/mlp/up_proj/{leaf}"][...] = np.arange(8) + 100
    layer = model._module(model.served_layout({path: jnp.asarray(leaf) for path, leaf in leaves.items()})).layers[0]
    expected = [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107]
    np.testing.assert_array_equal(np.asarray(layer.gate_up_bias.get_value()), expected)
    np.testing.assert_array_equal(np.asarray(layer.gate_up.get_value())[:, 0], expected)
