"""The engine with random weights: seconds of a decode step, tokens a second and latencies, beside what its bytes allow."""

import asyncio
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.report import Ceilings, Part, Row
from jaxserve import AsyncLLM, RequestOutputKind, SamplingParams
from jaxserve.models.registry import make_model
from jaxserve.models.weights import unflatten


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        config: of the model.
        dtype: of its weights.
        batches: sequences of the decode steps that are timed.
        short_output: tokens that each request of a timed batch gets in the shorter of two runs.
        output: in the longer one.
        prompt: tokens of their prompts.
        workload: (requests, tokens in, tokens out) of the throughput run.
        long_prompt: tokens of a prompt that arrives while others decode.
        options: of the engine.
    """

    config: dict[str, Any]
    dtype: str
    batches: tuple[int, ...]
    short_output: int
    output: int
    prompt: int
    workload: tuple[int, int, int]
    long_prompt: int
    options: dict[str, Any]


@dataclasses.dataclass
class Stream:
    """When a request was asked for, and when each of its tokens came [s]."""

    asked_s: float
    token_s: list[float] = dataclasses.field(default_factory=list)

    def gaps_s(self) -> np.ndarray:
        return np.diff(self.token_s)


def random_parameters(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a nested dict of parameters, made on the device; deviation 1 / sqrt(fan in), norms at 1."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(shape[0] ** -0.5, dtype)

    drawn = jax.jit(draw, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(parameters := make_model(config, dtype=jnp.dtype(dtype)).parameters()))
    return unflatten({p.path: drawn(key, tuple(p.shape)) for key, p in zip(keys, parameters, strict=True)})


class Roofline:
    """The least time that steps can take, by bytes read at the stream's rate and operations at the matmul's."""

    def __init__(self, config: dict[str, Any], dtype: str, ceilings: Ceilings):
        parameters = make_model(config, dtype=jnp.dtype(dtype)).parameters()
        sizes = {p.path: int(np.prod(p.shape)) for p in parameters}
        is_tied = config.get("tie_word_embeddings", False)
        # Of an embedding that is not the head too, a step reads a row a token.
        embedding = 0 if is_tied else config["vocab_size"] * config["hidden_size"]
        itemsize = jnp.dtype(dtype).itemsize
        self.num_weights = sum(sizes.values()) - embedding
        self.weight_bytes = self.num_weights * itemsize
        head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        self.kv_bytes_a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * itemsize
        self._ceilings = ceilings

    def decode_s(self, num_seqs: int, context: float) -> float:
        """Of one step [s]; `context` is the mean length of the sequences [tokens]."""
        read_s = (self.weight_bytes + num_seqs * context * self.kv_bytes_a_token) / self._ceilings.stream_bytes_s
        return max(read_s, 2.0 * self.num_weights * num_seqs / self._ceilings.matmul_flop_s)

    def prefill_s(self, num_tokens: int) -> float:
        """Of the products of so many prompt tokens [s]; attention, which is a few per cent of it, is left out."""
        return 2.0 * self.num_weights * num_tokens / self._ceilings.matmul_flop_s


class Client:
    """Asks the engine for tokens and writes down when they came."""

    def __init__(self, llm: AsyncLLM, vocab_size: int):
        self._llm, self._vocab_size, self._draw = llm, vocab_size, np.random.default_rng(0)

    async def one(self, num_in: int, num_out: int) -> Stream:
        """Returns the stream of one request, greedy, with a prompt that nobody had before."""
        prompt = self._draw.integers(3, self._vocab_size, num_in).tolist()
        params = SamplingParams(
            temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        stream = Stream(time.perf_counter())
        async for output in self._llm.generate({"prompt_token_ids": prompt}, params):
            stream.token_s += [time.perf_counter()] * len(output.outputs[0].token_ids)
        if len(stream.token_s) != num_out:
            raise RuntimeError(f"a request got {len(stream.token_s)} tokens of {num_out}")
        return stream

    async def together(self, count: int, num_in: int, num_out: int) -> float:
        """Returns how long so many requests take that are asked for at once [s]."""
        started = time.perf_counter()
        await asyncio.gather(*(self.one(num_in, num_out) for _ in range(count)))
        return time.perf_counter() - started

    async def arriving(self, count: int, a_second: float, num_in: int, num_out: int) -> list[Stream]:
        """Returns the streams of requests that arrive at random, so many a second."""
        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(self.one(num_in, num_out)))
            await asyncio.sleep(self._draw.exponential(1 / a_second))
        return list(await asyncio.gather(*tasks))


def measure(ceilings: Ceilings, sizes: Sizes, report: Callable[[Part], None], trace: Path | None = None) -> None:
    """Reports the start, the decode steps, whole workloads and latencies of one engine, each as it ends.

    Args:
        ceilings: of this device.
        sizes: what is run.
        report: gets each part.
        trace: a directory for jax's profile of a few steps of the largest batch; None for none.
    """
    asyncio.run(_measure(ceilings, sizes, report, trace))


async def _measure(ceilings: Ceilings, sizes: Sizes, report: Callable[[Part], None], trace: Path | None) -> None:
    params = random_parameters(sizes.config, sizes.dtype)
    llm = AsyncLLM(params=params, config=sizes.config, dtype=sizes.dtype, enable_prefix_caching=False, **sizes.options)
    del params
    async with llm:
        gc.collect()
        client = Client(llm, sizes.config["vocab_size"])
        report(Part("Start of the engine", [Row(name, {"s": seconds}) for name, seconds in llm.startup_s.items()]))
        roofline = Roofline(sizes.config, sizes.dtype, ceilings)
        await client.together(2, sizes.prompt, 4)
        report(Part("Decode steps", [await _decode(client, roofline, sizes, count) for count in sizes.batches]))
        if trace is not None:
            with jax.profiler.trace(str(trace)):
                await client.together(sizes.batches[-1], sizes.prompt, 8)
        throughput, row = await _throughput(client, roofline, sizes)
        report(Part("Throughput", [await _single(client, sizes), row]))
        latencies = [await _under_load(client, sizes, 0.7 * throughput), await _beside_a_long_prompt(client, sizes)]
        compilations = llm.stats().num_compilations_since_ready
        failure = None if compilations == 0 else "nothing may be compiled after ready"
        report(Part("Latencies", [*latencies, Row(f"{compilations} compilations after ready", {}, failure)]))


async def _decode(client: Client, roofline: Roofline, sizes: Sizes, count: int) -> Row:
    """The difference of two runs, so that neither prompts nor the last steps count."""
    runs = []
    for _ in range(3):
        short_s = await client.together(count, sizes.prompt, sizes.short_output)
        long_s = await client.together(count, sizes.prompt, sizes.output)
        runs.append((long_s - short_s) / (sizes.output - sizes.short_output))
    step_s = statistics.median(runs)
    least_s = roofline.decode_s(count, sizes.prompt + (sizes.short_output + sizes.output) / 2)
    figures = {"ms": step_s * 1e3, "tokens/s": count / step_s, "roofline ms": least_s * 1e3, "x roofline": step_s / least_s}
    return Row(f"decode step, {count} sequences", figures)


async def _single(client: Client, sizes: Sizes) -> Row:
    streams = [await client.one(sizes.prompt, sizes.output) for _ in range(3)]
    rates = [len(s.token_s) / (s.token_s[-1] - s.asked_s) for s in streams]
    first_ms = statistics.median(1e3 * (s.token_s[0] - s.asked_s) for s in streams)
    return Row(
        f"single stream, {sizes.prompt} in, {sizes.output} out", {"tokens/s": statistics.median(rates), "TTFT ms": first_ms}
    )


async def _throughput(client: Client, roofline: Roofline, sizes: Sizes) -> tuple[float, Row]:
    """Returns requests a second, and the row."""
    count, num_in, num_out = sizes.workload
    taken_s = await client.together(count, num_in, num_out)
    least_s = roofline.prefill_s(count * num_in) + num_out * roofline.decode_s(count, num_in + num_out / 2)
    figures = {"s": taken_s, "tokens/s": count * num_out / taken_s, "roofline s": least_s, "of roofline": least_s / taken_s}
    return count / taken_s, Row(f"{count} requests, {num_in} in, {num_out} out", figures)


async def _under_load(client: Client, sizes: Sizes, a_second: float) -> Row:
    """Half as many requests of the same lengths, so that the rate is a share of what was measured of these lengths."""
    count, num_in, num_out = sizes.workload
    streams = await client.arriving(count // 2, a_second, num_in, num_out)
    return Row(f"{a_second:.3g} requests a second, 70 % of what it can do", _latencies(streams))


async def _beside_a_long_prompt(client: Client, sizes: Sizes) -> Row:
    beside = [asyncio.create_task(client.one(sizes.prompt, sizes.output)) for _ in range(8)]
    await asyncio.sleep(0)
    long = await client.one(sizes.long_prompt, 2)
    figures = _latencies(await asyncio.gather(*beside))
    figures["TTFT ms"] = 1e3 * (long.token_s[0] - long.asked_s)
    return Row(f"8 sequences while a prompt of {sizes.long_prompt} is computed", figures)


def _latencies(streams: Sequence[Stream]) -> dict[str, float | int | str]:
    first_s = [s.token_s[0] - s.asked_s for s in streams]
    gaps_s = np.concatenate([s.gaps_s() for s in streams])
    figures: dict[str, float | int | str] = {}
    for name, values in (("TTFT", first_s), ("ITL", gaps_s)):
        for share in (50, 99):
            figures[f"{name} p{share} ms"] = 1e3 * float(np.percentile(values, share))
    return figures
