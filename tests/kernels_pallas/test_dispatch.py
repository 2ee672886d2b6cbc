"""Choosing a backend, and refusals."""

import jax
import pytest

from kernels_pallas import dispatch


def refuse(reason):
    def implementation(*_, **__):
        raise NotImplementedError(reason)

    return implementation


def test_auto_takes_the_platforms_order_and_skips_refusals(monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    implementations = {"xla": lambda x: ("xla", x), "triton": lambda x: ("triton", x)}
    assert dispatch.choose_and_call("op", implementations, "auto", 1) == ("triton", 1)
    implementations["triton"] = refuse("odd head_dim")
    assert dispatch.choose_and_call("op", implementations, "auto", 1) == ("xla", 1)


def test_every_reason_is_in_the_error(monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    implementations = {"xla": refuse("too slow"), "triton": refuse("odd head_dim")}
    with pytest.raises(NotImplementedError, match="op: no backend .*triton: odd head_dim; xla: too slow"):
        dispatch.choose_and_call("op", implementations, "auto")
    with pytest.raises(NotImplementedError, match="takes these arguments; xla: too slow$"):
        dispatch.choose_and_call("op", implementations, "xla")


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"op: backend 'mosaic' is unknown, choose one of \['auto', 'xla'\]"):
        dispatch.choose_and_call("op", {"xla": refuse("")}, "mosaic")


def test_platform_is_that_of_the_default_device():
    assert dispatch.current_platform() == "cpu"
    with jax.default_device("cpu"):
        assert dispatch.current_platform() == "cpu"

    class FakeDevice:
        platform = "cuda"

    assert dispatch.PREFERENCES["gpu"][0] == "triton"
    assert dispatch._platform_of(FakeDevice()) == "gpu"
