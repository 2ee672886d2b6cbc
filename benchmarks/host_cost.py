"""What the host does for a step while the device would compute: plan, pack, read back, commit, detokenise.

    python -m benchmarks.host_cost
    python -m benchmarks.host_cost --contexts 1024,32768 --profile

The real scheduler, the real runner with the real packing, and the real text streams of the embedded model's tokenizer, around
programs that return at once. Every sequence decodes; contexts are filled first, and that is not measured. Medians of steps with
the prefix cache on and off. Measures and prints; never asserts.
"""

import argparse
import cProfile
import dataclasses
import pstats
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxserve import SamplingParams
from jaxserve.build import build
from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine import Engine
from jaxserve.execution.runner import Runner
from jaxserve.model_source import EMBEDDED, own_model
from jaxserve.request_factory import RequestFactory
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.tiny_checkpoint import TinyModel, caller_params
from jaxserve.tokenization.loading import load_tokenizer

PAGE_SIZE = 64
MAX_NUM_BATCHED_TOKENS = 8192
PARTS = ("plan", "pack", "read", "commit", "text", "total")
"""plan: the scheduler; pack: the runner's dispatch; read: its wait; commit: the scheduler's; text: all else, so the deltas."""


class Stub:
    """A program that has run once, and now returns what it returned then, at once; sampled tokens come from a list."""

    def __init__(self, run: Callable[..., Any], tokens: np.ndarray):
        self._run, self._tokens, self._returned = run, tokens, None
        self._draw = random.Random(0)

    def backbone(self, params: Any, state: Any, buffer: np.ndarray) -> Any:
        if self._returned is None:
            state, self._returned = self._run(params, state, buffer)
        return state, self._returned

    def head(self, *arguments: Any) -> Any:
        if self._returned is None:
            self._returned = self._run(*arguments)
        first, sampled = self._returned
        start = self._draw.randrange(len(self._tokens) - len(sampled.tokens_S))
        return first, dataclasses.replace(sampled, tokens_S=self._tokens[start : start + len(sampled.tokens_S)])


def stubbed_runner(num_sequences: int, context: int, max_tokens: int) -> tuple[Runner, ResolvedConfig]:
    """Returns a runner around stubs, and what it runs with: a pool that holds every context."""
    max_model_len = context + max_tokens
    tokenizer = load_tokenizer(EMBEDDED)
    shape = TinyModel(
        hidden_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=max_model_len,
    )
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        page_size=PAGE_SIZE,
        num_pages=num_sequences * -(-max_model_len // PAGE_SIZE),
        token_buckets=(MAX_NUM_BATCHED_TOKENS,),
        sequence_buckets=(num_sequences,),
    )
    built = build(config, source=own_model(**caller_params(shape), tokenizer=tokenizer), show_progress=False)
    built.close()
    tokens = np.random.default_rng(0).integers(300, tokenizer.vocab_size, 100_000).astype(np.int32)
    for program in built.runner._backbones.values():
        program.run = Stub(program.run, tokens).backbone
    for program in built.runner._heads.values():
        program.run = Stub(program.run, tokens).head
    return built.runner, built.config


class Clock:
    """Adds up what each part of a step takes [s]."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {part: [] for part in PARTS}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.steps[part].append(time.perf_counter() - started)
            return result

        return timed

    def median_us(self, part: str) -> float:
        if part == "text":
            return self.median_us("total") - sum(self.median_us(p) for p in PARTS if p not in ("text", "total"))
        return statistics.median(self.steps[part]) * 1e6


def measure(
    runner: Runner, config: ResolvedConfig, context: int, num_steps: int, profile: cProfile.Profile | None
) -> dict[str, float]:
    """Returns the median of each part of a decode step [µs], and the mean of the whole."""
    runner._next_step = 0
    scheduler = Scheduler(config)
    engine = Engine(scheduler, runner, load_tokenizer(EMBEDDED))
    draw = random.Random(1)
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0.8)
    requests = RequestFactory(config, None)
    for index in range(config.max_num_seqs):  # lengths differ, so that pages do not all fill in one step
        prompt = [draw.randrange(300, config.vocab_size) for _ in range(context - index % PAGE_SIZE)]
        engine.add(requests.make(prompt, params, request_id=f"request-{index}"))
    while any(s.num_computed < s.num_prompt_tokens for s in scheduler._sequences.values()):
        engine.step()
    clock = Clock()
    scheduler.plan = clock.around("plan", scheduler.plan)  # type: ignore[method-assign]
    scheduler.commit = clock.around("commit", scheduler.commit)  # type: ignore[method-assign]
    before = runner.dispatch, runner.wait
    runner.dispatch = clock.around("pack", runner.dispatch)  # type: ignore[method-assign]
    runner.wait = clock.around("read", runner.wait)  # type: ignore[method-assign]
    step = clock.around("total", engine.step)
    if profile is not None:
        profile.enable()
    for _ in range(num_steps):
        step()
    if profile is not None:
        profile.disable()
    runner.dispatch, runner.wait = before  # type: ignore[method-assign]
    if scheduler.num_running < config.max_num_seqs:
        raise RuntimeError(f"only {scheduler.num_running} of {config.max_num_seqs} sequences were measured")
    return {part: clock.median_us(part) for part in PARTS} | {"mean": statistics.mean(clock.steps["total"]) * 1e6}


def main() -> None:
    """Prints a row a context and a setting of the prefix cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--contexts", default="1024,32768", help="comma-separated")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="add what takes the time, by cProfile")
    arguments = parser.parse_args()
    table = Table(title=f"host cost of a decode step, {arguments.sequences} sequences [µs]")
    for column in ("context", "prefix cache", *PARTS, "mean"):
        table.add_column(column, justify="right")
    profile = cProfile.Profile()
    for context in map(int, arguments.contexts.split(",")):
        # The first sequences decode while the last contexts are still being filled, and must not end before the measurement does.
        filling = arguments.sequences * context // MAX_NUM_BATCHED_TOKENS * 2
        runner, config = stubbed_runner(arguments.sequences, context, filling + arguments.steps + 16)
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for round_ in range(2 * arguments.rounds):
            is_on = round_ % 2 == 0
            setting = config if is_on else dataclasses.replace(config, max_cached_pages=0)
            runs[is_on].append(measure(runner, setting, context, arguments.steps, None))
        for is_on, figures in runs.items():
            best = {name: min(f[name] for f in figures) for name in (*PARTS, "mean")}
            table.add_row(str(context), "on" if is_on else "off", *(f"{value:.0f}" for value in best.values()))
        if arguments.profile:
            measure(runner, config, context, arguments.steps, profile)
    console = Console()
    console.print(table)
    if arguments.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
