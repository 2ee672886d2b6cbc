"""jaxserve: an LLM serving engine native to JAX.

    from jaxserve import LLM, SamplingParams

Knows the public names and where each one lives; a name's module is imported when the name is first used, so that the parts
without jax stay without it. Before anything else it makes sure that `kernels_pallas` and `sharding` are its own siblings
(ADR 0001).
"""

import importlib
import importlib.util
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.config import EngineConfig
    from jaxserve.errors import (
        CheckpointError,
        ConfigError,
        ConstraintError,
        DrainingError,
        EngineDeadError,
        IntegrityError,
        InvalidRequestError,
        JaxserveError,
        ModelNotFoundError,
        OverloadedError,
        UnknownModelError,
    )
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxserve.request import SamplingParams
    from jaxserve.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ConstraintError",
    "DrainingError",
    "EngineConfig",
    "EngineDeadError",
    "IntegrityError",
    "InvalidRequestError",
    "JaxserveError",
    "Logprob",
    "ModelNotFoundError",
    "OverloadedError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnknownModelError",
    "__version__",
]

_MODULE_OF = {
    "LLM": "llm",
    "AsyncEngine": "async_engine",
    "CompletionOutput": "outputs",
    "EngineConfig": "config",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "request",
    "StructuredOutputsParams": "structured_outputs",
}
"""Where a public name lives; every other one lives in `errors`."""


def _check_sibling(name: str) -> None:
    """Raises an ImportError unless the top-level package `name` is found beside this one."""
    expected = pathlib.Path(__file__).resolve().parent.parent / name
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was put into sys.modules by hand
        spec = None
    places = list(spec.submodule_search_locations or [spec.origin]) if spec else []
    if not any(place and pathlib.Path(place).resolve() == expected for place in places):
        raise ImportError(
            f"jaxserve needs its own package {name!r} at {expected}, but `import {name}` finds {places or 'nothing'}. "
            f"Rename or uninstall what stands there, or put {expected.parent} before it on sys.path."
        )


for _sibling in ("kernels_pallas", "sharding"):
    _check_sibling(_sibling)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    module = importlib.import_module(f"jaxserve.{_MODULE_OF.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
