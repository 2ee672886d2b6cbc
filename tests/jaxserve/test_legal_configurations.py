"""What `EngineConfig` and a model's shape may legally ask of the kernels is served, on a CPU and on GPUs that are not here.

Programs are traced, not compiled: an implementation refuses while it is traced. What compiles is `test_gpu_compile`'s.
"""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.execution import step
from jaxserve.execution.batch import backbone_layout, unpack_step_inputs
from jaxserve.execution.buckets import Ladder
from jaxserve.execution.memory import MAX_POOL_TOKENS, check_addressable
from jaxserve.execution.state import abstract_state
from jaxserve.model_source import ModelSource
from jaxserve.models.attention import AttentionContext
from jaxserve.plan import KVSpec, kv_groups
from jaxserve.resolve import resolve
from kernels_pallas.gpu_compile import Target
from kernels_pallas.paged_attention.cases import pairwise
from sharding.mesh import TensorParallelism, make_mesh

FACTORS = {
    "device": ("cpu", "h200", "a100", "l4"),
    "page_size": (8, 16, 32, 64, 128, 256),
    "head_dim": (1, 21, 128, 256, 576),
    "heads": ((1, 1), (7, 1), (71, 1), (128, 1), (12, 4), (4, 4)),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "window": (None, 1, 40, 2**31 - 1),
    "max_model_len": (1, 17, 1009, 131072),
    "max_num_seqs": (1, 3, 200),
    "spare_pages": (0, 5),
    "token_budget": ("smallest", "default"),
}
ROWS = pairwise(FACTORS)
SOURCE = ModelSource("attention", {}, None, None, None)


@dataclasses.dataclass
class Attention:
    """A model of nothing but attention: a layer of the asked shape, and a full one beside it that shares the tiles."""

    num_heads: int
    specs: tuple[KVSpec, ...]
    dtype: jnp.dtype
    vocab_size: int = 128
    max_model_len: int = 2**31 - 1
    is_float32_only: bool = False
    reads_prompt_len: bool = False

    def kv_specs(self):
        return self.specs

    def backbone(self, params, tokens_T, positions_T, cache, ctx):
        num_tokens, hidden = tokens_T.shape[0], 0.0
        for layer, spec in enumerate(self.specs):
            k_TKH = jnp.ones((num_tokens, spec.num_kv_heads, spec.head_dim), self.dtype)
            cache.write(layer, k_TKH, k_TKH)
            q_TNH = jnp.ones((num_tokens, self.num_heads, spec.head_dim), self.dtype)
            hidden += cache.attend(layer, q_TNH, scale=0.125).astype(jnp.float32).sum(axis=(1, 2))
        return hidden[:, None]


@functools.cache
def target(name: str) -> Target:
    return Target(name)


@contextlib.contextmanager
def on(device_name: str):
    """Yields (platform, device), the device being jax's default; deviceless for a GPU."""
    device = jax.devices()[0] if device_name == "cpu" else target(device_name).topology.devices[0]
    with jax.default_device(device):
        yield device.platform, device


def resolve_for(model: Attention, config: EngineConfig, platform: str, device):
    mesh = make_mesh(TensorParallelism(), [device])
    return *resolve(config, SOURCE, model, platform, mesh), mesh


def primitives(jaxpr) -> set[str]:
    """Returns the names of the outermost kernels and loops: enough to tell Triton from XLA."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        if eqn.primitive.name in ("pjit", "jit"):
            found |= primitives(eqn.params["jaxpr"].jaxpr)
    return found


def trace_ladder(model, config, resolved, tiling, mesh) -> list[set[str]]:
    """Traces the smallest and the largest program of either kind, as the runner would."""
    ladder = Ladder(resolved)
    state = abstract_state(model.kv_specs(), resolved, mesh)
    by_kind = [[bucket for bucket in ladder.backbones() if bucket.is_decode == is_decode] for is_decode in (True, False)]
    found = []
    for bucket in dict.fromkeys(bucket for buckets in by_kind for bucket in (buckets[0], buckets[-1])):
        layout = backbone_layout(ladder, bucket, len(kv_groups(model.kv_specs())))

        def program(state, buffer, layout=layout):
            context = AttentionContext(tiling, config.attention_backend)
            inputs = unpack_step_inputs(layout, buffer)
            return step.backbone(None, state, inputs, model=model, ctx=None, attention=context, num_hidden=0)

        jaxpr = jax.make_jaxpr(program)(state, jax.ShapeDtypeStruct((layout.size,), jnp.int32))
        found.append(primitives(jaxpr.jaxpr))
    return found


def model_of(row: dict, platform: str) -> Attention:
    dtype = row["dtype"] if row["dtype"] != "auto" else {"cpu": "float32", "gpu": "bfloat16"}[platform]
    num_heads, num_kv_heads = row["heads"]
    window = row["window"]
    asked = KVSpec("full" if window is None else "window", num_kv_heads, row["head_dim"], window)
    # Beside it, fewer KV heads of another size: the tiles have to fit both.
    other = KVSpec("full", math.gcd(num_kv_heads, 2), 2 * row["head_dim"])
    return Attention(num_heads, (asked, other), jnp.dtype(dtype))


def named(index: int, row: dict):
    """Returns a row as a parameter: every fifth in the tests of every change, the others in the slow ones."""
    marks = pytest.mark.slow if index % 5 else ()
    return pytest.param(row, id="-".join(map(str, row.values())).replace(" ", ""), marks=marks)


@pytest.mark.parametrize("row", [named(index, row) for index, row in enumerate(ROWS)])
def test_every_legal_configuration_is_served(row):
    num_pages = -(-row["max_model_len"] // row["page_size"]) + row["spare_pages"]
    config = EngineConfig(
        dtype=row["dtype"],
        max_model_len=row["max_model_len"],
        max_num_seqs=row["max_num_seqs"],
        max_num_batched_tokens=row["max_num_seqs"] if row["token_budget"] == "smallest" else None,
        page_size=row["page_size"],
        num_pages=num_pages,
    )
    with on(row["device"]) as (platform, device):
        model = model_of(row, platform)
        resolved, tiling, mesh = resolve_for(model, config, platform, device)
        assert (resolved.page_size, resolved.num_pages) == (row["page_size"], num_pages)
        programs = trace_ladder(model, config, resolved, tiling, mesh)
    fits_triton = platform == "gpu" and row["head_dim"] <= 256
    assert all(("pallas_call" in found) == fits_triton for found in programs), "the kernel of choice"


def refusal(device_name: str, spec: KVSpec, *, num_heads: int = 4, **settings) -> str:
    """Returns the ConfigError's words."""
    config = EngineConfig(**{"page_size": 16, "num_pages": 64, "max_model_len": 256, **settings})
    with on(device_name) as (platform, device):
        dtype = jnp.dtype("float32" if config.dtype == "auto" else config.dtype)
        with pytest.raises(ConfigError) as caught:
            resolve_for(Attention(num_heads, (spec,), dtype), config, platform, device)
    return str(caught.value)


def test_a_backend_that_cannot_serve_the_model_is_named_before_anything_compiles():
    small, wide = KVSpec("full", 2, 64), KVSpec("full", 2, 512)
    said = refusal("cpu", small, attention_backend="triton")
    assert said.startswith("attention_backend 'triton' cannot serve this model here: ")
    assert "no Triton on platform 'cpu'" in said and "'auto' takes the first that can" in said
    assert "head_dim 512 > 256" in refusal("h200", wide, attention_backend="triton")
    # On a CPU the pages are float32 whatever the model computes in.
    said = refusal("cpu", small, attention_backend="triton_interpret", dtype="bfloat16")
    assert "pages are float32, q is bfloat16" in said


def test_a_gpu_does_not_claim_to_be_deterministic():
    assert "matmul for each number of rows" in refusal("h200", KVSpec("full", 2, 64), deterministic=True)


def test_every_layer_has_to_be_served():
    config = EngineConfig(page_size=16, num_pages=64, max_model_len=256, attention_backend="triton")
    with on("h200") as (platform, device), pytest.raises(ConfigError, match="head_dim 512 > 256"):
        model = Attention(4, (KVSpec("full", 2, 64), KVSpec("full", 1, 512)), jnp.dtype("bfloat16"))
        resolve_for(model, config, platform, device)


def test_tiles_follow_the_device_and_the_element():
    """Float32 needs smaller tiles than 16 bits, and an L4 smaller ones than an H200, or the kernel would not fit."""
    config = EngineConfig(page_size=16, num_pages=64, max_model_len=256)
    tiles = {}
    for device_name, dtype in (("h200", "bfloat16"), ("l4", "bfloat16"), ("h200", "float32")):
        with on(device_name) as (platform, device):
            model = Attention(4, (KVSpec("full", 2, 128),), jnp.dtype(dtype))
            asked = dataclasses.replace(config, dtype=dtype)
            tiles[device_name, dtype] = resolve_for(model, asked, platform, device)[1]
    rows = {key: tiling.query_tile * tiling.head_block for key, tiling in tiles.items()}
    assert rows["h200", "bfloat16"] > rows["l4", "bfloat16"]
    assert tiles["h200", "bfloat16"].kv_block > tiles["h200", "float32"].kv_block


def test_a_pool_whose_slots_are_no_32_bit_numbers_is_refused():
    check_addressable(MAX_POOL_TOKENS // 256, 256)
    with pytest.raises(
        ConfigError, match=r"num_pages \(8388608\) times page_size \(256\).*Lower num_pages to at most 8388607"
    ):
        check_addressable(2**31 // 256, 256)
