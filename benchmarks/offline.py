"""Throughput and latency of the Python API on one machine, as a table. Measures and prints; never asserts.

    make bench                                     the embedded model
    make bench ARGS="--model DIR --repetitions 5"

Greedy, end of sequence ignored, token ids in. Each workload runs once to warm up and then `--repetitions` times, workloads
interleaved; medians are shown. TTFT counts from the submission of the whole workload. ITL is a request's mean time between
tokens. Public API only.
"""

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxserve import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Workload:
    """Prompts and outputs [tokens], one entry a request."""

    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]


def workloads(max_model_len: int) -> dict[str, Workload]:
    """Returns the workloads by name; lengths fit the model."""
    generator = np.random.default_rng(0)
    short, long = max_model_len // 16, max_model_len // 4
    mixed_prompts = tuple(int(n) for n in generator.integers(short // 2, long, size=32))
    mixed_outputs = tuple(int(n) for n in generator.integers(short // 2, long, size=32))
    return {
        "single": Workload((short,), (long // 2,)),
        "8 equal": Workload((short,) * 8, (long // 2,) * 8),
        "32 mixed": Workload(mixed_prompts, mixed_outputs),
        "long prompt": Workload((max_model_len * 3 // 4,), (short,)),
    }


def run(llm: LLM, workload: Workload, vocab_size: int, seed: int) -> tuple[float, list[RequestOutput]]:
    """Returns (wall seconds, outputs) of one run with fresh random prompts."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(3, vocab_size, size=n).tolist() for n in workload.prompt_lens]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in workload.output_lens]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started, outputs


def latencies(outputs: list[RequestOutput]) -> tuple[float, float]:
    """Returns (median TTFT, median ITL) [s]."""
    ttft, itl = [], []
    for output in outputs:
        t = output.metrics
        if t is None or t.first_token is None or t.arrived is None or t.finished is None:
            continue
        ttft.append(t.first_token - t.arrived)
        itl.append((t.finished - t.first_token) / max(1, len(output.outputs[0].token_ids) - 1))
    return statistics.median(ttft), statistics.median(itl)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, a Hub id or 'toy'; default: the embedded model")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()

    started = time.perf_counter()
    llm = LLM(arguments.model)
    startup_s = time.perf_counter() - started
    config = llm.config
    cells: dict[str, list[tuple[float, float, float]]] = {}
    cases = workloads(config.max_model_len)
    for repetition in range(arguments.repetitions + 1):
        for name, workload in cases.items():
            wall_s, outputs = run(llm, workload, config.vocab_size, seed=repetition)
            if repetition:
                cells.setdefault(name, []).append((sum(workload.output_lens) / wall_s, *latencies(outputs)))
    llm.close()

    table = Table(
        title=f"{config.model_name}, {config.dtype}, {config.platform} ({platform.processor() or platform.machine()})"
    )
    for column in ("workload", "output tokens/s", "min..max", "TTFT p50 ms", "ITL p50 ms"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, runs in cells.items():
        rates, ttfts, itls = zip(*runs, strict=True)
        spread = f"{min(rates):.0f}..{max(rates):.0f}"
        row = (
            f"{statistics.median(rates):.0f}",
            spread,
            f"{statistics.median(ttfts) * 1e3:.1f}",
            f"{statistics.median(itls) * 1e3:.2f}",
        )
        table.add_row(name, *row)
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"start-up {startup_s:.1f} s; {arguments.repetitions} repetitions, medians")


if __name__ == "__main__":
    main()
