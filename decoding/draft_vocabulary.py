"""Fits a draft model's logits to the target's vocabulary size, where its own differs.

Models of a family share a tokenizer and pad their embeddings to different sizes (Qwen2.5: 151,936 entries in the small
models, 152,064 in the large ones), or a small model has only the first tokens of a larger one. Ids that both have are
the same tokens, so the draft's logits are truncated to the target's vocabulary, or padded with -inf: a draft never
proposes a token that it does not have. Verification keeps the target's distribution whatever a draft proposes.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.models.model import Model, Params


@dataclass(frozen=True)
class InTargetVocabulary(Model):
    """The model with `logits` of `target_vocab_size` entries, and with token 0 for tokens that it does not have.

    The target may emit such tokens, and the prompt may hold them: a draft after them is poor, but no less correct.
    """

    target_vocab_size: int = 0

    @property
    def vocab_size(self) -> int:
        return self.target_vocab_size

    def embed(self, params: Params, tokens: Int[Array, "B T"], position: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return super().embed(params, jnp.where(tokens < self.config.vocab_size, tokens, 0), position)

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = super().logits(params, hidden)[..., : self.target_vocab_size]
        missing = self.target_vocab_size - logits.shape[-1]
        return jnp.pad(logits, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def in_target_vocabulary(draft: Model, target_vocab_size: int) -> Model:
    """The draft unchanged where its vocabulary has the target's size, else fitted to it.

    Every id that both have must be the same token in both.
    """
    if draft.vocab_size == target_vocab_size:
        return draft
    return InTargetVocabulary(draft.config, draft.invariant, draft.execution, target_vocab_size)


def check_vocabulary(draft: Model, target: Model) -> None:
    """Raises ValueError where the draft's logits are not over the target's vocabulary."""
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"a draft must have the target's vocabulary of {target.vocab_size} tokens, got {draft.vocab_size}: fit its "
            "model to it with decodax.decoding.draft_vocabulary.in_target_vocabulary if both have one tokenizer, "
            "or train one with `decodax train draft`"
        )
