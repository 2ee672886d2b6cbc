"""All that a machine with a GPU can tell about this engine, in one command, meant to end within nine minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu numerics attention --out results
    python -m benchmarks.gpu --device cpu --small        # the same script at small shapes, to see that it runs

Parts: ceilings (always), numerics, attention, kernels (all others), engine. Each is printed and saved when it ends, so a
run that is cut off keeps what it has. Ends with 1 where a kernel is wrong, something is compiled after ready, or a part
breaks; says which. Needs jax, flax, numpy and what the engine's core needs (tests/bare_machine.txt); no network.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

PARTS = ("numerics", "attention", "kernels", "engine")


def main() -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--small", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; another one each time")
    parser.add_argument("--trace", action="store_true", help="of a few decode steps, into the directory too")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="directory for report.json and report.md")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    # JAX takes three quarters of a GPU's memory unless told otherwise; weights, their first layout and the pools need more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ["JAX_PLATFORMS"] = "cuda" if arguments.device == "gpu" else "cpu"
    return run(arguments.parts or PARTS, arguments.small, arguments.seed, arguments.out, has_trace=arguments.trace)


def run(parts: Sequence[str], is_small: bool, seed: int, directory: Path, has_trace: bool = False) -> int:
    """Returns the exit code: 0, or 1 where anything failed."""
    import jax

    from benchmarks.gpu import attention, ceilings, engine, kernels, numerics
    from benchmarks.gpu.report import Part, Report, Row
    from benchmarks.gpu.sizes import FULL, SMALL
    from kernels_pallas.paged_attention.cases import CASES

    sizes = SMALL if is_small else FULL
    device = jax.devices()[0]
    report = Report(
        directory,
        {
            "device": f"{device.device_kind} ({device.platform})",
            "shapes": "small: only whether it runs; no figure below says how fast anything is" if is_small else "full",
            "jax": jax.__version__,
            "seed": seed,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )

    limits = ceilings.measure(report.add, **sizes.ceilings)
    (case,) = (case for case in CASES if case.name == sizes.case_name)
    num_calls = sizes.attention.num_calls
    steps: dict[str, Callable[[], None]] = {
        "numerics": lambda: numerics.measure(report.add, seed=seed, num_rows=sizes.num_numerics_rows),
        "attention": lambda: attention.measure(limits, sizes.attention, case, report.add),
        "kernels": lambda: kernels.measure(limits, sizes.counts, sizes.vocab_size, case, report.add, num_calls=num_calls),
        "engine": lambda: engine.measure(limits, sizes.engine, report.add, directory / "trace" if has_trace else None),
    }
    for name in parts:
        try:
            steps[name]()
        except Exception as error:  # the other parts can still tell something
            traceback.print_exc()
            report.add(Part(f"The part {name} broke off", [Row(type(error).__name__, {}, str(error).partition("\n")[0])]))
    failures = report.failures()
    sys.stdout.write("".join(f"FAILED {failure}\n" for failure in failures) or "\nAll is right.\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
