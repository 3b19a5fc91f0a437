"""Makes a draft model for a target: a small Llama that shares its vocabulary, distilled on text, written as a folder.

`decodax train draft` and the script that made the draft of the embedded model call the functions of this file. The
embedding, most of a small model's parameters, starts as the target's own, projected on its first principal directions:
after half a million tokens of distillation the loss was then a third lower than from a random start.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.training.distillation import AcceptanceMeter, Distillation, tokens_per_forward
from decodax.decoding.training.export import write_json, write_model
from decodax.decoding.training.loop import MOVABLE, Task, Trained, train
from decodax.decoding.training.loss_curve import draw_loss
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_windows import TextWindows, cut
from decodax.models.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model, Params

FACTS = "draft.json"
DRAFT_TOKENS = 4  # the draft length for which the expected tokens per target forward are reported
MAX_HELDOUT_WINDOWS = 64


@dataclass(frozen=True)
class DraftShape:
    """The sizes of a draft. Fewer layers draft faster; the embedding is tied to the head."""

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


@dataclass(frozen=True)
class Texts:
    """Token ids to learn from and to be judged on.

    train: documents that every pass reads. heldout: documents never trained on. rotating: documents of which each pass
    reads another `rotating_share`. separator: the ids before every document.
    """

    train: Sequence[np.ndarray]
    heldout: Sequence[np.ndarray]
    rotating: Sequence[np.ndarray] = ()
    rotating_share: float = 0.0
    separator: tuple[int, ...] = ()

    def heldout_windows(self, size: int) -> Int[np.ndarray, "W T_plus_1"]:
        """Windows of held-out text, spread evenly over it where there are more than MAX_HELDOUT_WINDOWS."""
        stream = np.concatenate([np.concatenate([self.separator, ids]) for ids in self.heldout]).astype(np.int32)
        try:
            windows = cut(stream, size)
        except ValueError as error:
            raise ValueError(f"too little text is held out: {error}. Give more text or shorter windows") from error
        count = min(MAX_HELDOUT_WINDOWS, len(windows))
        return windows[np.arange(count) * len(windows) // count]

    def fingerprint(self) -> str:
        """Tells one collection of texts from another."""
        digest = hashlib.sha256(repr((self.rotating_share, self.separator)).encode())
        for documents in (self.train, self.heldout, self.rotating):
            digest.update(len(documents).to_bytes(8, "little"))
            for ids in documents:
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
        return digest.hexdigest()[:16]


def hold_out(documents: Sequence[np.ndarray], share: float, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents to train on, and documents held out: the last `share` of the tokens, documents in random order.

    One document is cut where the share begins.
    """
    order = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    ends = np.cumsum([len(ids) for ids in order])
    border = int(ends[-1] * (1 - share))
    train, heldout = [], []
    for ids, end in zip(order, ends, strict=True):
        inside = max(0, len(ids) - max(0, int(end) - border))
        train += [ids[:inside]] if inside else []
        heldout += [ids[inside:]] if inside < len(ids) else []
    return train, heldout


def initial_params(draft: Model, target: LanguageModel, seed: int) -> Params:
    """Random layers, and an embedding that keeps what of the target's fits into the draft's width."""
    params = draft.init(jax.random.key(seed))
    return params | {"embedding": projected_embedding(target.params["embedding"], draft.config.hidden_size)}


def projected_embedding(embedding: Float[Array, "V D"], width: int) -> Float[Array, "V D_draft"]:
    """The embedding in its first `width` principal directions (zeros beyond what it has), in float32."""
    table = np.asarray(embedding, np.float64)
    values, directions = np.linalg.eigh(table.T @ table)
    kept = directions[:, np.argsort(-values)[:width]]
    projected = table @ kept
    return jnp.asarray(np.pad(projected, ((0, 0), (0, width - projected.shape[1]))), jnp.float32)


@dataclass(frozen=True)
class DraftTraining:
    """One run: the target, the draft's shape, the plan, the texts, and the folder that keeps its checkpoints."""

    target: LanguageModel
    shape: DraftShape
    plan: Plan
    texts: Texts
    run: Path

    def __post_init__(self) -> None:
        context = self.target.config.max_position_embeddings
        if self.plan.window_tokens > context:
            raise ValueError(f"windows hold {self.plan.window_tokens} tokens, the target's context is {context}")

    @property
    def draft(self) -> Model:
        return Model(read_config(self.shape.config(self.target))[1])

    def about(self) -> dict[str, Any]:
        """What a resumed run must agree with, beside the plan."""
        target = hashlib.sha256(np.asarray(self.target.params["embedding"], np.float32).tobytes()).hexdigest()[:16]
        return {"shape": asdict(self.shape), "target": target, "text": self.texts.fingerprint()}

    def train(self, **timing: Any) -> Trained:
        """Trains, or goes on where the run's last checkpoint stands; `timing` are the options of `loop.train`.

        The log's numbers on held-out text are those of windows of `short_tokens` throughout, to be compared.
        """
        draft, plan, texts = self.draft, self.plan, self.texts
        windows = texts.heldout_windows(plan.short_tokens)
        meter = AcceptanceMeter(self.target.model, draft)

        def measure(params: Params) -> dict[str, float]:
            found = meter(self.target.params, params, windows)
            return {"heldout_loss": found.kl, "greedy_acceptance": found.greedy, "sampling_acceptance": found.sampling}

        rows = TextWindows(
            texts.train,
            plan,
            rotating=texts.rotating,
            rotating_share=texts.rotating_share,
            separator=texts.separator,
        )
        task = Task(
            loss=Distillation(self.target.model, draft).loss,
            trained=initial_params(draft, self.target, plan.seed),
            frozen=self.target.params,
            rows=rows.at,
            measure=measure,
            about=self.about(),
        )
        return train(self.run, plan, task, **timing)

    def export(
        self, folder: Path, params: Params, step: int, image: Path, *, dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """Writes the draft's folder and the loss curve, and returns what `draft.json` says.

        The acceptance is that of the rounded weights, on windows as long as the plan's longest.
        """
        rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype).astype(jnp.float32), params)
        windows = self.texts.heldout_windows(self.plan.window_tokens)
        found = AcceptanceMeter(self.target.model, self.draft)(self.target.params, rounded, windows)
        facts = {
            "target_vocab_size": self.target.config.vocab_size,
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "trained_tokens": step * self.plan.tokens_per_step,
            "heldout": asdict(found) | {"rank_acceptance": list(found.rank_acceptance)},
            f"tokens_per_forward_at_{DRAFT_TOKENS}": {
                "greedy": tokens_per_forward(found.greedy, DRAFT_TOKENS),
                "sampling": tokens_per_forward(found.sampling, DRAFT_TOKENS),
            },
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "plan": asdict(self.plan),
            "about": self.about(),
        }
        write_model(folder, self.shape.config(self.target), params, dtype)
        write_json(folder / FACTS, facts)
        shares = {"greedy_acceptance": "same likeliest token", "sampling_acceptance": "1 - total variation"}
        draw_loss(
            self.run / "log.jsonl", image, title="Distilling a draft", unit="KL(target || draft), nats", shares=shares
        )
        return facts

    def refuse_foreign(self, folder: Path) -> None:
        """Raises ValueError when the folder holds something else than this draft, or files of another kind."""
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder for the draft")
        if not any(folder.iterdir()):
            return
        facts: Mapping[str, Any] = {}
        if (folder / FACTS).is_file():
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        own = {name: value for name, value in asdict(self.plan).items() if name not in MOVABLE}
        stored = {name: value for name, value in dict(facts.get("plan", {})).items() if name not in MOVABLE}
        if facts.get("about") != self.about() or stored != own:
            raise ValueError(f"{folder} already holds another model or other files: choose another folder, or empty it")
