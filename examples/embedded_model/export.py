"""Writing the model down: parameters, Hugging Face configuration and tokenizer, each file whole or not at all."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from embedded_model.corpus import BOS, EOS
from embedded_model.model import LlamaConfig
from jaxserve.checkpoints import orbax_store


def write(path: pathlib.Path, data: bytes) -> None:
    """Replaces `path` in one step, so that a reader never meets half a file."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """The same, for an `.npz`."""
    scratch = path.with_name(path.name + ".partial.npz")
    np.savez(scratch, **arrays)
    os.replace(scratch, path)


def parameter_tree(params: nnx.State) -> dict:
    """`params` as nested dicts of float32 numpy arrays, with layer numbers as strings."""
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(params))
    return traverse_util.unflatten_dict(
        {tuple(str(key) for key in path): np.asarray(jax.device_get(value)) for path, value in flat.items()}
    )


def rounded_to_bfloat16(params: nnx.State) -> nnx.State:
    """The values that will be served, kept as float32."""
    return jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), params)


def model_config(config: LlamaConfig) -> dict:
    """The `config.json` of a Hugging Face Llama checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }


def text_files(config: LlamaConfig, tokenizer: bytes) -> dict[str, bytes]:
    """The files beside the parameters, by name, without `config.json`."""
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": config.max_position_embeddings,
    }
    generation_config = {"bos_token_id": BOS, "eos_token_id": EOS, "max_length": config.max_position_embeddings}
    return {
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": as_json(tokenizer_config),
        "generation_config.json": as_json(generation_config),
    }


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")


def export_npz(folder: pathlib.Path, params: nnx.State, config: LlamaConfig, tokenizer: bytes) -> None:
    """Writes `params.npz` (keys are tree paths joined by `/`) and the files around it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {"config.json": as_json(model_config(config)), **text_files(config, tokenizer)}.items():
        write(folder / name, data)
    write_arrays(folder / "params.npz", traverse_util.flatten_dict(parameter_tree(params), sep="/"))


def export_checkpoint(folder: pathlib.Path, params: nnx.State, config: LlamaConfig, tokenizer: bytes, card: str) -> None:
    """Writes what the package ships: the parameters in bfloat16 as an Orbax checkpoint, and the model card beside them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tree = jax.tree.map(lambda array: array.astype(jnp.bfloat16), parameter_tree(params))
    orbax_store.save(folder, tree, model_config(config), text_files(config, tokenizer), overwrite=True)
    write(folder / "README.md", card.encode("utf-8"))
