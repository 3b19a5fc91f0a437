"""Prints how far logits in float32 are from those of the same model in float64, ours and those of a golden file.

    python -m tests.models.float64_logits qwen3_next

A process of its own, as JAX's 64-bit mode holds for all of it: what the layers do in float32 is done in float64 there.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

SINGLE = jnp.float32


def logits(name: str) -> np.ndarray:
    """Of every token of the golden prompts, [B, T, V], as the model's precision is now."""
    import decodax
    from tests.golden_files import load_golden, logits_of

    lm = decodax.load(load_golden(name).folder, dtype="float32")
    double = jnp.float32 is not SINGLE
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm.params) if double else lm.params
    return logits_of(load_golden(name), lm, params)


def main() -> None:
    from tests.golden_files import load_golden

    jax.config.update("jax_default_matmul_precision", "highest")
    found = {}
    for name in sys.argv[1:]:
        golden, single = load_golden(name), logits(name)
        jax.config.update("jax_enable_x64", True)
        jnp.float32 = jnp.float64
        double = logits(name)
        jax.config.update("jax_enable_x64", False)
        jnp.float32 = SINGLE
        is_prompt = np.arange(single.shape[1])[None, :] < golden.length[:, None]
        errors = (np.abs(given - double)[is_prompt].max() for given in (single, np.asarray(golden.logits, np.float64)))
        found[name] = dict(zip(("ours", "golden"), map(float, errors), strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
