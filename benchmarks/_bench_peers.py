"""Runs the other contestants of `bench_decode.py`, transformers and llama.cpp, with the same random Llama weights.

Each is a function that continues a prompt greedily and returns the tokens and the speed of decoding alone. Their
packages are imported only here and only when asked for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._bench_common import Shape
from decodax.models.model import Params

# prompt [T], number of new tokens -> (new tokens, tokens per second while decoding)
Continue = Callable[[np.ndarray, int], tuple[np.ndarray, float]]

# Our names of one layer's weights, and those of transformers and of GGUF.
LAYER_NAMES = {
    ("mixer_norm", "weight"): ("input_layernorm", "attn_norm"),
    ("mixer", "query"): ("self_attn.q_proj", "attn_q"),
    ("mixer", "key"): ("self_attn.k_proj", "attn_k"),
    ("mixer", "value"): ("self_attn.v_proj", "attn_v"),
    ("mixer", "out"): ("self_attn.o_proj", "attn_output"),
    ("feed_forward_norm", "weight"): ("post_attention_layernorm", "ffn_norm"),
    ("feed_forward", "gate"): ("mlp.gate_proj", "ffn_gate"),
    ("feed_forward", "up"): ("mlp.up_proj", "ffn_up"),
    ("feed_forward", "down"): ("mlp.down_proj", "ffn_down"),
}


def named_weights(params: Params, num_layers: int) -> list[tuple[str, str, jax.Array]]:
    """(name in transformers, name in GGUF, array) of every weight."""
    named = [
        ("model.embed_tokens.weight", "token_embd.weight", params["embedding"]),
        ("model.norm.weight", "output_norm.weight", params["final_norm"]["weight"]),
        ("lm_head.weight", "output.weight", params["head"]),
    ]
    for layer in range(num_layers):
        for (module, name), (theirs, gguf_name) in LAYER_NAMES.items():
            array = params[f"blocks_{layer}"][module][name]
            named.append((f"model.layers.{layer}.{theirs}.weight", f"blk.{layer}.{gguf_name}.weight", array))
    return named


def transformers_peer(shape: Shape, params: Params, threads: int) -> Continue:
    """`generate` of transformers with its default cache; the weights are shared with JAX, not copied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Remembers when each token came; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.hf_config())).eval()
    # A copy, since torch needs writable memory.
    state = {name: torch.from_numpy(np.array(array)) for name, _, array in named_weights(params, shape.num_layers)}
    model.load_state_dict(state, assign=True)
    # Buffers (the rotary frequencies) have no value yet on the meta device: made again on the CPU.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None

    def run(prompt: np.ndarray, num_new: int) -> tuple[np.ndarray, float]:
        clock = Clock()
        tokens = torch.from_numpy(np.asarray(prompt, np.int64))[None]
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_new,
                do_sample=False,
                use_cache=True,
                streamer=clock,
            )
        # Between the first new token and the last one there are num_new - 1 decoding steps.
        return out[0, len(prompt) :].numpy(), (num_new - 1) / (clock.times[-1] - clock.times[1])

    return run


def write_gguf(path: Path, shape: Shape, params: Params) -> None:
    """The model as an F32 GGUF file without a tokenizer.

    llama.cpp rotates neighbouring coordinates where Hugging Face rotates the halves of a head, so the query and key
    matrices are reordered: coordinate j of the first half goes to 2 j, of the second half to 2 j + 1.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for _, name, array in named_weights(params, shape.num_layers):
        values = np.asarray(array, np.float32)
        if "attn_q" in name or "attn_k." in name:
            heads = values.reshape(-1, 2, shape.head_size // 2, values.shape[1])
            values = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_peer(shape: Shape, params: Params, threads: int, folder: Path, num_tokens: int) -> Continue:
    """llama.cpp through the low-level functions of llama-cpp-python: token ids in, its own greedy sampler.

    Weights and cache are float32, as in the other contestants.
    """
    import ctypes

    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    path = folder / "random-f32.gguf"
    write_gguf(path, shape, params)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp cannot load the GGUF file written for it")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = num_tokens
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, options)
    sampler = llama_cpp.llama_sampler_init_greedy()

    def evaluate(tokens: np.ndarray) -> None:
        ids = (llama_cpp.llama_token * len(tokens))(*map(int, tokens))
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp cannot run these tokens")

    def run(prompt: np.ndarray, num_new: int) -> tuple[np.ndarray, float]:
        quiet  # noqa: B018  (llama.cpp keeps a pointer to it: it has to live as long as this function)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        evaluate(prompt[:-1])
        llama_cpp.llama_synchronize(context)
        start = time.perf_counter()
        tokens = [int(prompt[-1])]
        for _ in range(num_new):
            evaluate(np.array(tokens[-1:]))
            tokens.append(llama_cpp.llama_sampler_sample(sampler, context, -1))
        return np.array(tokens[1:]), num_new / (time.perf_counter() - start)

    return run
