"""Where the time goes between the start of a process and its first token.

    python -m benchmarks.startup [--model DIRECTORY] [--repetitions 5]

Starts processes one after the other on compilation caches of their own: the first start finds them empty, and the others find
what it left. As a library (`LLM`) by part, and as a service (`jaxserve serve`) to the ready line and to the first streamed byte.
Measures and prints; never asserts.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

PROMPT = "def fib(n):"

LIBRARY = """
import json, sys, time
stamps = {"interpreter": time.time()}
import jax, jax.numpy
stamps["import jax"] = time.time()
import flax.nnx
stamps["import flax.nnx"] = time.time()
from jaxserve import LLM, SamplingParams
stamps["import jaxserve"] = time.time()
llm = LLM(json.loads(sys.argv[2]), use_tqdm=False)
built = time.time()
llm.generate(json.loads(sys.argv[3]), SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
done, before = time.time(), float(sys.argv[1])
parts = {}
for name, stamp in stamps.items():
    parts[name], before = stamp - before, stamp
parts |= {name: seconds for name, seconds in llm.startup_s.items() if name != "total"}
parts |= {"first token": done - built, "all": done - float(sys.argv[1])}
print(json.dumps(parts))
"""


def start_library(model: str | None, environment: dict[str, str]) -> dict[str, float]:
    """Returns the seconds of each part of one start."""
    arguments = [repr(time.time()), json.dumps(model), json.dumps(PROMPT)]
    command = [sys.executable, "-c", LIBRARY, *arguments]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def start_service(model: str | None, environment: dict[str, str]) -> dict[str, float]:
    """Returns the seconds to the ready line and to the first byte of a completion."""
    started = time.time()
    command = [sys.executable, "-c", "from serve.cli import main; main()", "serve", "--http-port", "0", "--grpc-port", "0"]
    command += ["--model", model] if model else []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = next(line for line in server.stdout if "ready" in line)
        seconds = {"ready": time.time() - started}
        url = next(word for word in ready.replace(",", " ").split() if word.startswith("http"))
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1, "stream": True}).encode()
        request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            answer.readline()
            seconds["first byte"] = time.time() - started
        server.send_signal(signal.SIGTERM)
        server.stdout.read()
    return seconds


def table(title: str, cold: dict[str, float], warm: list[dict[str, float]]) -> str:
    """Returns a table: a row a part, seconds of the first start and median, least and most of the others."""
    rows = [f"| {title} [s] | first start | second start | min..max |", "| --- | --- | --- | --- |"]
    for name, first in cold.items():
        values = [start[name] for start in warm]
        spread = f"{min(values):.2f}..{max(values):.2f}"
        rows.append(f"| {name} | {first:.2f} | {statistics.median(values):.2f} | {spread} |")
    return "\n".join(rows)


def main() -> None:
    """Measures both doors and prints a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; without it the embedded model")
    parser.add_argument("--repetitions", type=int, default=5, help="starts after the first")
    options = parser.parse_args()
    for title, start in (("LLM", start_library), ("serve", start_service)):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"XDG_CACHE_HOME": cache}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            cold = start(options.model, environment)
            warm = [start(options.model, environment) for _ in range(options.repetitions)]
        sys.stdout.write(table(title, cold, warm) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
