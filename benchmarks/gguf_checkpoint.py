"""Writes a model of `random_checkpoint` as GGUF too, the same float32 numbers, for llama.cpp.

    python -m benchmarks.gguf_checkpoint DIR

No tokenizer: the benchmark works on token ids. Needs gguf and safetensors, which stand in llama.cpp's environment.
"""

import json
import sys
from pathlib import Path

import numpy as np

NAME = "model-f32.gguf"


def write(directory: Path) -> Path:
    """Writes DIR/model-f32.gguf unless it is there, and returns its path."""
    import gguf  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import load_file

    path = directory / NAME
    if path.exists():
        return path
    config = json.loads((directory / "config.json").read_text())
    num_heads, num_kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])
        if heads:  # from rotating halves to rotating neighbours
            tensor = tensor.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.replace(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
