"""From logical axes to PartitionSpecs."""

import pytest
from jax.sharding import PartitionSpec

from sharding import axes
from sharding.rules import RULES, spec_for

TENSOR = ("kv", "group")


@pytest.mark.parametrize(
    ("logical", "spec"),
    [
        ((), PartitionSpec()),
        ((None,), PartitionSpec(None)),
        ((axes.EMBED,), PartitionSpec(None)),
        ((axes.VOCAB, axes.EMBED), PartitionSpec(TENSOR, None)),
        ((axes.EMBED, axes.FUSED), PartitionSpec(None, TENSOR)),
        ((axes.MLP, axes.EMBED), PartitionSpec(TENSOR, None)),
        ((axes.EMBED, axes.HEADS, None), PartitionSpec(None, TENSOR, None)),
        ((axes.EMBED, axes.KV_HEADS, None), PartitionSpec(None, ("kv",), None)),
        ((axes.PAGES, axes.KV_HEADS, None, None), PartitionSpec(None, ("kv",), None, None)),
    ],
)
def test_each_dimension_is_cut_as_its_name_says(logical, spec):
    assert spec_for(logical) == spec


@pytest.mark.parametrize("logical", [(axes.VOCAB, axes.MLP), (axes.HEADS, axes.KV_HEADS), (axes.VOCAB, None, axes.VOCAB)])
def test_a_mesh_axis_cuts_one_dimension_only(logical):
    with pytest.raises(ValueError, match="both use mesh axis 'kv'") as caught:
        spec_for(logical)
    assert all(repr(name) in str(caught.value) for name in logical if name)


@pytest.mark.parametrize("name", ["vocabulary", "kv", ""])
def test_a_name_without_a_rule_is_refused(name):
    with pytest.raises(ValueError, match=f"logical axis {name!r} has no rule; known: embed, fused, heads"):
        spec_for((axes.EMBED, name))


def test_other_rules_can_be_given():
    assert spec_for(("rows",), {"rows": ("data",)}) == PartitionSpec(("data",))


def test_rules_name_axes_of_the_mesh_and_every_logical_axis_has_one():
    assert {mesh_axis for rule in RULES.values() for mesh_axis in rule} <= set(axes.MESH_AXES)
    logical = {value for name, value in vars(axes).items() if name.isupper() and isinstance(value, str)} - set(
        axes.MESH_AXES
    )
    assert logical == set(RULES)
