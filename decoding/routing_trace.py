"""Records which experts each token of some texts chooses in each layer; saves, loads and plots the traces.

Such traces decide the placement of experts on devices (ExFlow, arXiv 2401.08383; EPLB in DeepSeek-V3, arXiv
2412.19437). The texts are run once more from the start, so that a trace does not depend on how they were decoded, and
costs decoding nothing.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int

from decodax.decoding.sizes import bucket, cache_capacity
from decodax.layers.moe.layer import MoEConfig
from decodax.models.load import LanguageModel
from decodax.models.model import Model, commit

CHUNK_TOKENS = 512
FORMAT = 1  # of the file


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts of M tokens, of all texts one after the other, in I layers with experts.

    token: the id.
    position: in its text.
    row: the text's number.
    is_output: not of the prompt.
    expert, gate: the experts and their weights for each token in each layer, -1 (and 0) where there are fewer than X.
    layer: each such layer's number in the model.
    num_experts: how many experts it has.
    """

    token: Int[np.ndarray, " M"]
    position: Int[np.ndarray, " M"]
    row: Int[np.ndarray, " M"]
    is_output: Bool[np.ndarray, " M"]
    expert: Int[np.ndarray, "I M X"]
    gate: Float32[np.ndarray, "I M X"]
    layer: Int[np.ndarray, " I"]
    num_experts: Int[np.ndarray, " I"]

    def counts(self) -> Int[np.ndarray, "I E"]:
        """Tokens routed to each expert of each layer; zeros where a layer has fewer experts than another."""
        table = np.zeros((len(self.layer), int(self.num_experts.max(initial=0))), np.int64)
        for line, chosen in zip(table, self.expert, strict=True):
            line += np.bincount(chosen[chosen >= 0], minlength=len(line))
        return table

    def imbalance(self) -> Float32[np.ndarray, " I"]:
        """In each layer, the load of the busiest expert over the mean load; 1 is perfect balance."""
        counts = self.counts()
        return (counts.max(axis=1) * self.num_experts / np.maximum(counts.sum(axis=1), 1)).astype(np.float32)

    def save(self, file: Path) -> None:
        """Writes an .npz with an array per field, atomically."""
        temporary = file.with_name(f".{file.name}.tmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
            np.savez_compressed(stream, format=np.int64(FORMAT), **arrays)
        os.replace(temporary, file)

    @classmethod
    def load(cls, file: Path) -> "RoutingTrace":
        """Reads what `save` wrote. Raises ValueError for another file."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is no routing trace, but something that cannot be read: {error}") from error
        names = {field.name for field in fields(cls)}
        if missing := sorted({*names, "format"} - arrays.keys()):
            raise ValueError(f"{file} is no routing trace: it lacks {', '.join(missing)}")
        if int(arrays["format"]) != FORMAT:
            raise ValueError(f"{file} has format {int(arrays['format'])}, this version reads {FORMAT}")
        return cls(**{name: arrays[name] for name in names})


def record_routes(
    lm: LanguageModel,
    texts: Sequence[np.ndarray],
    prompt_tokens: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoutingTrace:
    """The experts that each token of `texts` chooses, given the tokens before it.

    texts: token ids, Int[T] each.
    prompt_tokens: of each text, the number of tokens that are its prompt.
    progress: called with (tokens done, tokens in all).
    Raises ValueError for a model without experts, NotImplementedError for one in pipeline stages.
    """
    layers = [(index, block.feed_forward_layer) for index, block in enumerate(lm.config.blocks)]
    mixtures = [(index, config) for index, config in layers if isinstance(config, MoEConfig)]
    if not mixtures:
        raise ValueError(f"{lm.path.name} has no layers with experts: there is nothing to record")
    if lm.model.stages is not None:
        raise NotImplementedError("pipeline stages do not hand out routes: record them on a mesh without pipeline")
    experts, gates, done, total = [], [], 0, sum(map(len, texts))
    for text in texts:
        caches = lm.model.empty_cache(1, cache_capacity(len(text), lm.model.execution), lm.dtype)
        for start in range(0, len(text), CHUNK_TOKENS):
            piece = text[start : start + CHUNK_TOKENS]
            padded = np.zeros((1, bucket(len(piece))), np.int32)
            padded[0, : len(piece)] = piece
            counts = np.array([start, len(piece), len(text)], np.int32)
            routes, caches = _step(lm.model, lm.params, caches, padded, counts)
            experts.append(_stacked([np.asarray(r.expert)[0, : len(piece)] for r in routes], -1))
            gates.append(_stacked([np.asarray(r.gate)[0, : len(piece)] for r in routes], 0.0))
            progress(done := done + len(piece), total)
    position = np.concatenate([np.arange(len(text), dtype=np.int32) for text in texts])
    row = np.repeat(np.arange(len(texts), dtype=np.int32), [len(text) for text in texts])
    return RoutingTrace(
        token=np.concatenate(texts).astype(np.int32),
        position=position,
        row=row,
        is_output=position >= np.asarray(prompt_tokens, np.int32)[row],
        expert=np.concatenate(experts, axis=1).astype(np.int16),
        gate=np.concatenate(gates, axis=1).astype(np.float32),
        layer=np.array([index for index, _ in mixtures], np.int32),
        num_experts=np.array([config.router.num_experts for _, config in mixtures], np.int32),
    )


def _stacked(choices: list[np.ndarray], fill: float) -> np.ndarray:
    """[layers, tokens, X]; layers with fewer choices than others are padded with `fill`."""
    most = max(layer.shape[1] for layer in choices)
    return np.stack([np.pad(p, ((0, 0), (0, most - p.shape[1])), constant_values=fill) for p in choices])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(model: Model, params: Any, caches: Any, tokens: Any, counts: Any) -> tuple[Any, Any]:
    """The routes of the layers with experts, and the caches with the chunk's tokens committed."""
    start, count, length = counts
    position = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    forward = model.apply(params, tokens, position, caches, row_length=length[None, None])
    return [routes for routes in forward.routes if routes is not None], commit(
        caches, forward.cache_updates, count[None]
    )


def draw_routes(trace: RoutingTrace, image: Path, *, title: str) -> None:
    """Writes a heat map (PNG): for each layer, the load of its experts over the mean load.

    Raises ImportError without matplotlib.
    """
    from decodax.decoding.training.extra import need

    need("matplotlib").use("agg")
    pyplot = need("matplotlib.pyplot")
    counts = trace.counts()
    even = counts.sum(axis=1, keepdims=True) / trace.num_experts[:, None]
    share = np.where(np.arange(counts.shape[1]) < trace.num_experts[:, None], counts / np.maximum(even, 1), np.nan)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.22 * max(len(share), 4)), layout="constrained")
    limit = max(2.0, float(np.nanmax(share)))
    norm = need("matplotlib.colors").TwoSlopeNorm(1.0, 0.0, limit)
    shown = axes.imshow(share, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer", title=title)
    step = max(1, len(share) // 16)
    axes.set_yticks(range(0, len(share), step), [str(layer) for layer in trace.layer[::step]])
    figure.colorbar(shown, label="choices, over an even share")
    image.parent.mkdir(parents=True, exist_ok=True)
    temporary = image.with_name(f".{image.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    temporary.replace(image)
