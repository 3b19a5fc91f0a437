"""The checkpoint's own layer for predicting one token further drafts: from what the model made of the last token, and
from the token that it chose then.

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2. `models/next_layer.py` is the layer; it has a cache of its
own, with a row for every token but the last: row i takes the hidden state of token i and the embedding of token i + 1.

A round's forward of the target gives the true hidden states of what it accepted; the layer reads those first, and only
that enters its cache, so a draft begins with a guess from true states alone. Longer drafts (`num_tokens` above 1) ask
the same layer again, with its own output in the place of the hidden state; what it makes of that is staged, and dropped
with the draft. The paper trains one layer per further token and its models have one, whose second guesses were not
trained for.

The first round of a row whose prompt is one token drafts nothing: nothing has been read.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.drafters._contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters._exits import staged_before
from decodax.decoding.drafters._expand import draw_children
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.logits_processors import History
from decodax.decoding.prompt_reading import read_prompt_chunks
from decodax.decoding.sampling import processed_logits
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers import pytree
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.weight import Weight
from decodax.models.model import Model, Params, commit
from decodax.models.next_layer import next_layer


@pytree.dataclass
class Latest:
    """What the layer gave at the last token that each row has committed; kept and committed like a cache."""

    output: Float[Array, "B D"]

    def commit(
        self, rows: Float[Array, "B T D"], count: Int[Array, " B"], path: Int[Array, "B A"] | None = None
    ) -> "Latest":
        """The output at the `count[b]`-th of these tokens; `path` would say which nodes of a tree they are."""
        last = jnp.maximum(count - 1, 0)[:, None]
        last = last if path is None else jnp.take_along_axis(path, last, axis=1)
        new = jnp.take_along_axis(rows, last[:, :, None], axis=1)[:, 0]
        return Latest(jnp.where(count[:, None] > 0, new, self.output))


class _Draft(NamedTuple):
    """A draft under way. output: of the layer at the last node but one, from which the last is guessed.

    history: as if the tokens had been written.
    """

    token: Int[Array, "B C"]
    is_candidate: Bool[Array, "B C"]
    law: Float32[Array, "B C V"] | None
    output: Float[Array, "B D"]
    rows: Any
    history: History


@dataclass(frozen=True)
class NextTokenLayer(Drafter):
    """A chain of `num_tokens`, guessed by the layer behind the last of `model`, the target.

    children: INDEPENDENT, drawn from the layer's law, with the sampling options (in greedy rows the likeliest); or
        CHOSEN, the likeliest always. `draft_params` are the layer's weights (`load_next_layer`).
    Its state is (the layer's cache, its latest output). A row in which the layer gives NaN or infinity is not read on,
    and drafts nothing any more. Each round takes `num_tokens` forwards of the layer, the one that reads included; they
    are not counted as layers of the target.
    """

    model: Model
    num_tokens: int = 1
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "the layer behind the last in the model's own checkpoint, which DeepSeek-V3 has"

    def __post_init__(self) -> None:
        set_chain(self, self.num_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        if model != self.model:
            raise ValueError("the layer drafts for the model whose checkpoint holds it: make the drafter with that")
        wanted = jax.tree.map(_shape, next_layer(model).weights())
        found = jax.tree.map(_shape, draft_params)
        if wanted != found:
            raise ValueError(
                "these are not the weights of a layer behind this model's last: `load_next_layer` reads them from its "
                f"folder; expected {wanted}, got {found}"
            )

    def start(self, params: Params, draft_params: Params, state: DecodeState) -> tuple[Any, Latest]:
        """What the layer makes of the prompts; the target runs over them once more, for their hidden states.

        It has caches of its own while it does, as the target's hold the whole prompts already.
        """

        def run(caches, tokens, position, row_length):
            *before, own, _ = caches
            out = self.model.apply(params, tokens, position, tuple(before), row_length=row_length)
            output, rows = self._read(params, draft_params, state, out.hidden, position, own, row_length)
            return (*out.rows, rows, output), output

        batch, capacity = state.tokens.shape
        dtype = draft_params["join"].dtype
        own = next_layer(self.model).empty_cache(batch, capacity, dtype)
        latest = Latest(jnp.zeros((batch, self.model.config.hidden_size), dtype))
        empty = jax.tree.map(jnp.zeros_like, state.caches)  # caches of any kind begin as zeros
        caches = read_prompt_chunks(run, (*empty, own, latest), state.tokens, state.length, skip=state.failed)
        return caches[-2], caches[-1]

    def propose(self, params: Params, draft_params: Params, state: DecodeState) -> tuple[Proposal, tuple[Any, Latest]]:
        draft = self._guess(params, state, self._begin(state), 0)
        places = jnp.arange(self.num_nodes, dtype=jnp.int32)
        position = state.length[:, None] - 1 + places[None, :]

        def step(node: Int[Array, ""], draft: _Draft) -> _Draft:
            """Row i of the layer for the pending token or a draft token i, which `node` follows; then what follows."""
            embedded = self.model.embed(params, jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1))
            own, slot = jax.lax.dynamic_slice_in_dim(position, node - 1, 1, axis=1), node - 1
            staged, mask = Staged(state.draft[0], draft.rows, position), staged_before(slot, self.num_nodes)
            layer, before = next_layer(self.model), draft.output[:, None]
            output, rows = layer.apply(draft_params, embedded, before, own, staged, mask=mask)
            draft = draft._replace(output=output[:, 0], rows=draft.rows.place(rows, slot[None]))
            return self._guess(params, state, draft, node)

        draft = jax.lax.fori_loop(1, self.num_tokens, step, draft)
        chain, forwards = Tree.chain(self.num_nodes), self.num_tokens
        return fixed_proposal(chain, draft.token, draft.is_candidate, law=draft.law, forwards=forwards), state.draft

    def update(self, params: Params, draft_params: Params, state: DecodeState, outcome: Outcome) -> tuple[Any, Latest]:
        """Reads what the round has added: the true hidden states of the tokens run, each with the token after it."""
        cache, latest = state.draft
        emitted = outcome.num_emitted
        offset = jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        is_new = offset < emitted[:, None]
        position = (state.length - emitted)[:, None] - 1 + offset
        hidden = outcome.forward.hidden
        output, rows = self._read(params, draft_params, state, hidden, position, cache, position + 1)
        # As the count depends on what was run, the cache is written in place (see KVCache.commit).
        is_sound = jnp.all(jnp.isfinite(output) | ~is_new[:, :, None], axis=(1, 2))
        was_read = cache.length == state.length - emitted - 1
        count = jnp.where(is_sound & was_read, emitted, 0)
        cache, latest = commit((cache, latest), (rows, output), count)
        return cache, latest

    def _read(
        self,
        params: Params,
        draft_params: Params,
        state: DecodeState,
        hidden: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: Any,
        row_length: Int[Array, "B #T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's outputs and rows where the target's hidden states and the tokens after them are known."""
        after = jnp.minimum(position + 1, state.tokens.shape[1] - 1)
        embedded = self.model.embed(params, jnp.take_along_axis(state.tokens, after, axis=1))
        normed = self.model.normed(params, hidden)
        return next_layer(self.model).apply(draft_params, embedded, normed, position, cache, row_length=row_length)

    def _begin(self, state: DecodeState) -> _Draft:
        batch, vocab_size = state.tokens.shape[0], self.model.config.vocab_size
        shape, output = (batch, self.num_nodes), state.draft[1].output
        law = None
        if state.sampling.draws and self.children is not Children.CHOSEN:
            law = jnp.zeros((*shape, vocab_size), jnp.float32)
        rows = next_layer(self.model).empty_rows(batch, self.num_nodes, output.dtype)
        token = jnp.zeros(shape, jnp.int32).at[:, 0].set(state.pending())
        return _Draft(token, jnp.zeros(shape, bool), law, output, rows, state.history)

    def _guess(self, params: Params, state: DecodeState, draft: _Draft, node: Int[Array, ""] | int) -> _Draft:
        """The draft with a token after `node`, from the layer's output."""
        logits = self.model.read_out(params, draft.output[:, None])[:, 0]
        logits = processed_logits(state.sampling, logits, draft.history)
        kind = self.children if state.sampling.draws else Children.CHOSEN
        children, possible = draw_children(logits[:, None], kind, 1, state.seed, state.length[:, None] + node)
        token, law = children[:, 0, 0], draft.law
        is_read = (state.draft[0].length == state.length - 1) & (state.length > 1)
        if law is not None:
            law = law.at[:, node].set(jax.nn.log_softmax(logits, axis=1))
        return draft._replace(
            token=draft.token.at[:, node + 1].set(token),
            is_candidate=draft.is_candidate.at[:, node + 1].set(possible[:, 0, 0] & is_read),
            law=law,
            history=draft.history.record(token[:, None], jnp.ones_like(token)),
        )


def _shape(weight: Weight | Array) -> tuple[int, ...]:
    return tuple(weight.shape)
