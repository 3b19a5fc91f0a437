"""Drafts from a recorded continuation with errors at chosen positions, to measure the decoding loop itself.

With plain decoding's own output as the recording, wrong at a set rate, the target accepts a known share of the draft
tokens, and drafting is free; the speed-up is then the best that a drafter of that acceptance rate could reach.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decodax.core import pytree
from decodax.decoding.drafters._size import check_chain, set_size
from decodax.decoding.drafters.contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model


@pytree.dataclass
class Recording:
    """The `draft_params` of `Replay`. Another recording of the same shape does not recompile.

    tokens: prompt and output of each row; S need not be the state's, and nothing is drafted after it.
    is_wrong: positions at which to draft a wrong token.
    """

    tokens: Int[Array, "B S"]
    is_wrong: Bool[Array, "B S"]

    @classmethod
    def create(cls, tokens: Int[np.ndarray | Array, "B S"], *, wrong_rate: float, seed: int = 0) -> Self:
        """A recording of which each token is wrong with probability `wrong_rate`, independently.

        Raises ValueError for a rate outside 0..1.
        """
        if not 0 <= wrong_rate <= 1:
            raise ValueError(f"wrong_rate must be in 0..1 (share of tokens), got {wrong_rate}")
        is_wrong = np.random.default_rng(seed).random(tokens.shape) < wrong_rate
        return cls(jnp.asarray(tokens, jnp.int32), jnp.asarray(is_wrong))


@dataclass(frozen=True)
class Replay(Drafter):
    """A chain of the recorded tokens after the row's last; a wrong one is (recorded + 1) mod vocab_size.

    Its state is the recording, so that rows may be repeated.

    num_tokens: of a draft; 0 is allowed here only: with one node the loop does plain decoding, which measures the cost
        of the loop itself.
    vocab_size: the target's.
    Raises ValueError for a negative length, and where the recording is missing, or has other rows or another vocabulary
    than the target.
    """

    num_tokens: int
    vocab_size: int
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens must be 0 or more, got {self.num_tokens}")
        if self.num_tokens:
            check_chain(self.num_tokens)
        set_size(self, self.num_tokens + 1, self.num_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        if not isinstance(draft_params, Recording):
            raise ValueError(f"Replay drafts from a Recording, got {type(draft_params).__name__}: see Recording.create")
        if self.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"vocab_size must be the target's, {model.config.vocab_size} tokens, got {self.vocab_size}"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Any:
        recorded, batch = draft_params.tokens.shape[0], state.tokens.shape[0]
        if recorded != batch:
            raise ValueError(f"the recording must have the batch's {batch} rows, got {recorded}")
        return draft_params

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        position = state.length[:, None] - 1 + jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        recording = state.draft
        last = recording.tokens.shape[1] - 1
        slot = jnp.minimum(position, last)
        recorded = jnp.take_along_axis(recording.tokens, slot, axis=1)
        is_wrong = jnp.take_along_axis(recording.is_wrong, slot, axis=1)
        token = jnp.where(is_wrong, (recorded + 1) % self.vocab_size, recorded).at[:, 0].set(state.last_token())
        return fixed_proposal(Tree.chain(self.num_nodes), token, position <= last), state.draft
