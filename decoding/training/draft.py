"""Trains a draft model for a target: a small Llama with the same vocabulary, distilled on text, written as a folder.

`decodax train draft` and the script that made the draft of the embedded model call the functions of this file. The
embedding, most of a small model's parameters, starts as the target's own, projected on its first principal directions:
after half a million tokens of distillation the loss was then a third lower than from a random start.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import AcceptanceMeter, Distillation, tokens_per_forward
from decodax.decoding.training.export import write_json, write_model
from decodax.models.configs.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model, Params

FACTS = "draft.json"
DRAFT_TOKENS = 4  # the draft length for which the expected tokens per target forward are reported


@dataclass(frozen=True)
class DraftShape:
    """The sizes of a draft model. Fewer layers draft faster; the embedding is tied to the head."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int

    def config(self, target: LanguageModel) -> dict[str, Any]:
        """The fields of the draft's `config.json`: Llama, with the target's vocabulary, context and end tokens."""
        ends = list(target.end_token_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": target.config.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": target.config.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        }


def initial_params(draft: Model, target: LanguageModel, seed: int) -> Params:
    """Random layers, and the target's embedding, projected to the draft's width."""
    params = draft.init(jax.random.key(seed))
    return params | {
        "embedding": projected_embedding(target.model.unstacked(target.params)["embedding"], draft.config.hidden_size)
    }


def projected_embedding(embedding: Float[Array, "V D"], width: int) -> Float[Array, "V D_draft"]:
    """The embedding in its first `width` principal directions (zeros beyond its own width), in float32."""
    table = np.asarray(embedding, np.float64)
    values, directions = np.linalg.eigh(table.T @ table)
    kept = directions[:, np.argsort(-values)[:width]]
    projected = table @ kept
    return jnp.asarray(np.pad(projected, ((0, 0), (0, width - projected.shape[1]))), jnp.float32)


@dataclass(frozen=True)
class DraftTraining(AuxiliaryTraining):
    """The training of a draft model; `shape` is a `DraftShape`. It writes a Hugging Face folder."""

    shape: DraftShape

    kind = "draft"
    facts_file = FACTS
    curve_title, curve_unit = "Distilling a draft", "KL(target || draft), nats"
    curve_shares: ClassVar[Mapping[str, str]] = {
        "greedy": "same most probable token",
        "sampling": "1 - total variation",
    }

    @property
    def draft(self) -> Model:
        return Model(read_config(self.shape.config(self.target))[1])

    def initial(self) -> Params:
        return initial_params(self.draft, self.target, self.plan.seed)

    def loss(self, trained, target_params, rows, step):
        return Distillation(self.target.model, self.draft).loss(trained, target_params, rows)

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        found = AcceptanceMeter(self.target.model, self.draft)(self.target.params, trained, windows)
        return asdict(found) | {"rank_acceptance": list(found.rank_acceptance), "heldout_loss": found.kl}

    def derived(self, heldout: dict[str, Any]) -> dict[str, Any]:
        expected = {kind: tokens_per_forward(heldout[kind], DRAFT_TOKENS) for kind in ("greedy", "sampling")}
        return {f"tokens_per_forward_at_{DRAFT_TOKENS}": expected}

    def write(self, folder: Path, trained: Params, facts: dict[str, Any], dtype: str) -> None:
        write_model(folder, self.shape.config(self.target), trained, dtype)
        write_json(folder / FACTS, facts)
