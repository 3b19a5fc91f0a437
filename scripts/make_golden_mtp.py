"""Writes tests/golden/deepseek_v3_mtp: a tiny DeepSeek-V3 with its MTP head, and the outputs of transformers.

    python -m decodax.scripts.make_golden_mtp

The folder holds a model folder as published ones are (the MTP head's tensors are beside the model's, with copies of
embedding and head), and mtp_head.npz:

    tokens[B, T], length[B]    texts of different length, padded with 0
    logits[B, T, V]            of the MTP head at position i, which takes hidden state i of the model and token i + 1;
                               each text run alone, 0 where there is no such position
    drafted[B, 3]              the most probable token after the text's last position, and after it those that follow
                               when the MTP head reads its own output and its own token
    chained[B, 3, V]           the logits of these
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from decodax.scripts._golden_cases import DEEPSEEK_V3, DEEPSEEK_YARN
from decodax.scripts.make_golden import (
    GOLDEN,
    MAX_ROUNDING,
    MIN_GAP,
    PROMPT_LENGTHS,
    load_alone,
    random_tensors,
    write_model,
)

FOLDER = GOLDEN / "deepseek_v3_mtp"
CASE = {
    **DEEPSEEK_V3,
    "num_hidden_layers": 2,
    "rope_scaling": DEEPSEEK_YARN,
    "num_nextn_predict_layers": 1,
}
CHAIN = 3


def with_mtp_head(tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    """The tensors of a model of one layer more, of which the last becomes the MTP head."""
    import torch

    size, generator = CASE["hidden_size"], torch.Generator().manual_seed(seed)
    prefix = f"model.layers.{CASE['num_hidden_layers']}."
    norms = {name: 1 + 0.3 * torch.randn(size, generator=generator) for name in ("enorm", "hnorm", "shared_head.norm")}
    return {
        **tensors,
        **{f"{prefix}{name}.weight": norm for name, norm in norms.items()},
        f"{prefix}eh_proj.weight": torch.randn(size, 2 * size, generator=generator) / math.sqrt(2 * size),
        f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{prefix}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


def run_alone(model: Any, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [T - 1, V] of one text's positions, the draft tokens [3] after it, and their logits [3, V]."""
    import torch
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    # The class names the layer by its index in the published model, by which the loader finds it.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{CASE['num_hidden_layers']}.*"]
    head = MtpModel.from_pretrained(model).eval()
    cache = MtpCache(config=model.config.get_mtp_config())
    tokens, length = torch.tensor(text)[None], len(text)
    with torch.no_grad():
        hidden = model(tokens, use_cache=False, output_hidden_states=True).hidden_states[-1][:, :-1]
        out = head.forward_layer(0, hidden, torch.arange(1, length)[None], cache, input_ids=tokens[:, 1:])
        logits = head.shared_head(out)[0]
        chained = [logits[-1]]
        for position in range(length, length + CHAIN - 1):
            token, place = chained[-1].argmax()[None, None], torch.tensor([[position]])
            out = head.forward_layer(0, out[:, -1:], place, cache, input_ids=token)
            chained.append(head.shared_head(out)[0, 0])
    chain = torch.stack(chained)
    return logits.numpy(), chain.argmax(dim=-1).numpy(), chain.numpy()


def main() -> None:
    """Takes the first seed whose draft tokens are clear and whose logits hardly depend on rounding."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(100):
        one_more = {**CASE, "num_hidden_layers": CASE["num_hidden_layers"] + 1}
        tensors = with_mtp_head(random_tensors(one_more, seed, stacked=False), seed)
        generator = np.random.default_rng(seed)
        rows = [generator.integers(0, CASE["vocab_size"], length) for length in PROMPT_LENGTHS]
        with tempfile.TemporaryDirectory() as temporary:
            write_model(Path(temporary), CASE, tensors)
            results, precise = (
                [run_alone(load_alone(Path(temporary), precision), row) for row in rows]
                for precision in ("float32", "float64")
            )
        top = np.sort([result[2] for result in results], axis=2)
        gap = (top[:, :, -1] - top[:, :, -2]).min()
        rounding = max(np.abs(a[0] - b[0]).max() for a, b in zip(results, precise, strict=True))
        if gap > MIN_GAP and rounding < MAX_ROUNDING:
            break
    else:
        raise RuntimeError("no seed gives clear and well-conditioned results")
    write_model(FOLDER, CASE, tensors)
    tokens = np.zeros((len(rows), max(PROMPT_LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, CASE["vocab_size"]), np.float32)
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        tokens[index, : len(row)] = row
        logits[index, : len(row) - 1] = result[0]
    drafted, chained = (np.stack([result[index] for result in results]) for index in (1, 2))
    file = FOLDER / "mtp_head.npz"
    lengths = np.int32(PROMPT_LENGTHS)
    np.savez(file, tokens=tokens, length=lengths, logits=logits, drafted=drafted.astype(np.int32), chained=chained)
    print(f"{FOLDER.name} seed {seed} gap {gap:.4f} rounding {rounding:.1e} drafted {drafted.tolist()}")


if __name__ == "__main__":
    main()
