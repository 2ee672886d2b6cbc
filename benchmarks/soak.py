"""Random traffic on a real engine for as long as asked: nothing may grow, leak, compile, or come out wrong.

    python -m benchmarks.soak --minutes 30
    python -m benchmarks.soak --minutes 10 --model tiny --seed 3

Clients with random prompts (some begin alike), random priorities and every sampling parameter at random; some go away in the
middle, some are aborted. The pool is small, so that requests are preempted all the time. A line a minute. At the end, exit status
1 if

- resident memory has grown by more than GROWTH since the warm-up, the first third of the run;
- the engine is not as empty as when it started: pages, rows, host memory, tables of requests on every level;
- anything was compiled after ready;
- a sample of the greedy and seeded answers, each asked for again alone, on an engine with one row and no prefix cache, differs in
  a token for which the float64 oracle sees no near tie.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxserve import SamplingParams
from jaxserve.async_engine import AsyncEngine
from jaxserve.build import BuiltEngine, build
from jaxserve.checkpoints.load import load_parameters
from jaxserve.config import EngineConfig
from jaxserve.model_source import ModelSource, find_model, own_model
from jaxserve.models.registry import make_model
from jaxserve.outputs import TokenDelta
from jaxserve.testing import oracle
from jaxserve.testing.near_ties import NEAR_TIE
from jaxserve.testing.random_params import random_sampling_params
from jaxserve.testing.tiny_checkpoint import TinyModel, caller_params

LIMITS = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "page_size": 16,
    "num_pages": 96,
    "sequence_buckets": (1, 4, 16),
    "token_buckets": (32, 128),
}
"""Sixteen rows on three times the longest context."""

NUM_CLIENTS = 32
MAX_PROMPT_LEN = 400
SAMPLE_SIZE = 200
GROWTH = 0.02
"""Of resident memory, between the medians of the first and the last fifth after the warm-up; the allocator wanders by 1 %."""

TINY = TinyModel(vocab_size=320, seed=1, max_position_embeddings=512)


@dataclass(slots=True)
class Answer:
    """What a request was, and what it got."""

    prompt: list[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    num_finished: int = 0
    num_gone: int = 0
    num_aborted: int = 0
    num_tokens: int = 0
    num_repeatable: int = 0
    sample: list[Answer] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)

    def keep(self, answer: Answer, draw: random.Random) -> None:
        """A uniform sample of all repeatable answers, of bounded size."""
        self.num_repeatable += 1
        if len(self.sample) < SAMPLE_SIZE:
            self.sample.append(answer)
        elif (place := draw.randrange(self.num_repeatable)) < SAMPLE_SIZE:
            self.sample[place] = answer


def resident_mib() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def find(model: str | None) -> ModelSource:
    return own_model(**caller_params(TINY), tokenizer=None) if model == "tiny" else find_model(model, None)


class Traffic:
    """Clients of one engine, until a point in time."""

    def __init__(self, built: BuiltEngine, seed: int, ends_at: float):
        self.engine = AsyncEngine(built.client)
        self.tally = Tally()
        self._built, self._draw, self._ends_at = built, random.Random(seed), ends_at
        self._vocab_size = built.config.vocab_size
        self._beginnings = [self._token_ids(random.Random(seed + i).randint(20, 200)) for i in range(4)]
        self._num_requests = 0

    def _token_ids(self, count: int) -> list[int]:
        return [self._draw.randrange(self._vocab_size) for _ in range(count)]

    def _prompt(self) -> list[int]:
        length = min(MAX_PROMPT_LEN, 1 + int(self._draw.expovariate(1 / 80)))
        beginning = self._draw.choice(self._beginnings) if self._draw.random() < 0.4 else []
        return (beginning + self._token_ids(length))[:MAX_PROMPT_LEN]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CLIENTS):
                group.create_task(self._client())

    async def _client(self) -> None:
        while time.monotonic() < self._ends_at:
            await self._ask()
            await asyncio.sleep(self._draw.expovariate(1 / 0.05))

    async def _ask(self) -> None:
        draw, tally = self._draw, self.tally
        params = random_sampling_params(draw, self._vocab_size, self._built.tokenizer)
        answer = Answer(self._prompt(), params)
        self._num_requests += 1
        request = self._built.requests.make(
            answer.prompt, params, request_id=f"soak-{self._num_requests}", priority=draw.choice([0, 0, 0, -1, 1])
        )
        leaves_after = draw.randint(0, 20) if draw.random() < 0.15 else None
        aborts = draw.random() < 0.5
        async with contextlib.aclosing(self.engine.stream(request)) as deltas:
            delta: TokenDelta
            async for delta in deltas:
                answer.token_ids += delta.token_ids
                answer.finish_reason = delta.finish_reason
                if leaves_after is not None and len(answer.token_ids) >= leaves_after:
                    leaves_after = None
                    if not aborts:
                        break
                    self.engine.abort([request.request_id])
        tally.num_tokens += len(answer.token_ids)
        tally.num_gone += answer.finish_reason is None
        tally.num_aborted += answer.finish_reason == "abort"
        if answer.finish_reason in ("stop", "length"):
            tally.num_finished += 1
            if params.is_greedy or params.seed is not None:
                tally.keep(answer, draw)


async def soak(built: BuiltEngine, seconds: float, seed: int, console: Console) -> tuple[Tally, AsyncEngine]:
    """Runs the traffic, with a line a minute, and waits until the engine is idle."""
    started = time.monotonic()
    traffic = Traffic(built, seed, started + seconds)
    clients = asyncio.create_task(traffic.run())
    minute = 0
    while not clients.done():
        await asyncio.wait([clients], timeout=2)
        traffic.tally.resident.append(resident_mib())
        if time.monotonic() - started >= 60 * (minute + 1):
            minute += 1
            tally, stats = traffic.tally, built.client.stats()
            console.print(
                f"minute {minute}: {tally.num_finished} finished, {tally.num_gone} went away, {tally.num_aborted} aborted, "
                f"{tally.num_tokens} tokens, {stats.num_preemptions} preemptions, {stats.num_cached_tokens} cached tokens, "
                f"{stats.num_running}+{stats.num_waiting} now, {stats.num_compilations_since_ready} compilations, "
                f"{traffic.tally.resident[-1]:.1f} MiB resident"
            )
    await clients
    await traffic.engine.drain(60)
    return traffic.tally, traffic.engine


def growth(resident: list[float]) -> float:
    """Returns by which share memory has grown after the warm-up."""
    after = resident[len(resident) // 3 :]
    part = max(1, len(after) // 5)
    return statistics.median(after[-part:]) / statistics.median(after[:part]) - 1


def leaks(built: BuiltEngine, engine: AsyncEngine) -> list[str]:
    """Returns what an idle engine still holds, level by level."""
    client: Any = built.client
    inner, scheduler = client._engine, client._engine._scheduler
    inner.check_integrity()
    tables = {
        "AsyncEngine's readers": engine._pending,
        "EngineThread's listeners": client._listeners,
        "Engine's streams": inner._streams,
        "the scheduler's sequences": scheduler._sequences,
        "steps in flight": scheduler._sampling_in,
        "reserved host memory": scheduler.holdings.host_bytes,
    }
    found = [f"{name}: {len(table)}" for name, table in tables.items() if table]
    if scheduler.num_free_pages != built.config.num_pages:
        found.append(f"pages: {built.config.num_pages - scheduler.num_free_pages}")
    return found


class Judge:
    """Says whether two answers to one request differ by more than a near tie of the oracle."""

    def __init__(self, source: ModelSource):
        self._config = source.config
        if source.params is not None:
            self._leaves = {path: np.asarray(leaf) for path, leaf in source.params.items()}
        else:
            parameters = make_model(source.config).parameters()
            shapes = {p.path: jax.ShapeDtypeStruct(p.shape, "float32") for p in parameters}
            assert source.path is not None
            self._leaves = {
                path: np.asarray(leaf) for path, leaf in load_parameters(source.path, parameters, shapes).items()
            }

    def is_wrong(self, answer: Answer, alone: list[int]) -> bool:
        pairs = zip(answer.token_ids, alone, strict=False)
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if place is None:  # equal as far as both go
            return len(answer.token_ids) != len(alone)
        context = [*answer.prompt, *answer.token_ids[:place]]
        logits_V = oracle.logits(self._leaves, self._config, context, len(answer.prompt))[-1]
        low, high = sorted((answer.token_ids[place], alone[place]))
        if answer.params.is_greedy:
            return abs(logits_V[low] - logits_V[high]) > NEAR_TIE
        # A draw inverts the distribution function over token ids: it turns only from one token to the next that may come.
        probs_V = _truncated(logits_V / answer.params.temperature, answer.params)
        return probs_V[low] == 0 or probs_V[high] == 0 or probs_V[low + 1 : high].sum() > NEAR_TIE


def _truncated(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Returns probabilities in float64 after min_p, top_k and top_p; what is just below a threshold stays."""
    probs_V = np.exp(logits_V - logits_V.max())
    probs_V[probs_V < params.min_p * (1 - NEAR_TIE)] = 0
    order = np.argsort(-probs_V, kind="stable")
    if params.top_k > 0:
        probs_V[probs_V < probs_V[order[params.top_k - 1]] * (1 - NEAR_TIE)] = 0
    probs_V /= probs_V.sum()
    if params.top_p < 1:
        before = np.cumsum(probs_V[order]) - probs_V[order]
        probs_V[order[before >= params.top_p * (1 + NEAR_TIE)]] = 0
    return probs_V


async def ask_alone(built: BuiltEngine, answers: list[Answer]) -> list[list[int]]:
    """Returns each answer's tokens when it is asked for again, one after the other."""
    engine = AsyncEngine(built.client)
    results = []
    for answer in answers:
        request = built.requests.make(answer.prompt, answer.params)
        results.append([token async for delta in engine.stream(request) for token in delta.token_ids])
    return results


def main() -> None:
    """Prints what happened, and ends with status 1 if anything of it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="a directory, 'tiny' for random weights, or the embedded model")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    warnings.simplefilter("ignore")
    source = find(arguments.model)
    built = build(EngineConfig(**LIMITS), source=source, show_progress=False)
    tally, engine = asyncio.run(soak(built, 60 * arguments.minutes, arguments.seed, console))
    stats, grown, found = built.client.stats(), growth(tally.resident), leaks(built, engine)
    built.close()

    alone = build(
        EngineConfig(**LIMITS | {"max_num_seqs": 1, "sequence_buckets": (1,)}, enable_prefix_caching=False),
        source=source,
        show_progress=False,
    )
    expected = asyncio.run(ask_alone(alone, tally.sample))
    alone.close()
    judge = Judge(source)
    turned = [pair for pair in zip(tally.sample, expected, strict=True) if pair[0].token_ids != pair[1]]
    wrong = [answer for answer, tokens in turned if judge.is_wrong(answer, tokens)]

    console.print(
        f"resident memory grew by {grown:.2%} after the warm-up; {stats.num_compilations_since_ready} compilations; "
        f"{len(found)} leaks; of {len(tally.sample)} answers asked for again alone ({sum(map(len, expected))} tokens), "
        f"{len(turned)} turned at a near tie or are wrong, {len(wrong)} are wrong"
    )
    failures = found + [f"wrong: {answer}" for answer in wrong]
    failures += [f"memory grew by {grown:.2%}, {GROWTH:.0%} is allowed"] if grown > GROWTH else []
    failures += ["programs were compiled after ready"] if stats.num_compilations_since_ready else []
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
