"""What one forward costs a chip, part by part: arithmetic, bytes read and written, and collectives.

A forward runs T new tokens in each of B rows behind S cached ones. Products and their bytes come from the weights'
descriptions as the rules split them; attention from its cache. Collectives are those of the compiled programs:

    embedding, attention, feed-forward   one sum over the tensor devices each, [tokens, D]
    experts, few choices                 all tokens everywhere; sums over tensor [choices, D] and expert [tokens, D]
    experts, many                        all-to-all there and back, with room for twice the mean
    context                              a step merges the parts of an attention, [heads, H]; in prompts keys go round
    logits                               maximum, its index, and the sum for a log-probability: latency alone

The busiest device decides: of experts, it is the one with the most chosen ones, if each is as likely as another.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from decodax.layers.execution import Execution
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.moe.experts import choose_way
from decodax.layers.moe.experts.gather_scatter import GatherScatter
from decodax.layers.moe.layer import MoEConfig
from decodax.models.config import BlockConfig
from decodax.sharding.plan.network import Kind
from decodax.sharding.plan.split import Split, named_weights, stored_bytes

Stored = Literal["same", "int8"]
EXPERTS = "feed_forward/experts/"


@dataclass(frozen=True)
class Tokens:
    """B rows, each with T new tokens behind S cached ones. dtype: of weights, caches and what is between layers.

    weights, cache: "int8" stores those of layers' products, or all that is cached, in a byte each; what is computed is
    computed in `dtype`.
    """

    rows: int
    new: int
    cached: int
    dtype: str = "bfloat16"
    weights: Stored = "same"
    cache: Stored = "same"

    @property
    def item_bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def cache_dtype(self) -> str:
        return self.dtype if self.cache == "same" else self.cache


@dataclass(frozen=True)
class Collective:
    """One transfer among the devices along mesh axes; num_bytes as `network.py` counts them."""

    kind: Kind
    axes: tuple[str, ...]
    num_bytes: float


@dataclass(frozen=True)
class Part:
    """What runs one after the other on a chip, `count` times. Bytes are read from or written to its memory.

    fetched_ahead: whether it is known beforehand which weights it reads.
    """

    name: str
    count: int
    flops: float
    weight_bytes: float
    cache_bytes: float
    activation_bytes: float
    collectives: tuple[Collective, ...]
    fetched_ahead: bool = True


def forward_parts(split: Split, tokens: Tokens, *, with_logits: bool) -> list[Part]:
    """All parts of a forward; equal layers are one part with a count. Raises ValueError for what does not divide."""
    parts = [_embedding(split, tokens)]
    for block, count in Counter(split.config.blocks).items():
        parts += block_parts(split, tokens, block, count)
    return [*parts, _head(split, tokens)] if with_logits else parts


def block_parts(split: Split, tokens: Tokens, block: BlockConfig, count: int = 1) -> list[Part]:
    """The parts of one layer, or of `count` equal ones."""
    shape = _Shape(split, tokens)
    return [_mixer(shape, block, count), *_feed_forward(shape, block, count)]


@dataclass(frozen=True)
class _Shape:
    """How a forward's tokens are dealt out."""

    split: Split
    tokens: Tokens

    @cached_property
    def rows(self) -> int:
        return self.tokens.rows // self.split.num_parts("B", self.tokens.rows)

    @cached_property
    def new(self) -> int:
        """New tokens of a row on one device; a decoding step has one, and every device has it."""
        return self.tokens.new // self.split.num_parts("T", self.tokens.new)

    @property
    def num_tokens(self) -> int:
        return self.rows * self.new

    @cached_property
    def hidden_bytes(self) -> float:
        """Of the hidden states of one device's tokens."""
        return self.num_tokens * self.split.config.hidden_size * self.tokens.item_bytes

    def products(self, weights: Any, num_tokens: float) -> tuple[float, float, float]:
        """FLOPs, bytes of weights and bytes of activations of a device's products with `num_tokens` tokens each."""
        flops = weight_bytes = activation_bytes = 0.0
        for name, weight in named_weights(weights):
            part = self.split.part_shape(weight, name)
            weight_bytes += stored_bytes(part, name, weight, self.tokens.dtype, int8=self.tokens.weights == "int8")
            if len(part) == 2:
                flops += 2 * math.prod(part) * num_tokens
                activation_bytes += sum(part) * num_tokens * self.tokens.item_bytes
        return flops, weight_bytes, activation_bytes

    def sums(self, letter: str) -> Iterator[Collective]:
        """The sum behind a product whose inputs are split by this letter."""
        axes = self.split.axes_of(letter)
        if axes:
            yield Collective("all-reduce", axes, self.hidden_bytes)


def _embedding(split: Split, tokens: Tokens) -> Part:
    shape = _Shape(split, tokens)
    return Part("embedding", 1, 0, shape.hidden_bytes, 0, shape.hidden_bytes, tuple(shape.sums("V")))


def _head(split: Split, tokens: Tokens) -> Part:
    """The logits of each row's last token, and greedy choice with its log-probability."""
    config, rows = split.config, _Shape(split, tokens).rows
    flops, weight_bytes, activations = _Shape(split, tokens).products(
        {"head": config.weights()["embedding"], "final_norm": config.final_norm.weights(config.hidden_size)}, rows
    )
    axes = split.axes_of("V")
    few = (4, 4, 8)  # the maximum, its index; the chosen logit beside the sum of exponentials
    collectives = [Collective("all-reduce", axes, size * rows) for size in few if axes]
    by_rows = split.axes_of("B", tokens.rows)
    collectives += [Collective("all-reduce", by_rows, 4)] * (2 if by_rows else 0)  # how far the rows are, and all done
    return Part("logits", 1, flops, weight_bytes, 0, activations, tuple(collectives))


def _mixer(shape: _Shape, block: BlockConfig, count: int) -> Part:
    split, tokens, mixer = shape.split, shape.tokens, block.mixer
    weights = {name: value for name, value in block.weights(split.config.hidden_size).items() if "mixer" in name}
    flops, weight_bytes, activations = shape.products(weights, shape.num_tokens)
    seen = tokens.cached + (tokens.new + 1) / 2  # what a query reads on average
    cached = tokens.cached
    if isinstance(mixer, GQAConfig) and mixer.window is not None:
        seen, cached = min(seen, mixer.window), min(cached, mixer.window)
    context = split.axes_of("S", 0)
    share = 1 / split.degree("context") if context else 1.0
    fixed, per_token = _cache_bytes(shape, block)
    cache_bytes = fixed + per_token * cached * share
    collectives = list(shape.sums("N"))
    if tokens.new > 1:
        flops += _mixing_flops(shape, block, seen) * shape.num_tokens
        if context:  # keys and values of the new tokens go round
            hop = per_token * tokens.new / split.degree("context")
            collectives += [Collective("collective-permute", context, hop)] * (split.degree("context") - 1)
    else:
        flops += _mixing_flops(shape, block, seen) * shape.num_tokens * share
        if context and per_token:
            heads = _num_heads(block) / split.num_parts("N")
            merged = shape.rows * heads * (_value_size(block) + 2) * 4
            collectives.append(Collective("all-reduce", context, merged))
    return Part("attention", count, flops, weight_bytes, cache_bytes, activations, tuple(collectives))


def _cache_bytes(shape: _Shape, block: BlockConfig) -> tuple[float, float]:
    """What one chip reads of a layer's cache: bytes whatever it holds, and bytes for each token that the chip holds."""
    split, least = shape.split, 128 * shape.split.degree("context")

    def held(capacity: int) -> int:
        make = partial(block.mixer.empty_cache, shape.tokens.rows, capacity, jnp.dtype(shape.tokens.cache_dtype))
        return split.state_bytes(jax.eval_shape(make))

    short, long = held(least), held(2 * least)
    per_token = (long - short) / 128
    return 2 * (short - 128 * per_token), per_token  # a state is read and written


def _mixing_flops(shape: _Shape, block: BlockConfig, seen: float) -> float:
    """Of one token's mixing with `seen` tokens, on one device, beyond the products with weights."""
    mixer, parts = block.mixer, shape.split.num_parts("N")
    if isinstance(mixer, GQAConfig):
        return 4 * mixer.num_heads * mixer.head_size * seen / parts
    if isinstance(mixer, MLAConfig):
        if shape.tokens.new <= mixer.most_absorbed_tokens:
            return 2 * mixer.num_heads * (2 * mixer.latent_rank + mixer.rope_size) * seen / parts
        mixing = 2 * mixer.num_heads * (mixer.nope_size + mixer.rope_size + mixer.value_size) * seen
        made = 2 * mixer.latent_rank * mixer.num_heads * (mixer.nope_size + mixer.value_size)
        return (mixing + made * shape.tokens.cached / shape.tokens.new) / parts
    cache = jax.eval_shape(lambda: mixer.empty_cache(1, 1, jnp.float32))
    state = sum(leaf.size for leaf in jax.tree.leaves(cache))
    return 6 * state / parts  # decayed, added to, read


def _num_heads(block: BlockConfig) -> int:
    mixer = block.mixer
    return mixer.num_heads if isinstance(mixer, GQAConfig | MLAConfig) else 1


def _value_size(block: BlockConfig) -> int:
    mixer = block.mixer
    return mixer.head_size if isinstance(mixer, GQAConfig) else mixer.latent_rank if isinstance(mixer, MLAConfig) else 1


def _feed_forward(shape: _Shape, block: BlockConfig, count: int) -> list[Part]:
    weights = {
        name: value for name, value in block.weights(shape.split.config.hidden_size).items() if "mixer" not in name
    }
    layer = block.feed_forward
    if not isinstance(layer, MoEConfig):
        flops, weight_bytes, activations = shape.products(weights, shape.num_tokens)
        return [Part("feed-forward", count, flops, weight_bytes, 0, activations, tuple(shape.sums("F")))]
    return _mixture(shape, layer, weights, count)


def _mixture(shape: _Shape, layer: MoEConfig, weights: dict[str, Any], count: int) -> list[Part]:
    """The router and what all tokens share, and the experts."""
    split, tokens = shape.split, shape.tokens
    experts = weights["feed_forward"]["experts"]
    around = weights | {"feed_forward": {n: w for n, w in weights["feed_forward"].items() if n != "experts"}}
    flops, weight_bytes, activations = shape.products(around, shape.num_tokens)
    shared = Part("shared and router", count, flops, weight_bytes, 0, activations, ())
    per_token, num_experts = layer.router.experts_per_token, layer.router.num_experts
    all_tokens = tokens.rows * tokens.new
    num_devices = split.num_parts("E")
    way = choose_way(Execution("xla", split.mesh, split.rules), all_tokens * per_token)
    gathered = split.axes_of("B", tokens.rows)
    width = split.config.hidden_size * tokens.item_bytes
    tensor, over = split.axes_of("F"), split.axes_of("E")
    collectives: list[Collective] = []
    if isinstance(way, GatherScatter) or not over:
        rows = all_tokens * per_token  # choices of all tokens, those of other devices being zeros
        if gathered:
            collectives.append(Collective("all-gather", gathered, all_tokens * width))
        if tensor:
            with_shared = shape.hidden_bytes if layer.shared is not None else 0
            collectives.append(Collective("all-reduce", tensor, rows * width + with_shared))
        if over:
            collectives.append(Collective("all-reduce", over, all_tokens * width))
    else:
        own = -(-all_tokens // num_devices)
        room = min(own * per_token, max(8, -(-2 * own * per_token // num_devices))) * num_devices
        elsewhere = tuple(axis for axis in gathered if axis not in over)
        if elsewhere:
            collectives.append(Collective("all-gather", elsewhere, own * width))
        collectives += [Collective("all-to-all", over, room * width)] * 2
        if tensor:
            collectives += [Collective("all-reduce", tensor, room * width)]
            collectives += list(shape.sums("F")) if layer.shared is not None else []
    chosen = all_tokens * per_token / num_devices
    held = num_experts // num_devices
    read = busiest_experts(held, num_devices, 1 - (1 - per_token / num_experts) ** all_tokens)
    one_flops = one_bytes = one_activations = 0.0
    for name, weight in named_weights(experts, EXPERTS):
        part = split.part_shape(weight, name)
        bytes_of_all = stored_bytes(part, name, weight, tokens.dtype, int8=tokens.weights == "int8")
        one_bytes += bytes_of_all / part[0]
        if len(part) == 3:
            one_flops += 2 * math.prod(part[1:])
            one_activations += sum(part[1:]) * tokens.item_bytes
    busiest = max(chosen, read) if all_tokens * per_token < num_experts else chosen
    work = (one_flops * busiest, one_bytes * read, 0, one_activations * busiest)
    return [shared, Part("experts", count, *work, tuple(collectives), fetched_ahead=False)]


def busiest_experts(held: int, num_devices: int, chance: float) -> float:
    """How many of its `held` experts the device with the most work runs, each with this `chance`: the mean maximum.

    >>> round(busiest_experts(4, 64, 1 - (1 - 8 / 256) ** 1), 2)  # one token of DeepSeek-V3 over 64 devices
    1.46
    """
    mean, below = 0.0, 0.0
    for few in range(held):
        below += math.comb(held, few) * chance**few * (1 - chance) ** (held - few)
        mean += 1 - min(below, 1.0) ** num_devices
    return mean
