"""Lists the cost items of a forward on a chip: arithmetic, bytes read and written, and collectives.

A forward runs T new tokens in each of B rows after S cached ones. Products and their bytes come from the weight
descriptions as the rules split them; attention from its cache. Collectives are those of the compiled programs:

    embedding, attention, feed-forward   one all-reduce over the tensor axis each, [tokens, D]
    experts, few choices                 all-gather of tokens; all-reduce over tensor [choices, D], expert [tokens, D]
    experts, many                        two all-to-alls, with capacity for twice the mean
    pipeline                             permute of hidden states to the next stage, and from the last to the first
    context                              a step merges partial softmaxes, [heads, H]; a prefill permutes keys and values
    logits                               maximum, its index, and the sum for a log-probability: latency alone

`mixture.py` has the experts.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from decodax.layers.mixers.contract import Mixer
from decodax.layers.moe.layer import MoEConfig
from decodax.models.config import BlockConfig
from decodax.planning.mixture import mixture
from decodax.planning.split import Split
from decodax.planning.work import Collective, CostItem, Shape, Tokens


def forward_parts(split: Split, tokens: Tokens, *, with_logits: bool) -> list[CostItem]:
    """All cost items of a forward; equal layers are one item with a count. Raises ValueError if sizes do not divide."""
    items = [_embedding(split, tokens)]
    for block, count in split.layers.items():
        items += block_parts(split, tokens, block, count)
    if (stages := split.degree("pipeline")) > 1:
        permute = Collective("collective-permute", ("pipeline",), Shape(split, tokens).hidden_bytes)
        items.append(CostItem("between stages", stages, 0, 0, 0, 0, (permute,)))
    return [*items, _head(split, tokens)] if with_logits else items


def block_parts(split: Split, tokens: Tokens, block: BlockConfig, count: int = 1) -> list[CostItem]:
    """The cost items of `count` equal layers.

    split: of the model.
    tokens: of the forward.
    block: the layer.
    count: how many.
    """
    shape = Shape(split, tokens)
    return [_mixer(shape, block, count), *_feed_forward(shape, block, count)]


def _embedding(split: Split, tokens: Tokens) -> CostItem:
    shape = Shape(split, tokens)
    return CostItem("embedding", 1, 0, shape.hidden_bytes, 0, shape.hidden_bytes, tuple(shape.all_reduces("V")))


def _head(split: Split, tokens: Tokens) -> CostItem:
    """The logits of each row's last token, and the argmax with its log-probability."""
    rows = Shape(split, tokens).rows
    flops, weight_bytes, activations = Shape(split, tokens).products(
        {"head": split.around_layers["embedding"], "final_norm": split.around_layers["final_norm"]}, rows
    )
    axes = split.axes_of("V")
    few = (4, 4, 8)  # the maximum, its index; the chosen logit beside the sum of exponentials
    collectives = [Collective("all-reduce", axes, size * rows) for size in few if axes]
    by_rows = split.axes_of("B", tokens.rows)
    collectives += [Collective("all-reduce", by_rows, 4)] * (2 if by_rows else 0)  # lengths, and whether all are done
    return CostItem("logits", 1, flops, weight_bytes, 0, activations, tuple(collectives))


def _mixer(shape: Shape, block: BlockConfig, count: int) -> CostItem:
    split, tokens, mixer = shape.split, shape.tokens, block.mixer.layer
    weights = {name: value for name, value in block.weights(split.config.hidden_size).items() if "mixer" in name}
    flops, weight_bytes, activations = shape.products(weights, shape.num_tokens)
    cost, num_shards = mixer.mixing_cost(tokens.new, tokens.cached), split.num_shards("N")
    context = split.axes_of("S", 0)
    share = 1 / split.degree("context") if context else 1.0
    fixed, per_token = _cache_bytes(shape, block)
    cache_bytes = fixed + per_token * cost.num_read * share
    collectives = list(shape.all_reduces("N"))
    mixing_flops = cost.flops * shape.num_tokens / num_shards
    if tokens.new > 1:
        flops += mixing_flops
        if context:  # a ring permutes keys and values of the new tokens
            hop = per_token * tokens.new / split.degree("context")
            collectives += [Collective("collective-permute", context, hop)] * (split.degree("context") - 1)
    else:
        flops += mixing_flops * (share if cost.num_heads else 1.0)
        if context and cost.num_heads:
            merged = shape.rows * cost.num_heads / num_shards * (cost.value_size + 2) * 4
            collectives.append(Collective("all-reduce", context, merged))
    return CostItem("attention", count, flops, weight_bytes, cache_bytes, activations, tuple(collectives))


def _cache_bytes(shape: Shape, block: BlockConfig) -> tuple[float, float]:
    """The bytes that one chip reads of a layer's cache: a fixed number, and a number per token that the chip holds."""
    split, least = shape.split, 128 * shape.split.degree("context")

    short, long = (
        split.state_bytes(_empty_cache(block.mixer.layer, shape.tokens.rows, capacity, shape.tokens.cache_dtype))
        for capacity in (least, 2 * least)
    )
    per_token = (long - short) / 128
    return 2 * (short - 128 * per_token), per_token  # a state is read and written


@lru_cache(maxsize=256)
def _empty_cache(mixer: Mixer, rows: int, capacity: int, dtype: str) -> Any:
    return jax.eval_shape(lambda: mixer.empty_cache(rows, capacity, jnp.dtype(dtype)))


def _feed_forward(shape: Shape, block: BlockConfig, count: int) -> list[CostItem]:
    weights = {
        name: value for name, value in block.weights(shape.split.config.hidden_size).items() if "mixer" not in name
    }
    layer = block.feed_forward_layer
    if not isinstance(layer, MoEConfig):
        flops, weight_bytes, activations = shape.products(weights, shape.num_tokens)
        return [CostItem("feed-forward", count, flops, weight_bytes, 0, activations, tuple(shape.all_reduces("F")))]
    return mixture(shape, layer, weights, count)
