"""Tokens per second of llama.cpp on a dense checkpoint of `--example speed`, quantized to one type throughout.

    pip install llama-cpp-python gguf
    python llama_cpp_speed.py FOLDER/llama-617m/dense [q4_k|q8_0|f32] [ROUNDS]

The GGUF file is kept beside the checkpoint.
"""

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

THREADS = 2
PROMPT_TOKENS, DECODE_PROMPT_TOKENS, NEW_TOKENS = 512, 8, 48
TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
}


def tensors(path):
    """The f32 tensors of a safetensors file, not read before they are used."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            yield name, data[begin:end].view(np.float32).reshape(info["shape"])


def interleaved(weight, heads):
    """Rows of a head in the order in which llama.cpp rotates them: pairs instead of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder, path):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"], config["architectures"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for name, weight in tensors(folder / "model.safetensors"):
        name = name.removesuffix(".weight")
        if name in OTHERS:
            writer.add_tensor(f"{OTHERS[name]}.weight", weight)
            continue
        _, _, layer, part = name.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):
            weight = interleaved(weight, heads if part.endswith("q_proj") else kv_heads)
        writer.add_tensor(f"blk.{layer}.{NAMES[part]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(folder, kind):
    path = folder / f"{kind}.gguf"
    if not path.exists():
        unquantized = folder / "f32.gguf"
        if not unquantized.exists():
            write_gguf(folder, unquantized)
        if kind != "f32":
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype = TYPES[kind]
            parameters.nthread = THREADS
            parameters.pure = True
            result = llama_cpp.llama_model_quantize(str(unquantized).encode(), str(path).encode(), ctypes.byref(parameters))
            assert result == 0, result
    return path


class Model:
    def __init__(self, path):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = 1024
        parameters.n_batch = parameters.n_ubatch = PROMPT_TOKENS
        parameters.n_threads = parameters.n_threads_batch = THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, tokens):
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        llama_cpp.llama_synchronize(self.context)


def main():
    folder, kind = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "q4_k"
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    model = Model(quantized(folder, kind))
    random = np.random.default_rng(1)
    prefill, decode = [], []
    for n in range(rounds + 1):
        model.clear()
        prompt = random.integers(0, 256, PROMPT_TOKENS).tolist()
        start = time.perf_counter()
        model.decode(prompt)
        middle = time.perf_counter()
        model.clear()
        model.decode(prompt[:DECODE_PROMPT_TOKENS])
        begin = time.perf_counter()
        for token in random.integers(0, 256, NEW_TOKENS).tolist():
            model.decode([token])
        end = time.perf_counter()
        if n > 0:  # the first round warms up
            prefill.append(PROMPT_TOKENS / (middle - start))
            decode.append(NEW_TOKENS / (end - begin))
    for name, rates in (("prefill", prefill), ("decode", decode)):
        print(f"llama.cpp {llama_cpp.__version__}, {kind}, {name}: {statistics.median(rates):.1f} "
              f"[{min(rates):.1f}–{max(rates):.1f}] tokens/s")


main()
