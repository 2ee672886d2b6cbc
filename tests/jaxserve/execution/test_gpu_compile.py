"""The engine's two programs, compiled for an H200 that is not there: a 2-layer slice of Llama-3.1-8B, and its cut over 4 devices.

Spills are compile errors. What a compilation cannot show (speed, numerics, races) is in ADR 0007.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxserve.config import ResolvedConfig
from jaxserve.execution.buckets import MAX_SCORED_BYTES, BackboneBucket
from jaxserve.execution.programs import ProgramFactory
from jaxserve.execution.row_state import row_state_bytes
from jaxserve.models.attention import AttentionContext
from jaxserve.models.linear import LinearContext
from jaxserve.models.model import ModelContext
from jaxserve.models.registry import make_model
from jaxserve.testing.released import LLAMA_8B
from kernels_pallas.gpu_compile import Target, report
from kernels_pallas.paged_attention.tiling import default_tiling
from sharding.mesh import make_mesh

CONFIG = LLAMA_8B | {"num_hidden_layers": 2}
MAX_DECODE_TEMPORARIES = 64 << 20
"""[bytes]"""


def programs(num_devices):
    """Returns (target, factory, bytes of one page array on a device)."""
    model = make_model(CONFIG, tensor_parallel_size=num_devices, dtype=jnp.bfloat16)
    target = Target("h200", num_devices)
    mesh = make_mesh(model.parallel, target.topology.devices)
    tiling = default_tiling("gpu", num_q_heads=32 // num_devices, num_kv_heads=8 // num_devices, head_dim=128, page_size=64)
    config = ResolvedConfig(
        model_name="slice",
        platform="gpu",
        vocab_size=128256,
        tensor_parallel_size=num_devices,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        max_model_len=32768,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        long_prefill_token_threshold=2048,
        page_size=64,
        num_pages=2048,
        max_pages_per_seq=512,
        token_buckets=(512, 2048),
        sequence_buckets=(1, 64, 256),
        split_size=tiling.split_size,
        query_tile=tiling.query_tile,
        max_decode_items=1024,
        max_cached_pages=0,
        max_full_scores=64,
        logprobs_mode="raw",
        logits_processors=(),
        reads_prompt_len=False,
        max_host_bytes=1 << 30,
        seed=0,
        max_logprobs=20,
        attention_backend="triton",
    )
    leaves = {p.path: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16) for p in model.parameters()}
    served = jax.eval_shape(model.served_layout, leaves)
    params = tuple(
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
        for array, spec in zip(served, model.served_specs(), strict=True)
    )
    ctx = ModelContext(LinearContext("gpu"), model.parallel)
    factory = ProgramFactory(model, params, config, mesh, ctx, AttentionContext(tiling, "triton"))
    return target, factory, (2048, 8 // num_devices, 64, 128)


def compile_backbone(num_devices, bucket):
    target, factory, pages = programs(num_devices)
    with target.as_default():
        return report(factory.backbone(bucket).run), pages


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_decode_step_is_in_place(num_devices):
    result, pages = compile_backbone(num_devices, BackboneBucket(64, True))
    pool_bytes = 2 * 2 * 2 * math.prod(pages)  # two layers of K and V in bfloat16
    assert result.aliased_bytes >= pool_bytes
    assert f"bf16[{','.join(map(str, pages))}]" not in result.copied_shapes
    assert result.temporary_bytes < MAX_DECODE_TEMPORARIES
    assert "__gpu$xla.gpu.triton" in result.custom_calls


def test_a_mixed_step_is_in_place():
    result, pages = compile_backbone(1, BackboneBucket(512, False))
    assert result.aliased_bytes >= 2 * 2 * 2 * math.prod(pages)
    assert f"bf16[{','.join(map(str, pages))}]" not in result.copied_shapes


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_the_head_is_in_place(num_devices):
    target, factory, _ = programs(num_devices)
    with target.as_default():
        result = report(factory.head(64).run)
    logits_bytes = 64 * 128256 * 4 // num_devices
    assert result.temporary_bytes < 8 * logits_bytes
    assert result.aliased_bytes >= row_state_bytes(256, 128256)
    assert "s32[256,128256]" not in result.copied_shapes


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_scoring_a_prompt_is_bounded(num_devices):
    """However long the prompt: a call's logits, their log-probabilities and little else."""
    target, factory, _ = programs(num_devices)
    with target.as_default():
        scored, admitted = report(factory.score().run), report(factory.admit().run)
    assert scored.temporary_bytes < 2.5 * MAX_SCORED_BYTES / num_devices
    assert admitted.aliased_bytes >= row_state_bytes(256, 128256)
    assert not admitted.copied_shapes
