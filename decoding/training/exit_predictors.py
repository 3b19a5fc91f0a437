"""Trains the exit predictors of SpecEE, which decide after each layer whether a token exits early.

SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850. The exit itself is
`decoding/early_exit/speculative_exit.py`. Model and draft model run windows of text and stay frozen. At some positions
of each window every layer's state goes to its predictor, with the draft's top-k tokens; the label says whether an exit
would be right: the layer's most probable token is the model's, and one of the draft's. Departs from the paper in that
"one of the draft's" belongs to the label (the exit requires it anyway, so a predictor that fires without it only costs
a run of the head), and in that windows of text replace generated answers. Context always runs all layers, as there.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from decodax.decoding.early_exit.speculative_exit import exit_features, exit_score, token_logits
from decodax.decoding.top_tokens import argmax_token, top_k_tokens
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.models.load import LanguageModel, find_folder
from decodax.models.model import Model, Params

THRESHOLDS = (0.5, 0.7, 0.9)
HOT_SHARE = 0.8  # of the exits at threshold 0.5: the hot layers are the fewest with this share
MEASURED_WINDOWS = 4  # per compiled call
DRAFT_FOLDER = "draft"  # inside the output folder: the draft model of the training


@dataclass(frozen=True)
class ExitPredictorShape:
    """The sizes of the exit predictors and of their training.

    hidden_size: width of a predictor's one hidden layer (the paper has 512).
    likely_tokens: I, top-k tokens of the draft.
    positions: of each window, at which to train and to measure: the head runs after every layer there.
    """

    hidden_size: int = 64
    likely_tokens: int = 4
    positions: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Examples(NamedTuple):
    """N positions after each of layers 1 .. L - 1.

    features: the predictor's input.
    is_likely: the layer's most probable token is one of the draft's.
    is_final: it is the model's.
    """

    features: Float32[Array, "L_minus_1 N F"]
    is_likely: Bool[Array, "L_minus_1 N"]
    is_final: Bool[Array, "L_minus_1 N"]

    @property
    def label(self) -> Bool[Array, "L_minus_1 N"]:
        return self.is_likely & self.is_final


def initial_predictors(num_layers: int, shape: ExitPredictorShape, seed: int) -> Params:
    """One predictor after every layer but the last; random first layers, outputs 0 (a chance of one half).

    Raises ValueError for a model of one layer, which has no early exit.
    """
    if num_layers < 2:
        raise ValueError(f"exit predictors need a model of at least 2 layers, got {num_layers}")
    inputs, width, count = 3 * shape.likely_tokens, shape.hidden_size, num_layers - 1
    hidden = jax.random.normal(jax.random.key(seed), (count, inputs, width)) * (2 / inputs) ** 0.5
    return {
        "hidden": hidden,
        "hidden_bias": jnp.zeros((count, width)),
        "out": jnp.zeros((count, width)),
        "out_bias": jnp.zeros(count),
    }


@dataclass(frozen=True)
class ExampleReader:
    """Makes `Examples` of windows of text, with the parameters of both models as {"target": ..., "draft": ...}."""

    target: Model
    draft: Model
    shape: ExitPredictorShape

    def __call__(self, params: Params, tokens: Int[Array, "B T"], key: Array) -> Examples:
        """`shape.positions` positions of each window, drawn with `key`; all windows share the axis N."""
        target, of_target, of_draft = self.target, params["target"], params["draft"]
        batch, size = tokens.shape
        place = places(batch, size, self.shape.positions, key)
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def at_places(states: Array) -> Array:
            return jnp.take_along_axis(states, place[:, :, None], axis=1).reshape(1, place.size, -1)

        drafted = self.draft.logits(of_draft, at_places(self.draft.apply(of_draft, tokens, position).hidden))
        likely = top_k_tokens(drafted[0], self.shape.likely_tokens)[0]
        layers = tuple(range(1, target.config.num_layers + 1))
        captured = target.apply(of_target, tokens, position, capture=layers).captured
        normed = jnp.stack([target.normed(of_target, at_places(captured[layer]))[0] for layer in layers])

        def most_probable(states: Array) -> Array:  # layer by layer: the logits of all would fill the memory
            return argmax_token(target.read_out(of_target, states[None])[0])

        token, early = jax.lax.map(most_probable, normed), normed[:-1]
        logits = token_logits(target, of_target, early, jnp.broadcast_to(likely, (len(early), *likely.shape)))
        probs = jax.nn.softmax(logits, axis=-1)
        previous = jnp.concatenate([jnp.full_like(probs[:1], -1.0), probs[:-1]])
        is_likely = jnp.any(token[:-1, :, None] == likely[None], axis=2)
        return Examples(exit_features(logits, previous)[0], is_likely, token[:-1] == token[-1:])


def places(batch_size: int, num_tokens: int, count: int, key: Array) -> Int[Array, "B P"]:
    """`count` positions of each window (all of a shorter one), one drawn from each of `count` equal pieces."""
    count = min(count, num_tokens)
    border = np.arange(count + 1) * num_tokens // count
    share = jax.random.uniform(key, (batch_size, count))
    width = jnp.asarray(np.diff(border), jnp.float32)[None, :]
    inside = jnp.minimum(jnp.floor(share * width), width - 1).astype(jnp.int32)
    return jnp.asarray(border[:-1], jnp.int32)[None, :] + inside


@dataclass(frozen=True)
class ExitPredictorTraining(AuxiliaryTraining):
    """The training of a model's exit predictors with a given draft model; `shape` is an `ExitPredictorShape`."""

    shape: ExitPredictorShape
    draft: LanguageModel

    kind = "specee"
    curve_title, curve_unit = "Training exit predictors", "binary cross-entropy, nats"
    curve_shares: ClassVar[Mapping[str, str]] = {
        "accuracy": "right about an exit",
        "agreement": "exit token is the model's",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        size, found = self.target.config.vocab_size, self.draft.config.vocab_size
        if size != found:
            raise ValueError(f"a draft must have the model's vocabulary of {size} tokens, got {found}")
        if self.shape.likely_tokens > size:
            raise ValueError(f"likely_tokens must be in 1..{size} (the vocabulary), got {self.shape.likely_tokens}")

    @property
    def read(self) -> ExampleReader:
        return ExampleReader(self.target.model, self.draft.model, self.shape)

    def initial(self) -> Params:
        return initial_predictors(self.target.config.num_layers, self.shape, self.plan.seed)

    def frozen(self) -> Params:
        return {"target": self.target.params, "draft": self.draft.params}

    def loss(self, trained, target_params, rows, step):
        """Mean binary cross-entropy over layers and positions; `target_params` are those of `frozen`."""
        key = jax.random.fold_in(jax.random.key(self.plan.seed), step)
        examples = jax.lax.stop_gradient(self.read(target_params, jnp.asarray(rows)[:, :-1], key))
        score = jax.vmap(exit_score)(trained, examples.features)
        return jnp.mean(_cross_entropy(score, examples.label))

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        """Measures the predictors at positions of held-out windows, each after the text itself.

        accuracy: share of decisions at 0.5 that match the label.
        exit_curve: for each threshold the mean number of layers run, and the share of tokens that are the model's.
        mean_layers, agreement: those at 0.5.
        hot_layers: the fewest layers after which HOT_SHARE of the exits at 0.5 happen; none where nothing exits.
        """
        pieces = []
        for start in range(0, len(windows), MEASURED_WINDOWS):
            piece = np.asarray(windows[start : start + MEASURED_WINDOWS, :-1])
            missing = MEASURED_WINDOWS - len(piece)  # padded, so that one shape is compiled
            filled = np.pad(piece, ((0, missing), (0, 0)))
            found = _judged(self.read, trained, self.frozen(), filled, np.uint32(start))
            pieces.append([np.asarray(leaf)[:, : len(piece)].reshape(len(leaf), -1) for leaf in found])
        score, is_likely, is_final = (np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))
        chance, label = 1 / (1 + np.exp(-score)), is_likely & is_final
        loss = np.mean(np.logaddexp(0, score) - score * label)
        exits = {threshold: _first_exit((chance > threshold) & is_likely) for threshold in THRESHOLDS}
        curve = {
            str(threshold): [float(np.mean(layer)), _agreement(layer, is_final)] for threshold, layer in exits.items()
        }
        mean_layers, agreement = curve[str(THRESHOLDS[0])]
        return {
            "heldout_loss": float(loss),
            "accuracy": float(np.mean((chance > 0.5) == label)),
            "mean_layers": mean_layers,
            "agreement": agreement,
            "exit_curve": curve,
            "hot_layers": _hot_layers(exits[THRESHOLDS[0]], len(score)),
        }

    def about(self) -> dict[str, Any]:
        table = np.asarray(self.draft.model.unstacked(self.draft.params)["embedding"], np.float32)
        return super().about() | {"draft": hashlib.sha256(table.tobytes()).hexdigest()[:16]}

    def write(self, folder: Path, trained: Params, facts: dict[str, Any], dtype: str) -> None:
        """Writes the folder, with the draft model in it unless both models are the embedded ones."""
        super().write(folder, trained, facts, dtype)
        source = self.draft.path
        embedded = find_folder(None)
        if not source.is_dir() or (self.target.path, source) == (embedded, embedded / DRAFT_FOLDER):
            return
        (folder / DRAFT_FOLDER).mkdir(exist_ok=True)
        for file in (*source.glob("*.json"), *source.glob("*.safetensors")):
            shutil.copyfile(file, folder / DRAFT_FOLDER / file.name)


def _scores_of_windows(
    read: ExampleReader, trained: Params, frozen: Params, tokens: Int[Array, "B T"], number: Array
) -> tuple[Array, Array, Array]:
    """The predictors' scores, is_likely and is_final, each [L - 1, B, P]."""
    examples = read(frozen, tokens, jax.random.key(number))
    score = jax.vmap(exit_score)(trained, examples.features)
    by_window = (score.shape[0], tokens.shape[0], -1)
    return score.reshape(by_window), examples.is_likely.reshape(by_window), examples.is_final.reshape(by_window)


_judged = jax.jit(_scores_of_windows, static_argnums=0)


def _cross_entropy(score: Float32[Array, "*N"], label: Bool[Array, "*N"]) -> Float32[Array, "*N"]:
    return jax.nn.softplus(score) - jnp.where(label, score, 0.0)


def _first_exit(exits: Bool[np.ndarray, "L_minus_1 N"]) -> Int[np.ndarray, " N"]:
    """Layers run: the first after which a position exits, or all."""
    return np.where(exits.any(axis=0), exits.argmax(axis=0) + 1, len(exits) + 1)


def _agreement(layers_run: Int[np.ndarray, " N"], is_final: Bool[np.ndarray, "L_minus_1 N"]) -> float:
    """Share of positions whose token after the layers run is the model's."""
    with_last = np.concatenate([is_final, np.ones_like(is_final[:1])])
    return float(np.mean(np.take_along_axis(with_last, layers_run[None] - 1, axis=0)))


def _hot_layers(layers_run: Int[np.ndarray, " N"], num_predictors: int) -> list[int]:
    """The fewest layers after which HOT_SHARE of the exits happen, in order.

    >>> _hot_layers(np.array([3, 3, 3, 2, 1, 5]), 4)  # 5 layers: the last position did not exit
    [2, 3]
    """
    counts = np.bincount(layers_run, minlength=num_predictors + 2)[1 : num_predictors + 1]
    order = np.argsort(-counts, kind="stable")
    enough = np.searchsorted(np.cumsum(counts[order]), HOT_SHARE * counts.sum())
    return sorted(int(layer) + 1 for layer in order[: enough + 1]) if counts.sum() else []
