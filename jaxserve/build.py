"""The composition root: from an intent (`EngineConfig`) to an engine that is ready. Nothing else knows all the parts."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxserve.checkpoints.load import load_parameters
from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine import Engine
from jaxserve.engine_thread import EngineThread
from jaxserve.errors import ConfigError
from jaxserve.execution.compilation import process_counter
from jaxserve.execution.logits import LogitsProcessor
from jaxserve.execution.program_cache import ProgramCache
from jaxserve.execution.programs import ProgramFactory
from jaxserve.execution.runner import Runner
from jaxserve.model_source import ModelSource, find_model, sampling_defaults
from jaxserve.models.attention import AttentionContext
from jaxserve.models.linear import LinearContext
from jaxserve.models.model import Model, ModelContext
from jaxserve.models.registry import make_model
from jaxserve.models.weights import check_complete
from jaxserve.plan import kv_groups
from jaxserve.request_factory import RequestFactory
from jaxserve.resolve import DEFAULTS, parallelism, resolve
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.thinking import Reasoning
from jaxserve.tokenization.tokenizer import Tokenizer
from sharding.mesh import make_mesh
from sharding.rules import spec_for


@dataclass(slots=True)
class BuiltEngine:
    """A ready engine and what its callers need beside it.

    Attributes:
        startup_s: how long building took [s], by part: "model" (found, its tokenizer read, made), "weights" (read, checked, laid
            out), "programs" (loaded or compiled, each run once), and "total".
    """

    client: EngineThread
    requests: RequestFactory
    tokenizer: Tokenizer | None
    config: ResolvedConfig
    runner: Runner
    startup_s: dict[str, float]

    def close(self) -> None:
        """Aborts what runs and ends the engine thread."""
        self.client.close()


def build(
    config: EngineConfig,
    *,
    source: ModelSource | None = None,
    processors: Sequence[LogitsProcessor] = (),
    show_progress: bool = True,
) -> BuiltEngine:
    """Returns a ready engine: weights on the devices, every program compiled.

    Args:
        config: the intent.
        source: a model that was found already; None looks up config.model.
        processors: functions on logits that requests use by name.
        show_progress: a progress line on stderr while programs compile.

    Raises:
        ConfigError: an intent that does not fit the model or the machine.
        CheckpointError: a model that is not there, or damaged.
    """
    started = time.monotonic()
    _skip_the_search_for_accelerators()
    compilations = process_counter()
    source = source or find_model(
        config.model, config.tokenizer, revision=config.revision, skip_tokenizer=config.skip_tokenizer_init
    )
    defaults = sampling_defaults(source, config.generation_config)
    reasoning = _reasoning(config, source.tokenizer)
    platform = _platform()
    model = _make_model(config, source, platform)
    mesh = make_mesh(parallelism(config, model), _devices(config))
    made = time.monotonic()
    cache = _program_cache(config.compilation_cache_dir, mesh, (model, tuple(processors)))
    params = _load(model, source, mesh)
    loaded = time.monotonic()
    resolved, tiling = resolve(config, source, model, platform, mesh, processors)
    ctx = ModelContext(LinearContext(platform, config.deterministic), parallelism(config, model))
    attention = AttentionContext(tiling, config.attention_backend)
    programs = ProgramFactory(model, params, resolved, mesh, ctx, attention, processors, cache)
    runner = Runner(resolved, params, programs)
    with _ProgressLine(show_progress) as progress:
        runner.warmup(progress.update, num_threads=max(2, min(8, os.cpu_count() or 2)))
    scheduler = Scheduler(resolved, num_groups=len(kv_groups(model.kv_specs())))
    client = EngineThread(Engine(scheduler, runner, source.tokenizer), compilations.count_of)
    ready = time.monotonic()
    return BuiltEngine(
        client=client,
        requests=RequestFactory(
            resolved,
            source.tokenizer,
            source.eos_token_ids,
            defaults=defaults,
            compiler=GrammarCompiler(source.tokenizer, resolved.vocab_size, source.eos_token_ids),
            reasoning=reasoning,
        ),
        tokenizer=source.tokenizer,
        config=resolved,
        runner=runner,
        startup_s={
            "model": made - started,
            "weights": loaded - made,
            "programs": ready - loaded,
            "total": ready - started,
        },
    )


def _reasoning(config: EngineConfig, tokenizer: Tokenizer | None) -> Reasoning | None:
    """Returns the marks of thinking as tokens."""
    if not config.reasoning_start or not config.reasoning_end:
        return None
    if tokenizer is None:
        raise ConfigError("reasoning_start and reasoning_end need a tokenizer.")
    marks = (config.reasoning_start, config.reasoning_end)
    start, end = (tuple(tokenizer.encode(mark, add_special_tokens=False, parse_special=True)) for mark in marks)
    if not start or not end:
        raise ConfigError(f"reasoning_start and reasoning_end must have tokens, got {marks[0]!r} and {marks[1]!r}.")
    return Reasoning(start, end)


def _skip_the_search_for_accelerators() -> None:
    """Tells jax to stay on the CPU where no driver offers anything else.

    With a GPU's compiler installed and no GPU, as the tests have it, jax would log an error about cuDNN.
    """
    nodes = ("nvidia*", "kfd", "dxg", "accel*", "vfio/*")
    if not getattr(jax.config, "jax_platforms", None) and not any(any(Path("/dev").glob(node)) for node in nodes):
        jax.config.update("jax_platforms", "cpu")


def _platform() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def _make_model(config: EngineConfig, source: ModelSource, platform: str) -> Model:
    dtype = DEFAULTS[platform].dtype if config.dtype == "auto" else config.dtype
    return make_model(source.config, tensor_parallel_size=config.tensor_parallel_size, dtype=jnp.dtype(dtype))


def _devices(config: EngineConfig) -> list[Any]:
    devices = jax.local_devices()
    if len(devices) < config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size must be at most the {len(devices)} devices found here, got {config.tensor_parallel_size}. "
            "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 of them."
        )
    return devices[: config.tensor_parallel_size]


def _load(model: Model, source: ModelSource, mesh: Mesh) -> Any:
    """Returns the parameters in the served layout; each device only ever holds its own shards."""
    parameters = model.parameters()
    dtype = jnp.dtype("float32") if model.is_float32_only else jnp.dtype(model.dtype)
    abstract = {
        p.path: jax.ShapeDtypeStruct(p.shape, dtype, sharding=NamedSharding(mesh, spec_for(p.axes))) for p in parameters
    }
    if source.params is not None:
        shapes = {path: tuple(leaf.shape) for path, leaf in source.params.items()}
        check_complete(parameters, shapes, "params")
        leaves = {path: _place(source.params[path], target) for path, target in abstract.items()}
    else:
        assert source.path is not None
        leaves = load_parameters(source.path, parameters, abstract)
    shardings = tuple(NamedSharding(mesh, spec) for spec in model.served_specs())
    return jax.jit(model.served_layout, out_shardings=shardings)(leaves)


def _place(leaf: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    import numpy as np

    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf.astype(target.dtype), target.sharding)
    return jax.device_put(np.asarray(leaf).astype(target.dtype), target.sharding)


def _program_cache(directory: str | None, mesh: Mesh, ingredients: Any) -> ProgramCache:
    """Returns where compiled programs are kept; what it cannot keep goes into XLA's persistent cache, which traces first."""
    root = Path(directory or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve")
    configured = getattr(jax.config, "jax_compilation_cache_dir", None) or str(root / "xla")
    if directory == "" or (directory is None and configured != str(root / "xla")):
        return ProgramCache()
    cache = ProgramCache(root / "programs", mesh.devices.flat, ingredients)
    if not cache.is_on and configured == str(root / "xla"):
        jax.config.update("jax_compilation_cache_dir", configured)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return cache


class _ProgressLine:
    """One line on stderr while programs compile."""

    def __init__(self, is_shown: bool):
        self._bar = tqdm(desc="Compiling programs", unit="program", disable=not is_shown, leave=False, file=sys.stderr)

    def __enter__(self) -> "_ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
