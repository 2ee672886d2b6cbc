"""What a compiled program depends on, as text: equal keys mean the same program.

Knows which kinds of values it can tell apart; anything else raises `UnknownDependency`, and a program that depends on it is
compiled at every start. Holds no state.
"""

import dataclasses
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

OUR_PACKAGES = ("jaxserve", "kernels_pallas", "sharding")

SOURCES = (
    "jaxserve/config.py",
    "jaxserve/errors.py",
    "jaxserve/execution",
    "jaxserve/models",
    "jaxserve/outputs.py",
    "jaxserve/plan.py",
    "jaxserve/request.py",
    "jaxserve/structured_outputs.py",
    "kernels_pallas",
    "sharding",
)
"""Of our packages, all that the modules import in which programs are written. Their text is in every key."""

_VERSIONED = ("builtins", "jax", "jaxlib", "ml_dtypes", "numpy")
_DISTRIBUTIONS = ("flax", "jax", "jaxlib", "ml_dtypes", "numpy")
"""Their versions are in every key."""

_SOURCE_SUFFIXES = (".py", ".json")

_ENVIRONMENT = ("LIBTPU_", "MOSAIC_", "PALLAS_", "TF_", "TRITON_", "XLA_")
"""Prefixes of variables that compilers read."""

_NOT_IN_PROGRAMS = ("jax_compilation_cache_", "jax_persistent_cache_", "jax_enable_compilation_cache", "jax_log")


class UnknownDependency(Exception):
    """A program depends on something that its key cannot hold; says on what."""


def digest(*texts: str) -> str:
    """Returns the SHA-256 of the texts, in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def describe_process(devices: Sequence[Any]) -> str:
    """Returns all that shapes every program of this process: our sources, versions, flags, processor and devices.

    Raises:
        UnknownDependency: sources changed since this process started, so that its programs may come from the older text.
    """
    if jax.process_count() > 1:
        raise UnknownDependency("several processes share the devices")
    flags = {name: str(value) for name, value in jax.config.values.items() if not name.startswith(_NOT_IN_PROGRAMS)}
    variables = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    return describe(
        {
            "sources": digest_sources(Path(__file__).parents[2], unchanged_since_s=_process_start_s()),
            "python": sys.version,
            "versions": {name: metadata.version(name) for name in _DISTRIBUTIONS},
            "flags": sorted(flags.items()),
            "variables": sorted(variables.items()),
            # XLA:CPU compiles for the instructions of this processor, and cuts loops for as many cores as it may use.
            "processor": (platform.machine(), _processor(), len(os.sched_getaffinity(0))),
            "backend": (devices[0].platform, devices[0].client.platform_version, len(jax.devices())),
            "devices": [(device.id, device.device_kind) for device in devices],
        }
    )


def digest_sources(root: Path, *, unchanged_since_s: float) -> str:
    """Returns the SHA-256 of the text of all `SOURCES` below `root`.

    Args:
        unchanged_since_s: a file that changed later [s since the epoch] need not be what was imported. By its ctime, which
            nobody can set back.

    Raises:
        UnknownDependency: a file has changed, or there are none to read.
    """
    total = hashlib.sha256()
    for source in SOURCES:
        files = [root / source] if source.endswith(".py") else sorted((root / source).rglob("*"))
        files = [path for path in files if path.suffix in _SOURCE_SUFFIXES and path.is_file()]
        if not files:
            raise UnknownDependency(f"{root / source} has no source text")
        for path in files:
            if path.stat().st_ctime >= unchanged_since_s:
                raise UnknownDependency(f"{path} has changed since this process started")
            total.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def describe(value: Any) -> str:
    """Returns a text that tells this value from every other one.

    A function of ours stands for its text and what it has bound: closure, defaults, the arguments of a `partial`. An object of
    ours with `trace_key` stands for its class and that.

    Raises:
        UnknownDependency: a kind of value that cannot be told apart, for instance a function from outside our packages.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, PartitionSpec):
        return f"PartitionSpec {describe(tuple(value))}"
    if isinstance(value, tuple | list):
        return f"{_name(type(value))}({', '.join(map(describe, value))})"
    if isinstance(value, frozenset | set):
        return f"{_name(type(value))}({', '.join(sorted(map(describe, value)))})"
    if isinstance(value, Mapping):
        return f"{_name(type(value))}({', '.join(f'{describe(k)}: {describe(v)}' for k, v in value.items())})"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)}, {describe(value.args)}, {describe(value.keywords)})"
    if isinstance(value, FunctionType):
        return _describe_function(value)
    return _describe_object(value)


def _describe_function(function: FunctionType) -> str:
    if not _is_from(OUR_PACKAGES, function.__module__):
        raise UnknownDependency(f"function {function.__module__}.{function.__qualname__} is not jaxserve's own")
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    bound = describe((function.__defaults__, function.__kwdefaults__, cells))
    place = f"{function.__module__}.{function.__qualname__}:{function.__code__.co_firstlineno}"
    return f"function {place} {bound}"


def _describe_object(value: Any) -> str:
    kind = type(value)
    if isinstance(value, type):
        return f"type {_name(value)}"
    if isinstance(value, np.dtype):
        return f"dtype {value.name}"
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"array {value.shape} {value.dtype.name} {value.weak_type} {describe(value.sharding)}"
    if isinstance(value, NamedSharding):
        return f"sharding {describe(value.mesh)} {describe(value.spec)} {value.memory_kind}"
    if isinstance(value, Mesh):
        return f"mesh {dict(value.shape)} {value.axis_types} {[device.id for device in value.devices.flat]}"
    if isinstance(value, Enum):
        return f"{_name(kind)}.{value.name}"
    if hasattr(value, "trace_key"):
        return f"{_name(kind)} {describe(value.trace_key)}"
    if dataclasses.is_dataclass(value):
        return f"{_name(kind)} {describe({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})}"
    raise UnknownDependency(f"a {kind.__module__}.{kind.__qualname__} cannot be told from another one")


def _name(kind: type) -> str:
    """Returns the full name of a class whose text or version is in every key."""
    if not _is_from((*OUR_PACKAGES, *_VERSIONED), kind.__module__):
        raise UnknownDependency(f"class {kind.__module__}.{kind.__qualname__} is not jaxserve's own")
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_from(packages: Sequence[str], module: str) -> bool:
    return module.partition(".")[0] in packages


def _processor() -> str:
    """Returns the model and the instruction sets of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {line.partition(":")[0].strip(): line for line in lines}
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # of x86, then of Arm
    return "\n".join(facts[name] for name in names if name in facts) or platform.processor()


def _process_start_s() -> float:
    """Returns when this process started [s since the epoch].

    Raises:
        UnknownDependency: the system does not say.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError as error:
        raise UnknownDependency("the system does not say when this process started") from error
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
