"""Writes tests/golden_formats/: one tiny random llama in every weight format, with the numbers that its weights encode.

    pip install torch transformers bitsandbytes compressed-tensors "mlx[cpu]"
    python -m decodax.scripts.make_golden_formats [CASE ...]

Each case is a folder with config.json, model.safetensors and numbers.npz: the float32 numbers of every packed weight,
by name, as the format's own library dequantises them on CPU. GPTQ and AWQ have none that runs there:
`_golden_formats.py` computes them. MLX is imported for its cases only.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from decodax.scripts._golden_formats import Arrays, awq, gptq

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden_formats"
EMBEDDING = "model.embed_tokens.weight"

Pack = Callable[[np.random.Generator, str, tuple[int, int]], tuple[Arrays, np.ndarray] | None]


def config_of(hidden: int, width: int, quantization: dict[str, Any]) -> dict[str, Any]:
    """The fields of a llama with one layer; MLX has its own name for the quantisation."""
    name = "quantization_config" if "quant_method" in quantization else "quantization"
    return {
        "model_type": "llama",
        "vocab_size": 43,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        name: quantization,
    }


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model."""
    hidden, width, layer = config["hidden_size"], config["intermediate_size"], "model.layers.0"
    return {
        EMBEDDING: (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
        f"{layer}.self_attn.k_proj.weight": (hidden // 2, hidden),
        f"{layer}.self_attn.v_proj.weight": (hidden // 2, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
        f"{layer}.mlp.gate_proj.weight": (width, hidden),
        f"{layer}.mlp.up_proj.weight": (width, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, width),
    }


def with_gptq(**options: Any) -> Pack:
    def pack(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> tuple[Arrays, np.ndarray] | None:
        return gptq(rng, shape, **options) if "_proj" in name else None

    return pack


def with_awq(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> tuple[Arrays, np.ndarray] | None:
    return awq(rng, shape, 16) if "_proj" in name and "o_proj" not in name else None


def weight(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    import torch

    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 0.1)


def four_bit_numbers(packed: Any, state: Any) -> np.ndarray:
    """The numbers by bitsandbytes' implementation in PyTorch.

    Its CPU kernel (0.50.2) takes the scales of other blocks where a row is no multiple of the block size: the result
    is then far from the weights that were packed. Elsewhere the two are equal, which is asserted.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    values = _get_4bit_code(state.quant_type, packed.device)
    numbers = _dequantize_4bit_compute(
        packed.reshape(-1), scales, values, state.blocksize, tuple(state.shape), torch.float32
    )
    kernel = functional.dequantize_4bit(packed, state)
    assert torch.equal(numbers, kernel) or state.shape[-1] % state.blocksize
    return numbers.numpy()


def with_bitsandbytes(kind: str, *, double: bool = False) -> Pack:
    def pack(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> tuple[Arrays, np.ndarray] | None:
        import torch
        from bitsandbytes import functional

        if "_proj" not in name:
            return None
        if kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight(rng, shape).to(torch.float16))
            pieces = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            return pieces, functional.int8_vectorwise_dequant(codes, scales).numpy()
        full = weight(rng, shape)
        packed, state = functional.quantize_4bit(full, None, None, 64, double, kind)
        numbers = four_bit_numbers(packed, state)
        assert np.abs(numbers - full.numpy()).max() < 0.08
        return {"weight": packed} | {
            f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
        }, numbers

    return pack


def scheme_of(settings: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = settings["config_groups"].values()
    return QuantizationScheme(**group)


def nvfp4_numbers(packed: dict[str, Any], args: Any) -> Any:
    """The numbers in float32; the library's own `decompress` computes them in bfloat16."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, half = packed["weight_packed"].shape
    codes = unpack_fp4_from_uint8(packed["weight_packed"], rows, 2 * half, dtype=torch.float32)
    scale, global_scale = packed["weight_scale"].float(), packed["weight_global_scale"]
    return dequantize(codes, scale, args=args, dtype=torch.float32, global_scale=global_scale)


def with_compressed_tensors(settings: dict[str, Any]) -> Pack:
    def pack(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> tuple[Arrays, np.ndarray] | None:
        import torch
        from compressed_tensors.compressors import BaseCompressor

        if "_proj" not in name or "v_proj" in name:
            return None
        scheme, full = scheme_of(settings), weight(rng, shape)
        args = scheme.weights
        rows, columns = {
            "tensor": (1, 1),
            "channel": (shape[0], 1),
            "group": (shape[0], shape[1] // (args.group_size or 1)),
            "tensor_group": (shape[0], shape[1] // (args.group_size or 1)),
            "block": tuple(-(-n // step) for n, step in zip(shape, args.block_structure or (1, 1), strict=True)),
        }[args.strategy]
        largest = {"int": 2 ** (args.num_bits - 1) - 1, "float": 6.0 if args.num_bits == 4 else 448.0}[args.type]
        scale = torch.from_numpy(rng.uniform(0.2, 0.4, (rows, columns)).astype(np.float32)) / largest
        state = {"weight": full, "weight_scale": scale[0] if args.strategy == "tensor" else scale}
        if not args.symmetric:
            state["weight_zero_point"] = torch.from_numpy(rng.integers(-7, 8, (rows, columns)).astype(np.int8))
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = torch.tensor([2048 * 0.75 / 0.4], dtype=torch.float32)
            state["weight_scale"] = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        compressor = BaseCompressor.get_value_from_registry(settings["format"])
        packed = compressor.compress(dict(state), scheme)
        if args.strategy == "tensor_group":
            numbers = nvfp4_numbers(packed, args)
        else:
            numbers = compressor.decompress(dict(packed), scheme)["weight"]
        assert numbers.dtype == torch.float32
        return packed, numbers.numpy()

    return pack


def with_mlx(bits_of: Callable[[str], tuple[int, int]], dtype: str, plain: tuple[str, ...]) -> Pack:
    def pack(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> tuple[Arrays, np.ndarray] | None:
        import mlx.core as mx

        if name.removesuffix(".weight") in plain:
            return None
        bits, group_size = bits_of(name)
        full = mx.array(rng.standard_normal(shape).astype(np.float32) * 0.1).astype(getattr(mx, dtype))
        words, scales, biases = mx.quantize(full, group_size, bits)
        as_float = [part.astype(mx.float32) for part in (scales, biases)]
        numbers = mx.dequantize(words, *as_float, group_size, bits)
        kept = [np.array(part).astype(getattr(np, dtype)) for part in as_float]
        pieces = {"weight": np.array(words), "scales": kept[0], "biases": kept[1]}
        return pieces, np.array(numbers)

    return pack


def compressed(form: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    """The settings of a compressed-tensors checkpoint in which v_proj stays plain."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head", "re:.*v_proj$"],
    }


def _compressed_cases() -> dict[str, tuple[int, int, dict[str, Any], Pack]]:
    whole, float8 = {"num_bits": 8, "type": "int", "symmetric": True}, {"num_bits": 8, "type": "float"}
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    settings = {
        "ct_int4_group": compressed("pack-quantized", whole | {"num_bits": 4, "strategy": "group", "group_size": 16}),
        "ct_int4_asymmetric": compressed(
            "pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16}
        ),
        "ct_int8_packed": compressed("pack-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
        "ct_int8_channel": compressed("int-quantized", whole | {"strategy": "channel"}, token),
        "ct_int8_group": compressed(
            "int-quantized", whole | {"symmetric": False, "strategy": "group", "group_size": 16}
        ),
        "ct_fp8_tensor": compressed("float-quantized", float8 | {"strategy": "tensor"}),
        "ct_fp8_channel": compressed("float-quantized", float8 | {"strategy": "channel"}),
        "ct_fp8_block": compressed("float-quantized", float8 | {"strategy": "block", "block_structure": [24, 20]}),
        "ct_nvfp4": compressed(
            "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        ),
    }
    return {name: (32, 48, value, with_compressed_tensors(value)) for name, value in settings.items()}


def _cases() -> dict[str, tuple[int, int, dict[str, Any], Pack]]:
    """Hidden size, width, settings and packing of each case."""
    four = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    down = "model.layers.0.mlp.down_proj"
    some = ("model.layers.0.self_attn.v_proj",)
    most = (*some, *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")))
    mixed = {"group_size": 32, "bits": 4, down: {"group_size": 64, "bits": 8}, **dict.fromkeys(some, False)}
    eight = {"group_size": 64, "bits": 8, "mode": "affine", **dict.fromkeys(most, False)}
    return {
        "gptq": (32, 48, four | {"desc_act": False, "sym": True},
                 with_gptq(bits=4, group_size=16, sym=True, shuffled=False, v2=False)),
        "gptq_act_order": (32, 48, four | {"bits": 8, "desc_act": True, "sym": False, "checkpoint_format": "gptq"},
                           with_gptq(bits=8, group_size=16, sym=False, shuffled=True, v2=False)),
        "gptq_v2": (32, 48, four | {"bits": 2, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
                    with_gptq(bits=2, group_size=-1, sym=False, shuffled=False, v2=True)),
        "awq": (32, 48, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
                         "modules_to_not_convert": ["o_proj"]}, with_awq),
        "bnb_nf4": (64, 96, bnb | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
                    with_bitsandbytes("nf4", double=True)),
        "bnb_fp4": (64, 96, bnb | {"bnb_4bit_quant_type": "fp4"}, with_bitsandbytes("fp4")),
        "bnb_int8": (32, 48, {"quant_method": "bitsandbytes", "load_in_8bit": True}, with_bitsandbytes("int8")),
        **_compressed_cases(),
        "mlx_mixed": (64, 128, mixed, with_mlx(lambda name: (8, 64) if down in name else (4, 32), "float16", some)),
        "mlx_float32": (64, 64, eight, with_mlx(lambda name: (8, 64), "float32", most)),
    }  # fmt: skip


def write_case(name: str, hidden: int, width: int, settings: dict[str, Any], pack: Pack) -> None:
    """Writes one folder."""
    import torch
    from safetensors.torch import save_file

    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    config, rng = config_of(hidden, width, settings), np.random.default_rng(7)
    tensors, numbers = {}, {}
    for tensor, shape in shapes_of(config).items():
        found = pack(rng, tensor, (shape[0], shape[1])) if len(shape) == 2 else None
        if found is None:
            tensors[tensor] = torch.from_numpy(rng.standard_normal(shape).astype(np.float16))
            continue
        pieces, numbers[tensor] = found
        prefix = tensor.removesuffix("weight")
        for suffix, piece in pieces.items():
            tensors[prefix + suffix] = torch.from_numpy(piece) if isinstance(piece, np.ndarray) else piece.contiguous()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "numbers.npz", **numbers)


def main(names: list[str]) -> None:
    cases = _cases()
    for name in names or cases:
        write_case(name, *cases[name])
        print(name, sum(file.stat().st_size for file in (GOLDEN / name).iterdir()))


if __name__ == "__main__":
    main(sys.argv[1:])
