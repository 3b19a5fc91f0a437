"""Runs one decoding scheme for a benchmark: compiles it once, measures its compile time, traces it round by round.

Every scheme has the same signature here, plain decoding included, so that all are prepared, timed and counted alike.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decodax import decoding
from decodax.decoding.drafters import Drafter
from decodax.decoding.early_exit import LayerPolicy
from decodax.decoding.speculative_decoding import ALL_LAYERS
from decodax.decoding.state import DecodeState
from decodax.decoding.verifiers import Verifier
from decodax.models.model import Model, Params

Batch = Sequence[np.ndarray]  # token ids of each row's prompt
TO_THE_END = np.int32(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True, eq=False)
class Scheme:
    """A decoding scheme; plain decoding has neither drafter nor verifier.

    trained: whether `draft_params` are weights that had to be trained.
    layer_policy, params: as in `Speculation`.
    """

    name: str
    drafter: Drafter | None = None
    verifier: Verifier | None = None
    draft_params: Any = None
    trained: bool = False
    layer_policy: LayerPolicy = ALL_LAYERS
    params: Any = None

    @property
    def lossless(self) -> bool:
        """Whether both verifier and layer policy are."""
        return self.verifier is None or (self.verifier.lossless and self.layer_policy.lossless)


class Trace(NamedTuple):
    """One run, round by round.

    new: [b, i] is the i-th new token of a row.
    ends: [r, b] is the number of new tokens of a row after round r, zeros for r = 0.
    layers: [r, b] is the number of the target's layers that the row has asked for by then.
    state: at the end.
    """

    new: Int[np.ndarray, "B A"]
    ends: Int[np.ndarray, "rounds B"]
    layers: Int[np.ndarray, "rounds B"]
    state: DecodeState


class Runner:
    """A scheme compiled for batches whose buffers hold `capacity` tokens, each row getting `num_new` of them.

    `compile_seconds` is the loop's, lowering included, for the first batch given. Nothing ends a row early.
    """

    def __init__(self, model: Model, params: Params, scheme: Scheme, *, capacity: int, num_new: int) -> None:
        self.model, self.scheme = model, scheme
        self.params = params if scheme.params is None else scheme.params
        self.capacity, self.num_new = capacity, num_new
        if scheme.drafter is None or scheme.verifier is None:
            plain = decoding.autoregressive(model)
            self._start = None
            self._loop = lambda params, draft_params, state, limit: plain(params, state, limit)
        else:
            speculative = decoding.speculative(model, scheme.drafter, scheme.verifier, scheme.layer_policy)
            self._start = jax.jit(speculative.start, donate_argnums=2)
            self._loop = lambda params, draft_params, state, limit: speculative(params, draft_params, state, limit)
        self._compiled: Any = None
        self.compile_seconds = float("nan")

    def begin(self, prompts: Batch, temperature: float = 0.0) -> DecodeState:
        """The state after the prefill, of the drafter too; ready for `decode`, which donates it.

        Raises ValueError for a prompt that leaves no room for the new tokens.
        """
        lengths = np.array([len(ids) for ids in prompts], np.int32)
        if lengths.max() + self.num_new > self.capacity:
            raise ValueError(f"prompts must hold at most {self.capacity - self.num_new} tokens, got {lengths.max()}")
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = ids
        sampling = decoding.Sampling.create(len(prompts), self.model.config.vocab_size, temperature=temperature)
        seed = np.arange(len(prompts), dtype=np.uint32)
        # Buffers of one size whatever the prompts, so that one program serves all batches.
        room = self.capacity - lengths
        layer_policy = None if self._start is None else self.scheme.layer_policy
        state = decoding.prefill(
            self.model, self.params, tokens, lengths, room, seed, sampling=sampling, layer_policy=layer_policy
        )
        state = dataclasses.replace(state, limit=jnp.asarray(lengths + self.num_new))
        if self._start is not None:
            state = self._start(self.params, self.scheme.draft_params, state)
        return jax.block_until_ready(state)

    def compile(self, state: DecodeState) -> float:
        """Compiles the loop for states like this one, anew at every call; returns the seconds that it took."""
        # A function of its own, as JAX remembers what it has traced.
        loop = jax.jit(lambda *arguments: self._loop(*arguments), donate_argnums=2)
        start = time.perf_counter()
        self._compiled = loop.lower(self.params, self.scheme.draft_params, state, TO_THE_END).compile()
        self.compile_seconds = time.perf_counter() - start
        return self.compile_seconds

    @property
    def ready(self) -> bool:
        return self._compiled is not None

    def share(self, other: "Runner") -> None:
        """Reuses the program of a runner whose drafter and verifier are equal to this one's."""
        self._start, self._compiled, self.compile_seconds = other._start, other._compiled, other.compile_seconds

    def decode(self, state: DecodeState, max_tokens: int | np.int32 = TO_THE_END) -> DecodeState:
        if self._compiled is None:
            self.compile(state)
        return self._compiled(self.params, self.scheme.draft_params, state, np.int32(max_tokens))

    def seconds(self, state: DecodeState) -> tuple[float, DecodeState]:
        """Time of the loop alone, from the prompts' last tokens to the end."""
        start = time.perf_counter()
        state = jax.block_until_ready(self.decode(state))
        return time.perf_counter() - start, state

    def finish(self, prompts: Batch, temperature: float = 0.0) -> Int[np.ndarray, "B A"]:
        """The new tokens of every row, decoded in one go."""
        state = self.decode(self.begin(prompts, temperature))
        return new_tokens(state, prompts, self.num_new)

    def trace(self, prompts: Batch, temperature: float = 0.0, look: Any = None) -> Trace:
        """Decodes one round at a time, so that it is known which tokens came together.

        look: called with the state before each round.
        """
        state = self.begin(prompts, temperature)
        ends, layers = [np.asarray(state.length)], [np.asarray(state.layer_counts.row)]
        while not bool(jnp.all(state.done)):
            if look is not None:
                look(state)
            state = self.decode(state, 1)
            ends.append(np.asarray(state.length))
            layers.append(np.asarray(state.layer_counts.row))
        return Trace(new_tokens(state, prompts, self.num_new), np.stack(ends) - ends[0], np.stack(layers), state)


def new_tokens(state: DecodeState, prompts: Batch, num_new: int) -> Int[np.ndarray, "B A"]:
    tokens = np.asarray(state.tokens)
    return np.stack([row[len(ids) : len(ids) + num_new] for row, ids in zip(tokens, prompts, strict=True)])


def row_rounds(state: DecodeState) -> int:
    """Forwards of the target per row, summed over rows: what new tokens are divided by."""
    assert state.counts is not None
    return int(np.sum(np.asarray(state.counts.accepted_lengths)))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array | np.ndarray))
