"""Mapping files: what they may say, and one clear error for all else."""

import json

import pytest

from jaxserve.checkpoints.flax_trees import mapping
from jaxserve.errors import CheckpointError

RULE = {"from": "decoder/layers_{layer}/mlp/wo/kernel", "to": "layers/{layer}/mlp/down_proj/kernel"}


def parsed(**fields):
    return mapping.parse(json.dumps({"rules": [RULE]} | fields), "my.yaml")


def rule(**fields):
    return parsed(rules=[RULE | fields])


@pytest.mark.parametrize(
    ("pattern", "path", "captures"),
    [
        ("layers_{layer}/w", "layers/12/w", {"layer": "12"}),
        ("layers/{layer}/w", "layers/x/w", None),
        ("layers_{layer}/mlp/wi_0/kernel", "layers/3/mlp/wi/0/kernel", {"layer": "3"}),
        ("a/{+rest}/scale", "a/b/c/scale", {"rest": "b/c"}),
        ("a/{+rest}", "a", None),
        ("*/w", "q/w", {}),
        ("*/w", "q/p/w", None),
        ("**/rngs/**", "layers/0/d/rngs/count", {}),
        ("a.b/[c]", "a.b/[c]", {}),
        ("a.b", "axb", None),
    ],
)
def test_patterns(pattern, path, captures):
    assert mapping.Rule(pattern, {}).match(path) == captures


def test_targets_are_filled_in():
    facts = {"num_hidden_layers": 26}
    captures = {"block": "3", "slot": "2", "path": "mlp/up_proj/kernel"}
    assert mapping.fill("layers/{6*block+slot}/{+path}", captures, facts) == "layers/20/mlp/up_proj/kernel"
    assert mapping.fill("layers/{num_hidden_layers//6*6+slot}/x", captures, facts) == "layers/26/x"


def test_conditions_are_fields_of_the_configuration():
    found = rule(when={"model_type": ["gemma", "llama"], "tie_word_embeddings": True}).rules[0]
    assert found.holds({"model_type": "llama", "tie_word_embeddings": True})
    assert not found.holds({"model_type": "llama", "tie_word_embeddings": False})
    assert not found.holds({"tie_word_embeddings": True})


@pytest.mark.parametrize("name", mapping.BUILT_IN)
def test_built_in_maps_are_files_in_this_very_format(name, tmp_path):
    """What --show-mapping prints is what the name means."""
    (tmp_path / "copy.yaml").write_text(mapping.text_of(name))
    copy, original = mapping.read(tmp_path / "copy.yaml"), mapping.built_in(name)
    assert copy.rules == original.rules and copy.roots == original.roots and copy.ignore == original.ignore
    assert not original.every_rule_must_match


ERRORS = {
    "no list of rules": (lambda: parsed(rules=[]), "my.yaml: rules must be a list of at least one rule"),
    "no mapping": (lambda: mapping.parse("- a", "my.yaml"), "my.yaml must be a mapping with the keys"),
    "no YAML": (lambda: mapping.parse("rules: [", "my.yaml"), "my.yaml is not valid YAML"),
    "a Python object": (lambda: mapping.parse("rules: !!python/object/apply:os.getpid []", "my.yaml"), "not valid YAML"),
    "unknown key": (lambda: parsed(layers=3), "my.yaml: unknown key 'layers'; allowed are every_rule_must_match, ignore"),
    "unknown key of a rule": (lambda: rule(transpose=True), "my.yaml: rule 1: unknown key 'transpose'; allowed are from"),
    "no from": (lambda: rule(**{"from": 3}), "rule 1: from must be a path"),
    "no to": (lambda: rule(to=None), "to must be a path, or paths with their axes, got None"),
    "wrong axes": (lambda: rule(to={"layers/{layer}/w": "A B -> C"}), r"rule 1 \(decoder/.*both sides of ->"),
    "no axes": (lambda: rule(to={"layers/{layer}/w": 3}), "axes must be text such as"),
    "a capture in both": (lambda: rule(to={"layers/{layer}/w": "{layer} A -> A"}), "layer is a capture of the path and of"),
    "a bound axis unused": (lambda: rule(to={"norm/scale": "{n} A -> A"}), r"the target norm/scale must have \{n\} in it"),
    "a capture twice": (lambda: rule(**{"from": "a/{n}/b/{n}"}), "a capture may be there once"),
    "wrong value": (lambda: rule(value="x *"), "no arithmetic expression"),
    "a number as value": (lambda: rule(value=2), "value must be text"),
    "wrong when": (lambda: rule(when=["llama"]), "when must map fields of config.json to values"),
    "wrong roots": (lambda: parsed(roots="params"), "roots must be a list of paths, got 'params'"),
    "wrong flag": (lambda: parsed(every_rule_must_match="no"), "must be true or false, got 'no'"),
    "no file": (lambda: mapping.read("/nowhere/my.yaml"), "mapping file /nowhere/my.yaml cannot be read: No such file"),
    "unknown name": (lambda: mapping.text_of("keras"), "tree must be one of auto, canonical, maxtext.*got 'keras'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(CheckpointError, match=message):
        call()
