"""Every field of a weight format's config is read, or refused by name with what it may be."""

import pytest

from decodax.models.checkpoints.formats.compressed_tensors_config import Scheme
from decodax.models.checkpoints.formats.view import Quantization, quantization_of
from decodax.models.configs.hf_config import read_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MLX = {"group_size": 64, "bits": 4}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def compressed(weights=WEIGHTS, *, group=None, **fields):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights} | (group or {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | fields


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        (GPTQ | {"bits": 3}, "bits must be 2 or 4 or 8 with quant_method gptq, got 3"),
        (GPTQ | {"bits": True}, "bits must be 2 or 4 or 8"),
        (GPTQ | {"group_size": 0}, "group_size must be a whole number from 1 on or -1 with quant_method gptq, got 0"),
        (GPTQ | {"group_size": 2**40}, "group_size must be a whole number"),
        (GPTQ | {"desc_act": 1}, "desc_act must be True or False or None"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2 or None"),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, "dynamic must be null, empty or absent with quant_method gptq"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format must be null, empty or absent"),
        (GPTQ | {"zeros": 1}, r"with quant_method gptq has fields that are not understood: \['zeros'\]"),
        (AWQ | {"bits": 3}, "bits must be 4 with quant_method awq, got 3"),
        (AWQ | {"version": "gemv"}, "version must be gemm or GEMM"),
        (AWQ | {"zero_point": False}, "zero_point must be True"),
        (AWQ | {"group_size": None}, "group_size must be a whole number"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of texts or null"),
        (AWQ | {"outliers": 1}, r"not understood: \['outliers'\]"),
        (BNB | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type must be nf4 or fp4"),
        (BNB | {"load_in_4bit": "yes"}, "load_in_4bit must be True or False"),
        (BNB | {"more": 1}, r"not understood: \['more'\]"),
        (MLX | {"bits": 3}, "bits must be 2 or 4 or 8 with the quantization of MLX"),
        (MLX | {"group_size": 16}, "group_size must be 32 or 64 or 128"),
        (MLX | {"mode": "mxfp4"}, "mode must be affine"),
        (MLX | {"lm_head": {"bits": 6, "group_size": 64}}, "bits must be 2 or 4 or 8"),
        (MLX | {"lm_head": {"bits": 8}}, "group_size must be 32 or 64 or 128"),
        (MLX | {"lm_head": "no"}, r"not understood: \['lm_head'\]"),
        (compressed(format="marlin-24"), "format must be pack-quantized or"),
        (compressed(quantization_status="started"), "quantization_status must be compressed or frozen"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config must be null, empty or absent"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config must be null, empty or of"),
        (compressed(ignore="lm_head"), "ignore must be a list of texts or null"),
        (compressed(config_groups=[]), "config_groups must be an object of groups"),
        (compressed(group={"weights": None}), "must have an object weights in group group_0 of config_groups"),
        (compressed(group={"kind": 1}), r"in group group_0 of config_groups has fields that .* \['kind'\]"),
        (compressed(WEIGHTS | {"num_bits": 6}), "num_bits must be 4 or 8 in group group_0"),
        (compressed(WEIGHTS | {"type": "complex"}), "type must be int or float"),
        (compressed(WEIGHTS | {"strategy": "token"}), "strategy must be tensor or channel or group"),
        (compressed(WEIGHTS | {"strategy": "block"}), "block_structure must be two whole numbers from 1 on"),
        (compressed(WEIGHTS | {"dynamic": True}), "dynamic must be null, empty or absent"),
        (compressed(WEIGHTS | {"actorder": "sideways"}), "actorder must be None or False or weight"),
        (compressed({"num_bits": 8, "type": "float", "symmetric": False}), "symmetric must be true for type float"),
        (compressed({"num_bits": 4, "type": "float"}), "strategy must be tensor_group in group group_0 .* for float"),
        (compressed(WEIGHTS | {"scale": 1}), r"not understood: \['scale'\]"),
        (compressed(ignore=["re:(a+)+$"]), r"has the pattern '\(a\+\)\+\$': at most 200 characters, 4 repetitions"),
        (compressed(ignore=["re:" + "a" * 201]), "at most 200 characters"),
        (compressed(ignore=["re:" + ".*a" * 5]), "4 repetitions, and none of a group"),
        (compressed(ignore=[r"re:(a)\1"]), "and none of a group, are allowed"),
        (compressed(ignore=["re:["]), "is no regular expression"),
        (compressed(ignore=["re:a{99999999999}"]), "is no regular expression"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field, problem):
    name = "quantization" if "quant_method" not in field else "quantization_config"
    with pytest.raises(ValueError, match=problem):
        read_config(LLAMA | {name: field})


@pytest.mark.parametrize("field", [GPTQ, AWQ, BNB, compressed()])
def test_packed_weights_change_no_config(field):
    assert read_config(LLAMA | {"quantization_config": field}) == read_config(LLAMA)


def test_mlx_names_no_method():
    for fields in (
        {"quantization": MLX},
        {"quantization_config": MLX},
        {"quantization": MLX, "quantization_config": MLX},
    ):
        found = quantization_of(fields)
        assert found is not None and found.method == "mlx"
        assert read_config(LLAMA | fields) == read_config(LLAMA)
    with pytest.raises(ValueError, match=r"quantization \(of MLX\) and quantization_config must be equal"):
        quantization_of({"quantization": MLX, "quantization_config": MLX | {"bits": 8}})
    for field in ({"bits": 4}, 4, [MLX], MLX | {"quant_method": "mlx"}):
        with pytest.raises(ValueError, match=r"quantization must be null or absent, or have group_size and bits"):
            quantization_of({"quantization": field})


def test_a_strategy_may_be_implied():
    """As in the library: by group_size alone."""
    implied = {None: Scheme(8, "int", True, "tensor"), -1: Scheme(8, "int", True, "channel")}
    implied[32] = Scheme(8, "int", True, "group", 32)
    for group_size, scheme in implied.items():
        found = quantization_of({"quantization_config": compressed({"group_size": group_size})})
        assert isinstance(found, Quantization) and found.settings.groups == ((("Linear",), scheme),)


def test_targets_of_groups():
    settings = quantization_of({"quantization_config": compressed(ignore=["lm_head", "re:.*gate$"])}).settings
    scheme = Scheme(4, "int", True, "group", 128)
    assert settings.scheme_of("model.layers.0.mlp.up_proj") == scheme
    for plain in ("lm_head", "model.layers.0.mlp.gate", "model.embed_tokens", "x" * 300 + ".gate"):
        assert settings.scheme_of(plain) == (scheme if plain.startswith("x") else None)  # no search in long names
    embeddings = {"quantization_config": compressed(group={"targets": ["Embedding", "re:lm_.*"]})}
    settings = quantization_of(embeddings).settings
    assert settings.scheme_of("model.embed_tokens") == settings.scheme_of("lm_head") == scheme
    assert settings.scheme_of("model.layers.0.mlp.up_proj") is None
