"""Chooses the implementation of an op.

Knows which backends exist and in which order a platform tries them. An implementation that cannot take its arguments
raises `NotImplementedError` with its reasons while it is traced; the next one is tried, and if all refuse the error
carries every reason. Holds no state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax

Result = TypeVar("Result")

PREFERENCES: Mapping[str, Sequence[str]] = {"gpu": ("triton", "xla"), "cpu": ("xla",)}
"""What "auto" tries on a platform, best first; a platform that is not listed takes "xla"."""


def current_platform() -> str:
    """Returns "cpu", "gpu" or another platform: that of the default device where one is set, else of the default backend.

    The default device comes first because a compilation for a GPU that is not there sets it (`gpu_compile`).
    """
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
    return _platform_of(jax.default_backend() if device is None else device)


def _platform_of(device: object) -> str:
    platform = getattr(device, "platform", device)
    return "gpu" if platform in ("cuda", "rocm") else str(platform)


def choose_and_call(
    op: str, implementations: Mapping[str, Callable[..., Result]], backend: str, *args: object, **kwargs: object
) -> Result:
    """Calls the first implementation that takes the arguments.

    Args:
      op: name of the op, for messages.
      implementations: backend name to function.
      backend: a key of `implementations`, or "auto" for the platform's order of preference.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      ValueError: there is no such backend.
      NotImplementedError: every candidate refused; the message has each one's reason.
    """
    if backend == "auto":
        order = [name for name in PREFERENCES.get(current_platform(), ("xla",)) if name in implementations]
    elif backend in implementations:
        order = [backend]
    else:
        raise ValueError(f"{op}: backend {backend!r} is unknown, choose one of {['auto', *implementations]}")
    reasons = []
    for name in order:
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as refusal:
            reasons.append(f"{name}: {refusal}")
    raise NotImplementedError(f"{op}: no backend takes these arguments; " + "; ".join(reasons))
