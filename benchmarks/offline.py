"""jaxserve beside its peers on one machine: the same random weights, the same requests, in one run.

    make bench
    make bench ARGS="--models 125M --workloads 'single,32 mixed' --repetitions 5"
    make bench ARGS="--vllm-python ~/vllm/bin/python --llamacpp-python ~/llamacpp/bin/python"

Hugging Face transformers is installed by `make bench`; vLLM's CPU build and llama.cpp are compared where the interpreters of
their environments are given (`RESULTS.md` says how to make them).

Each peer is a process of its own that stays; workloads run interleaved (one peer after the other, then the next workload; the
order turns with every repetition), each repetition with other tokens of the same lengths. Medians are shown, and jaxserve over
the best of the others. Start-up is from the start of the process to the first token: of a first start (jaxserve: with an empty
compilation cache) and of a second. Measures and prints; never asserts.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import random_checkpoint, workloads
from benchmarks.peers import PEERS

OWN, VLLM, LLAMA_CPP = "jaxserve", "vLLM", "llama.cpp"


@dataclass(frozen=True)
class Home:
    """Where a peer lives.

    Attributes:
        python: the interpreter of its environment.
        preload: libraries that its manual wants preloaded, separated by colons.
    """

    python: str = sys.executable
    preload: str = ""


class Worker:
    """A peer in its own process."""

    def __init__(self, peer: str, home: Home, model: Path, vocab_size: int, cache: Path):
        # jax's own log lines (no GPU found, ...) and progress bars would break the table.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }
        if home.preload:
            environment["LD_PRELOAD"] = home.preload
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker; see close)
        command = [home.python, "-m", "benchmarks.worker", peer, str(model), str(vocab_size), repr(time.time())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.first_token_s = self._answer()["first_token_s"]

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"a peer has ended with status {self._process.returncode}:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def _start_all(
    peers: dict[str, Home], model: Path, vocab_size: int, cache: Path
) -> tuple[dict[str, Worker], dict[str, list[float]]]:
    """Starts each peer twice and keeps the second; returns the workers and both times to a first token [s]."""
    startup: dict[str, list[float]] = {}
    workers = {}
    for peer, home in peers.items():
        first = Worker(peer, home, model, vocab_size, cache)
        first.close()
        workers[peer] = Worker(peer, home, model, vocab_size, cache)
        workers[peer].ask(warm_up=True)
        startup[peer] = [first.first_token_s, workers[peer].first_token_s]
    return workers, startup


def compare(model: str, peers: dict[str, Home], names: list[str], repetitions: int, directory: Path) -> dict[str, Any]:
    """Returns every figure of one model: {"startup_s": {peer: [first, second]}, "runs": {workload: {peer: [figures]}}}."""
    path = random_checkpoint.write(model, directory)
    vocab_size = random_checkpoint.SHAPES[model].vocab_size
    if LLAMA_CPP in peers:
        subprocess.run([peers[LLAMA_CPP].python, "-m", "benchmarks.gguf_checkpoint", str(path)], check=True)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {peer: [] for peer in peers} for name in names}
    with tempfile.TemporaryDirectory() as cache:
        workers, startup = _start_all(peers, path, vocab_size, Path(cache))
        for repetition in range(repetitions):
            turned = deque(peers)
            turned.rotate(-repetition)
            for name in names:
                for peer in turned:
                    runs[name][peer].append(workers[peer].ask(workload=name, seed=repetition))
        for worker in workers.values():
            worker.close()
    return {"model": model, "startup_s": startup, "runs": runs}


def _agreement(runs: dict[str, list[dict[str, Any]]], peer: str) -> str:
    """Returns how many requests got the very tokens that jaxserve gave, of all."""
    if OWN not in runs:
        return ""
    pairs = [
        pair
        for own, other in zip(runs[OWN], runs[peer], strict=True)
        for pair in zip(own["tokens"], other["tokens"], strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def print_tables(console: Console, figures: dict[str, Any], repetitions: int) -> None:
    """Prints a table of the workloads and one of start-up and memory."""
    table = Table(title=f"{figures['model']} random weights, float32, medians of {repetitions} interleaved runs")
    for column in ("workload", "peer", "output tokens/s", "min..max", "TTFT ms", "ITL ms", "others' cores", "same tokens"):
        table.add_column(column, justify="left" if column in ("workload", "peer") else "right")
    table.add_column("ratio", justify="right")
    for name, by_peer in figures["runs"].items():
        rates = {peer: statistics.median(r["tokens_per_s"] for r in runs) for peer, runs in by_peer.items()}
        rivals = [rate for peer, rate in rates.items() if peer != OWN]
        for peer, runs in by_peer.items():
            values = [r["tokens_per_s"] for r in runs]
            ratio = f"{rates[OWN] / max(rivals):.2f} x best" if peer == OWN and rivals else ""
            medians = [statistics.median(r[key] for r in runs) for key in ("ttft_ms", "itl_ms", "others_cores")]
            table.add_row(
                name,
                peer,
                f"{rates[peer]:.0f}" if rates[peer] >= 100 else f"{rates[peer]:.1f}",
                f"{min(values):.0f}..{max(values):.0f}",
                f"{medians[0]:.1f}",
                f"{medians[1]:.2f}",
                f"{medians[2]:.2f}",
                "" if peer == OWN else _agreement(by_peer, peer),
                ratio,
            )
        table.add_section()
    console.print(table)
    table = Table(
        "peer", "first start s", "second start s", "peak memory MiB", title="To the first token; memory of the process"
    )
    for peer, (first, second) in figures["startup_s"].items():
        peak = max(r["peak_mib"] for runs in figures["runs"].values() for r in runs[peer])
        table.add_row(peer, f"{first:.1f}", f"{second:.1f}", f"{peak:.0f}")
    console.print(table)


def _machine() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def _homes(console: Console, arguments: argparse.Namespace) -> dict[str, Home]:
    """Returns where each peer that can be run here lives; says which cannot."""
    homes = {OWN: Home()}
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        console.print("torch and transformers are not installed here: jaxserve runs without them.")
    else:
        homes |= {peer: Home() for peer in PEERS if peer.startswith("transformers")}
    if arguments.vllm_python:
        homes[VLLM] = Home(arguments.vllm_python, arguments.vllm_preload)
    if arguments.llamacpp_python:
        homes[LLAMA_CPP] = Home(arguments.llamacpp_python)
    return homes


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(random_checkpoint.SHAPES), help="of " + ", ".join(random_checkpoint.SHAPES)
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="of " + ", ".join(PEERS))
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-preload", default="", help="libraries to preload for it, separated by colons")
    parser.add_argument(
        "--llamacpp-python", help="interpreter of an environment with llama-cpp-python, gguf and safetensors"
    )
    parser.add_argument("--workloads", default=",".join(workloads.NAMES), help="of " + ", ".join(workloads.NAMES))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()) / "jaxserve-bench", help="of the models"
    )
    arguments = parser.parse_args()
    models, peers, names = (getattr(arguments, key).split(",") for key in ("models", "peers", "workloads"))
    for given, known in ((models, random_checkpoint.SHAPES), (peers, PEERS), (names, workloads.NAMES)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is unknown; choose from {', '.join(known)}")
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    homes = _homes(console, arguments)
    peers = {peer: homes[peer] for peer in peers if peer in homes}
    console.print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, Python {platform.python_version()}")
    everything = []
    for model in models:
        everything.append(compare(model, peers, names, arguments.repetitions, arguments.directory))
        print_tables(console, everything[-1], arguments.repetitions)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything) + "\n")


if __name__ == "__main__":
    main()
