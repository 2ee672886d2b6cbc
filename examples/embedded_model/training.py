"""The training loop: what is learned from, in which order, how fast, and how a run survives a crash."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from embedded_model.corpus import BOS, TokenStream, training_windows
from embedded_model.export import write_arrays
from embedded_model.model import Llama, LlamaConfig, token_losses


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. `phases` are (window length [tokens], share of the steps): short windows first, long ones to finish."""

    steps: int
    seed: int = 0
    tokens_per_step: int = 4096
    phases: tuple[tuple[int, float], ...] = ((256, 0.82), (512, 0.06), (1024, 0.12))
    warmup_steps: int = 50
    decay_share: float = 0.37
    muon_learning_rate: float = 0.02
    adam_learning_rate: float = 0.004
    weight_decay: float = 0.05
    save_every_s: float = 300.0


@dataclasses.dataclass
class TrainState:
    """What a crash must not lose. `step` steps are done; `seconds` is the wall time that they took, over all sittings."""

    params: nnx.State
    opt_state: optax.OptState
    step: int = 0
    seconds: float = 0.0


def learning_rate(peak: float, train: TrainConfig) -> optax.Schedule:
    """Warm-up, plateau, linear decay to zero: a run cut shorter shares every step before its decay with the longer one."""
    decay_steps = int(train.decay_share * train.steps)
    warmup_steps = min(train.warmup_steps, (train.steps - decay_steps) // 2)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay_steps),
        ],
        [warmup_steps, train.steps - decay_steps],
    )


def _muon_dimensions(params: nnx.State) -> nnx.State:
    """Muon for the projection matrices; `None`, which means AdamW, for the embedding and the norms."""

    def dimensions(path: tuple, array: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_matrix = array.ndim == 2 and "embed_tokens" not in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers() if is_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """Muon and AdamW behind a global gradient clip."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate(train.muon_learning_rate, train),
            weight_decay=train.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=learning_rate(train.adam_learning_rate, train),
            muon_weight_dimension_numbers=_muon_dimensions,
        ),
    )


def initial_state(config: LlamaConfig, train: TrainConfig) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and its state before the first step."""
    graphdef, params = nnx.split(Llama(config, nnx.Rngs(train.seed)))
    return graphdef, TrainState(params, optimizer(train).init(params))


@functools.partial(jax.jit, static_argnames=("graphdef", "train"), donate_argnames=("params", "opt_state"))
def train_step(params, opt_state, inputs, targets, *, graphdef, train):
    """One update; returns `(params, opt_state, mean loss)`. A bos is never a target: only the packing put it there."""

    def loss_of(params):
        scored = targets != BOS
        return jnp.sum(token_losses(nnx.merge(graphdef, params)(inputs), targets) * scored) / jnp.sum(scored)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer(train).update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def batches(stream: TokenStream, train: TrainConfig, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of steps `start`, `start + 1`, …; the same ones whether or not the run was interrupted before."""
    first = 0
    for index, (length, share) in enumerate(train.phases):
        last = train.steps if index == len(train.phases) - 1 else first + round(share * train.steps)
        windows = training_windows(stream, length, train.seed)
        rows = train.tokens_per_step // length
        for step in range(first, last):
            batch = [next(windows) for _ in range(rows)]
            if step >= start:
                yield np.stack([inputs for inputs, _ in batch]), np.stack([targets for _, targets in batch])
        first = last


def save_state(path: pathlib.Path, state: TrainState) -> None:
    leaves = jax.device_get(jax.tree.leaves((state.params, state.opt_state)))
    arrays = {f"leaf_{index}": leaf for index, leaf in enumerate(leaves)}
    write_arrays(path, {**arrays, "progress": np.array([state.step, state.seconds])})


def restore_state(path: pathlib.Path, fresh: TrainState) -> TrainState:
    """The saved state, in the structure of `fresh`; `fresh` itself where nothing was saved."""
    if not path.exists():
        return fresh
    with np.load(path) as arrays:
        leaves, treedef = jax.tree.flatten((fresh.params, fresh.opt_state))
        restored = [jnp.asarray(arrays[f"leaf_{index}"]) for index in range(len(leaves))]
        step, seconds = arrays["progress"]
    return TrainState(*jax.tree.unflatten(treedef, restored), int(step), float(seconds))


def fit(
    stream: TokenStream,
    graphdef: nnx.GraphDef,
    state: TrainState,
    train: TrainConfig,
    on_save: Callable[[TrainState, float], None],
) -> TrainState:
    """Trains to `train.steps`; calls `on_save(state, mean loss)` at step 20, then every `save_every_s` and at the end."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state.params, state.opt_state = jax.device_put((state.params, state.opt_state), replicated)
    begun = saved = time.monotonic()
    seconds_before, mean = state.seconds, None
    bar = tqdm(total=train.steps, initial=state.step, unit="step", mininterval=5.0, dynamic_ncols=True)
    for inputs, targets in batches(stream, train, state.step):
        inputs, targets = jax.device_put((inputs, targets), by_row)
        state.params, state.opt_state, loss = train_step(
            state.params, state.opt_state, inputs, targets, graphdef=graphdef, train=train
        )
        loss = float(loss)
        mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        now = time.monotonic()
        state.step, state.seconds = state.step + 1, seconds_before + now - begun
        bar.set_postfix_str(f"loss {mean:.3f}, {train.tokens_per_step * state.step / state.seconds:.0f} tokens/s", False)
        bar.update()
        if state.step in (20, train.steps) or now - saved > train.save_every_s:
            on_save(state, mean)
            saved = time.monotonic()
    bar.close()
    return state
