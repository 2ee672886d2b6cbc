"""From what was asked for and what is there, a model on a platform, to what an engine runs with: every field decided.

Knows defaults and limits; builds nothing.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.errors import ConfigError
from jaxserve.execution.buckets import num_scored_tokens, powers_of_two
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.execution.memory import (
    CPU_DEFAULT_KV_BYTES,
    check_addressable,
    check_fits,
    check_host_memory,
    free_device_bytes,
    host_memory_bytes,
    num_pages_for,
    page_bytes,
)
from jaxserve.execution.row_state import row_state_bytes
from jaxserve.model_source import ModelSource
from jaxserve.models.model import Model
from jaxserve.plan import kv_groups
from kernels_pallas.paged_attention.api import IMPLEMENTATIONS, check_supported
from kernels_pallas.paged_attention.tiling import Tiling, default_tiling
from sharding.mesh import TensorParallelism


@dataclass(frozen=True, slots=True)
class PlatformDefaults:
    """What is decided where the caller did not; measured choices are in `docs/log.md`."""

    dtype: str
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    bucket_factor: int
    smallest_token_bucket: int


DEFAULTS = {
    "cpu": PlatformDefaults("float32", 16, 32, 512, 4, 32),
    "gpu": PlatformDefaults("bfloat16", 64, 256, 8192, 2, 256),
}


MIN_CACHED_PAGES = 512
"""Pages that the prefix cache may give in one step, or one longest context if that is more: each is a row of the step's input."""


def parallelism(config: EngineConfig, model: Model) -> TensorParallelism:
    return TensorParallelism.of(config.tensor_parallel_size, model.kv_specs()[0].num_kv_heads)


def resolve(
    config: EngineConfig,
    source: ModelSource,
    model: Model,
    platform: str,
    mesh: Mesh,
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[ResolvedConfig, Tiling]:
    """Returns every decided field, and the tiles of attention on this platform."""
    if config.deterministic and platform != "cpu":
        raise ConfigError(
            f"deterministic must be False on platform {platform!r}, got True: there XLA chooses a matmul for each number of rows "
            "anew, and which adds in which order is not known before it runs. On a CPU it holds."
        )
    defaults = DEFAULTS[platform]
    parallel = parallelism(config, model)
    specs = model.kv_specs()
    dtype = _dtype(config, model, platform)
    kv_dtype = "float32" if platform == "cpu" or model.is_float32_only else dtype
    page_size = config.page_size or defaults.page_size
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    max_tokens = config.max_num_batched_tokens or max(defaults.max_num_batched_tokens, max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_tokens}) must be at least max_num_seqs ({max_num_seqs}): a step that decodes every "
            "sequence needs a token for each."
        )
    bytes_a_page = page_bytes(specs, page_size, kv_dtype, parallel.kv)
    num_pages = config.num_pages or num_pages_for(
        _kv_bytes(config, mesh, row_state_bytes(max_num_seqs, model.vocab_size)), bytes_a_page
    )
    max_model_len = _max_model_len(config, model, num_pages * page_size)
    check_fits(num_pages, page_size, max_model_len, bytes_a_page)
    if platform == "cpu":
        check_host_memory(num_pages * bytes_a_page * parallel.size)
    check_addressable(num_pages, page_size)
    num_pages = min(num_pages, max_num_seqs * -(-max_model_len // page_size)) if not config.num_pages else num_pages
    if config.attention_backend not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ConfigError(f"attention_backend must be one of {names}, got {config.attention_backend!r}.")
    tiling = _attention_tiling(config, model, platform, mesh, page_size, dtype, kv_dtype)
    splits = -(-max_model_len // tiling.split_size)
    resolved = ResolvedConfig(
        model_name=source.name,
        platform=platform,
        vocab_size=model.vocab_size,
        tensor_parallel_size=parallel.size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        long_prefill_token_threshold=_long_prefill_threshold(config, max_tokens, page_size),
        page_size=page_size,
        num_pages=num_pages,
        max_pages_per_seq=-(-max_model_len // page_size),
        token_buckets=_buckets(
            "token_buckets", config.token_buckets, min(defaults.smallest_token_bucket, max_tokens), max_tokens, defaults
        ),
        sequence_buckets=_buckets("sequence_buckets", config.sequence_buckets, 1, max_num_seqs, defaults),
        split_size=tiling.split_size,
        query_tile=tiling.query_tile,
        # Every row's first split, and all splits that a full pool can hold; shared pages may ask for more and then wait.
        max_decode_items=max(splits, max_num_seqs + num_pages * page_size // tiling.split_size),
        max_cached_pages=max(-(-max_model_len // page_size), MIN_CACHED_PAGES) if config.enable_prefix_caching else 0,
        max_full_scores=num_scored_tokens(model.vocab_size, max_tokens),
        reads_prompt_len=model.reads_prompt_len,
        max_host_bytes=config.max_host_bytes or host_memory_bytes() // 4,
        seed=config.seed,
        max_logprobs=min(config.max_logprobs, model.vocab_size),
        logprobs_mode=config.logprobs_mode,
        logits_processors=tuple((p.name, p.num_params) for p in processors),
        attention_backend=config.attention_backend,
        deterministic=config.deterministic,
    )
    return resolved, tiling


def _attention_tiling(
    config: EngineConfig, model: Model, platform: str, mesh: Mesh, page_size: int, dtype: str, kv_dtype: str
) -> Tiling:
    """Returns the tiles that fit every layer; raises ConfigError if the attention backend refuses one."""
    parallel = parallelism(config, model)
    groups = kv_groups(model.kv_specs())
    num_q_heads = max(1, model.num_heads // parallel.size)
    kv_heads = [max(1, spec.num_kv_heads // parallel.kv) for spec in groups]
    tiling = default_tiling(
        platform,
        num_q_heads=num_q_heads,
        num_kv_heads=min(kv_heads),
        head_dim=max(spec.head_dim for spec in groups),
        page_size=page_size,
        dtype_bytes=jnp.dtype(kv_dtype).itemsize,
        device_kind=mesh.devices.flat[0].device_kind,
    )
    for spec, num_kv_heads in zip(groups, kv_heads, strict=True):
        try:
            check_supported(
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=spec.head_dim,
                page_size=page_size,
                dtype=dtype,
                kv_dtype=kv_dtype,
                tiling=tiling,
                backend=config.attention_backend,
            )
        except NotImplementedError as refusal:
            raise ConfigError(
                f"attention_backend {config.attention_backend!r} cannot serve this model here: {refusal}. 'auto' takes the "
                "first that can."
            ) from refusal
    return tiling


def _long_prefill_threshold(config: EngineConfig, max_tokens: int, page_size: int) -> int:
    """Four long prompts share a step; a chunk of less than a page would only cost steps."""
    asked = config.long_prefill_token_threshold
    if asked is None:
        return max(max_tokens // 4, min(page_size, max_tokens))
    return min(asked or max_tokens, max_tokens)


def _buckets(name: str, asked: tuple[int, ...] | None, low: int, high: int, defaults: PlatformDefaults) -> tuple[int, ...]:
    if asked is None:
        return powers_of_two(low, high, defaults.bucket_factor if name == "token_buckets" else 2)
    if asked[-1] != high:
        raise ConfigError(f"{name} must end with {high}, the most that a step may hold, got {asked}.")
    return asked


def _dtype(config: EngineConfig, model: Model, platform: str) -> str:
    if model.is_float32_only:
        return "float32"
    return DEFAULTS[platform].dtype if config.dtype == "auto" else config.dtype


def _max_model_len(config: EngineConfig, model: Model, pool_tokens: int) -> int:
    """The model's own limit where nothing was asked for; lowered, with a warning, to what the pool holds."""
    if config.max_model_len is not None:
        if config.max_model_len > model.max_model_len:
            raise ConfigError(
                f"max_model_len must be at most the model's {model.max_model_len} tokens, got {config.max_model_len}."
            )
        return config.max_model_len
    if model.max_model_len > pool_tokens > 0:
        warnings.warn(
            f"max_model_len is lowered from the model's {model.max_model_len} to the {pool_tokens} tokens that the KV pool "
            "holds; set max_model_len, or give the pool more memory (kv_cache_memory_bytes).",
            stacklevel=3,
        )
        return pool_tokens
    return model.max_model_len


def _kv_bytes(config: EngineConfig, mesh: Mesh, reserved: int) -> int:
    """Returns the KV pool's share of one device, less what other state takes there [bytes]."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    free = free_device_bytes(mesh.devices.flat[0], config.gpu_memory_utilization)
    if free is None:
        return CPU_DEFAULT_KV_BYTES
    free -= reserved
    if free <= 0:
        raise ConfigError(
            "The weights alone fill gpu_memory_utilization of the device: raise it, or use more devices (tensor_parallel_size)."
        )
    return free
