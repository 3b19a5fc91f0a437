"""A draft model with the target's vocabulary, where its own is of another size.

Families of models share a tokenizer and pad their embeddings to different sizes (Qwen2.5: 151,936 entries in the small
models, 152,064 in the large ones), or a small model knows only the first tokens of a larger one. Token ids mean the
same as far as both go, so the draft's logits are cut to the target's vocabulary, or filled up with -inf: what the draft
does not have it never proposes. Verification keeps the target's distribution whatever a draft proposes.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.models.model import Model, Params


@dataclass(frozen=True)
class InTargetVocabulary(Model):
    """The model, but for its `logits`, which have `target_vocab_size` entries, and for tokens that it does not have.

    Those, which the target may write or the prompt may hold, are read as token 0: a draft behind them is a poor one,
    and no less correct.
    """

    target_vocab_size: int = 0

    @property
    def vocab_size(self) -> int:
        return self.target_vocab_size

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return super().embed(params, jnp.where(tokens < self.config.vocab_size, tokens, 0))

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = super().logits(params, hidden)[..., : self.target_vocab_size]
        missing = self.target_vocab_size - logits.shape[-1]
        return jnp.pad(logits, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def in_target_vocabulary(draft: Model, target_vocab_size: int) -> Model:
    """The draft as it is where its vocabulary has the target's size, else fitted to it.

    Both must have the same token behind every id that both have.
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
