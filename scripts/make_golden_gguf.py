"""Writes tests/golden_gguf/: what the package `gguf` and `transformers` make of GGUF files.

pip install "gguf>=0.17" "transformers>=5" torch
python -m decodax.scripts.make_golden_gguf

blocks.npz          for each type of numbers, random blocks (TYPE_blocks) and their numbers (TYPE_numbers)
names.json          for each case of tests/golden that GGUF can hold, its tensors' names there ({} for an expert)
rope_factors.npz    the factors by which llama.cpp's converter stores Llama 3's scaling, for published models
quantised.gguf      a tiny Llama in many types, with a tokenizer and a chat template, written by `gguf`
quantised.json      the SHA-256 of each of its weights (float32) as `transformers` reads them from that file
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
GOLDEN = TESTS / "golden_gguf"
BLOCKS = 5  # of each type
CASES = {  # of tests/golden, with the architecture's name
    "llama": "llama",
    "llama_tied": "llama",
    "llama_biases": "llama",
    "llama_llama3": "llama",
    "llama_linear": "llama",
    "llama_yarn": "llama",
    "mistral_no_window": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "gemma2": "gemma2",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v2_groups": "deepseek2",
    "deepseek_v3": "deepseek2",
}
LLAMA3 = {"8B": (500000.0, 128, 8.0), "1B": (500000.0, 64, 32.0)}  # base, size of a head, factor
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
LAYER_TYPES = (  # of the tensors of each layer of the tiny Llama; those of the K types are random bytes
    {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1", "ffn_gate": "Q8_0", "ffn_up": "F16"},
    {"attn_q": "BF16", "attn_k": "F16", "attn_v": "MXFP4", "attn_output": "F32", "ffn_gate": "Q4_1", "ffn_up": "Q4_0"},
)
DOWN_TYPES = ("Q4_K", "Q6_K")


def random_blocks(kind: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random bytes, [blocks, bytes of a block]: also scales that are NaN, infinite or tiny."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return generator.integers(0, 256, (count, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8)


def write_blocks() -> None:
    from gguf import GGMLQuantizationType, quants

    generator, arrays = np.random.default_rng(0), {}
    kinds = (
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
        "BF16",
    )
    for kind in kinds:
        arrays[f"{kind}_blocks"] = random_blocks(kind, BLOCKS, generator)
        with np.errstate(all="ignore"):
            arrays[f"{kind}_numbers"] = quants.dequantize(arrays[f"{kind}_blocks"], GGMLQuantizationType[kind])
    np.savez_compressed(GOLDEN / "blocks.npz", **arrays)


def merged_name(name: str, family: str) -> str:
    """The name under which llama.cpp's converter looks a tensor up; the experts of a layer are one tensor there."""
    if family == "mixtral":
        name = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+\.", r"\1.feed_forward.experts.", name)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if name.endswith("sinks"):
        name += ".weight"
    name = re.sub(r"gate_up_proj_bias$", "gate_proj.bias", name)
    name = re.sub(r"gate_up_proj$", "gate_proj.weight", name)
    name = re.sub(r"down_proj_bias$", "down_proj.bias", name)
    name = re.sub(r"down_proj$", "down_proj.weight", name)
    return re.sub(r"experts\.\d+\.", "experts.", name)


def write_names() -> None:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    numbers = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    found: dict[str, Any] = {}
    for case, arch in CASES.items():
        config = json.loads((TESTS / "golden" / case / "config.json").read_text())
        names = get_tensor_name_map(MODEL_ARCH(numbers[arch]), config["num_hidden_layers"])
        with safe_open(TESTS / "golden" / case / "model.safetensors", framework="np") as file:
            stored = list(file.keys())
        found[case] = {"architecture": arch, "names": {}}
        for name in stored:
            ours = names.get_name(merged_name(name, config["model_type"]), try_suffixes=(".weight", ".bias"))
            if ours is None:
                raise RuntimeError(f"{case}: gguf has no name for {name}")
            found[case]["names"][re.sub(r"experts\.\d+\.", "experts.{}.", name)] = ours
    (GOLDEN / "names.json").write_text(json.dumps(found, indent=0) + "\n")


def llama3_factors(base: float, head_size: int, factor: float) -> np.ndarray:
    """The factors as llama.cpp's converter computes them (low 1, high 4, length 8192), powers in float32."""
    frequencies = 1.0 / np.float32(base) ** (np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size))
    factors = []
    for frequency in frequencies.astype(float):
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write_quantised() -> None:
    import gguf
    from gguf import GGMLQuantizationType, quants
    from tokenizers.pre_tokenizers import ByteLevel

    generator, path = np.random.default_rng(3), GOLDEN / "quantised.gguf"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ a", "h e", "Ġ t", "Ġt he"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    hidden, heads, kv_heads, width = 32, 4, 2, 256
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(len(LAYER_TYPES))
    writer.add_context_length(89)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        number = GGMLQuantizationType[kind]
        if kind.endswith("_K"):
            blocks = random_blocks(kind, math.prod(shape) // 256, generator)
            halves = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]  # where scales are: of sane size
            for start in halves:
                sizes = generator.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
                blocks[:, start : start + 2] = sizes.view(np.uint8).reshape(-1, 2)
            data = blocks.reshape(shape[0], -1)
        else:
            values = generator.normal(size=shape, scale=0.3).astype(np.float32)
            if len(shape) == 1:
                values += 1
            data = quants.quantize(values, number)
        writer.add_tensor(name, data, raw_dtype=number)

    add("token_embd.weight", (len(tokens), hidden), "Q8_0")
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden * kv_heads // heads, hidden),
        "attn_v": (hidden * kv_heads // heads, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (width, hidden),
        "ffn_up": (width, hidden),
    }
    for layer, (types, down) in enumerate(zip(LAYER_TYPES, DOWN_TYPES, strict=True)):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (hidden,), "F32")
        for name, kind in types.items():
            add(f"blk.{layer}.{name}.weight", shapes[name], kind)
        add(f"blk.{layer}.ffn_down.weight", (hidden, width), down)
    add("output_norm.weight", (hidden,), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_expected(path)


def write_expected(path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            numbers = np.ascontiguousarray(tensor.numpy(), np.float32)
            expected[name] = [list(numbers.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
    path.with_suffix(".json").write_text(json.dumps(expected, indent=0) + "\n")


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    write_blocks()
    write_names()
    np.savez(GOLDEN / "rope_factors.npz", **{name: llama3_factors(*sizes) for name, sizes in LLAMA3.items()})
    write_quantised()
    for file in sorted(GOLDEN.iterdir()):
        print(f"{file.stat().st_size:8,} {file.name}")


if __name__ == "__main__":
    main()
