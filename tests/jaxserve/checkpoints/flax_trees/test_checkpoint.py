"""What a foreign checkpoint is given: configuration, tokenizer, a mapping of one's own; from the command line."""

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jaxserve.checkpoints.load import detect
from jaxserve.checkpoints.manifest import HUGGINGFACE_NAME
from jaxserve.errors import CheckpointError
from jaxserve.models.weights import flatten
from jaxserve.testing.tiny_checkpoint import write_tiny_llama
from serve.cli import app


@pytest.fixture(scope="module")
def tunix_like(known, tmp_path_factory):
    """A checkpoint whose names no built-in mapping knows. Not to be changed by tests."""
    known = known(tokenizer="bytes", vocab_size=320)
    m = known.model
    tree = {
        "embed": known.weight("model.embed_tokens"),
        "out_norm": known.weight("model.norm"),
        "out": known.weight("lm_head"),
    }
    for index in range(m.num_layers):
        tree[f"block_{index}"] = {
            "qkv": np.concatenate([known.weight(f"self_attn.{name}_proj", index) for name in "qkv"]).T,  # [D, (N+2K)*H]
            "o": known.heads_out(index),
            "w_in": np.stack([known.weight(f"mlp.{name}_proj", index).T for name in ("gate", "up")], axis=-1),  # [D, F, 2]
            "w_out": known.weight("mlp.down_proj", index).T,
            "norms": np.stack([known.weight(f"{name}_layernorm", index) for name in ("input", "post_attention")]),
        }
        qkv = tree[f"block_{index}"].pop("qkv")
        tree[f"block_{index}"] |= {"q": qkv[:, :64].reshape(40, 4, 16), "kv": qkv[:, 64:].reshape(40, 2, 2, 16)}
    path = tmp_path_factory.mktemp("own") / "checkpoint"
    ocp.PyTreeCheckpointer().save(path, {"weights": tree, "ema": {"embed": tree["embed"]}})
    return path


RULES = {
    "roots": ["weights"],
    "rules": [
        {"from": "embed", "to": "embed_tokens/embedding"},
        {"from": "out_norm", "to": "norm/scale"},
        {"from": "out", "to": {"lm_head/kernel": "V D -> D V"}},
        {"from": "block_{n}/q", "to": {"layers/{n}/self_attn/q_proj/kernel": "D N H -> D (N H)"}},
        {
            "from": "block_{n}/kv",
            "to": {
                "layers/{n}/self_attn/k_proj/kernel": "D 0 K H -> D (K H)",
                "layers/{n}/self_attn/v_proj/kernel": "D 1 K H -> D (K H)",
            },
        },
        {"from": "block_{n}/o", "to": {"layers/{n}/self_attn/o_proj/kernel": "N H D -> (N H) D"}},
        {
            "from": "block_{n}/w_in",
            "to": {"layers/{n}/mlp/gate_proj/kernel": "D F 0 -> D F", "layers/{n}/mlp/up_proj/kernel": "D F 1 -> D F"},
        },
        {"from": "block_{n}/w_out", "to": "layers/{n}/mlp/down_proj/kernel"},
        {
            "from": "block_{n}/norms",
            "to": {"layers/{n}/input_layernorm/scale": "0 D -> D", "layers/{n}/post_attention_layernorm/scale": "1 D -> D"},
        },
    ],
}


@pytest.fixture
def known_here(known):
    return known(tokenizer="bytes", vocab_size=320)


@pytest.fixture
def convert(tunix_like, tmp_path):
    def convert(*arguments, source=tunix_like, destination="out"):
        result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / destination), *map(str, arguments)])
        return result

    return convert


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_mapping_file_of_ones_own(suffix, convert, known_here, tmp_path):
    import yaml

    (tmp_path / f"my.{suffix}").write_text(json.dumps(RULES) if suffix == "json" else yaml.safe_dump(RULES))
    config = known_here.write_config(tmp_path / "config.json")
    result = convert("--mapping", tmp_path / f"my.{suffix}", "--config", config)
    assert result.exit_code == 0, result.stderr
    tensors = flatten(v1.load(str(tmp_path / "out/params")))
    assert {path: np.asarray(tensor).tobytes() for path, tensor in tensors.items()} == {
        path: np.ascontiguousarray(tensor).tobytes() for path, tensor in known_here.canonical.items()
    }


def test_to_hugging_face_with_a_tokenizer_and_another_type(convert, known_here, tmp_path):
    """The files of a Hugging Face directory are written out of order, and are the library's byte for byte all the same."""
    original = write_tiny_llama(tmp_path / "original", known_here.model)
    (tmp_path / "my.json").write_text(json.dumps(RULES))
    mapping = ("--mapping", tmp_path / "my.json")
    result = convert(*mapping, "--config", original, "--to", "huggingface", destination="same")
    assert result.exit_code == 0, result.stderr
    same = {p.name: p.read_bytes() for p in (tmp_path / "same").iterdir() if p.name != HUGGINGFACE_NAME}
    assert same == {p.name: p.read_bytes() for p in original.iterdir()}
    (tmp_path / "only").mkdir()
    shutil.copy(original / "tokenizer.json", tmp_path / "only")
    options = ("--config", original, "--tokenizer", tmp_path / "only", "--to", "huggingface", "--dtype", "bfloat16")
    assert convert(*mapping, *options, destination="cast").exit_code == 0
    assert {p.name for p in (tmp_path / "cast").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        HUGGINGFACE_NAME,
    }
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "cast/model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "cast/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("place", ["item", "step", "run", "beside the run"])
def test_a_configuration_beside_the_checkpoint_is_found(place, known, trees, tmp_path):
    known = known(is_tied=True)
    with ocp.CheckpointManager(tmp_path / "parent/run") as manager:
        manager.save(4, args=ocp.args.StandardSave(trees.gemma(known, "nested")))
    folder = {"item": "run/4/default", "step": "run/4", "run": "run", "beside the run": "."}[place]
    known.write_config(tmp_path / "parent" / folder / "config.json")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "parent/run"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert result.stderr.endswith("(gemma tree of step 4) for orbax\n")


ERRORS = {
    "no configuration": (lambda p: [], "has no config.json (looked in "),
    "a configuration that is not there": (lambda p: ["--config", p / "none.json"], "--config must be a Hugging Face config"),
    "an unknown layout": (lambda p: ["--config", p / "config.json"], "is a tree of no known layout: "),
    "another layout": (lambda p: ["--tree", "maxtext", "--config", p / "config.json"], "not fit the mapping maxtext (root ."),
    "both": (lambda p: ["--config", p / "config.json", "--tree", "nnx", "--mapping", p / "my.json"], "give --tree or --mapping"),
    "no mapping": (lambda p: ["--config", p / "config.json", "--mapping", p / "none.yaml"], "mapping file"),
    "no tokenizer": (lambda p: ["--config", p / "config.json", "--tokenizer", p / "none"], "--tokenizer must be a directory"),
    "a pattern of nothing": (
        lambda p: ["--config", p / "config.json", "--mapping", p / "typo.json"],
        "nothing matches the pattern block_{n}/w_uot; nearest leaf: weights/block_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_leave_nothing(case, convert, known_here, tmp_path):
    arguments, message = ERRORS[case]
    known_here.write_config(tmp_path / "config.json")
    (tmp_path / "my.json").write_text(json.dumps(RULES))
    (tmp_path / "typo.json").write_text(
        json.dumps(RULES | {"rules": [*RULES["rules"], {"from": "block_{n}/w_uot", "to": "x"}]})
    )
    result = convert(*arguments(tmp_path))
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_foreign_checkpoints_are_for_those_alone(convert, known_here, tmp_path):
    source = write_tiny_llama(tmp_path / "huggingface", known_here.model)
    result = convert("--tree", "maxtext", source=source)
    assert result.exit_code == 1
    assert "holds no Orbax tree (there is no _METADATA in it, in its items or in its steps); --tree" in result.stderr


def test_serving_a_foreign_checkpoint_says_what_to_do(tunix_like):
    with pytest.raises(
        CheckpointError, match="another Flax program wrote; `jaxserve convert .*` makes it one that can be served"
    ):
        detect(tunix_like)


def test_show_mapping_prints_a_file_that_can_be_used(known, trees, tmp_path):
    """The copy converts what the built-in mapping converts; a name that is none is said to be."""
    shown = CliRunner().invoke(app, ["convert", "--show-mapping", "gemma"])
    assert shown.exit_code == 0
    (tmp_path / "copy.yaml").write_text(shown.stdout)
    known = known(is_tied=True)
    ocp.PyTreeCheckpointer().save(tmp_path / "gemma", trees.gemma(known, "flat"))
    config, mapping = known.write_config(tmp_path / "config.json"), str(tmp_path / "copy.yaml")
    arguments = [
        str(tmp_path / "gemma"),
        str(tmp_path / "out"),
        "--mapping",
        mapping,
        "--config",
        str(config),
    ]
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert result.exit_code == 0, result.stderr
    assert "copy.yaml tree) for orbax" in result.stderr
    wrong = CliRunner().invoke(app, ["convert", "--show-mapping", "keras"])
    assert wrong.exit_code == 1 and "tree must be one of auto, canonical, maxtext" in wrong.stderr
