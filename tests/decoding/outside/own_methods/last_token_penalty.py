"""A logits processor: lowers the logit of the token just written."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from decodax.core import pytree
from decodax.decoding.logits_processors import LogitsProcessor


@pytree.dataclass
class LastTokenPenalty(LogitsProcessor):
    """logit -> logit - penalty for a row's last token. 0 is off."""

    penalty: Float[Array, " B"]
    help = "Lower the logit of the token just written; 0 is off."
    off = (0,)
    needs_tokens = True

    @classmethod
    def create(cls, option, batch):
        rows = np.broadcast_to(np.asarray(0 if option is None else option, np.float32), batch.batch_size)
        if not np.isfinite(rows).all():
            raise ValueError(f"last_token_penalty must be finite numbers (0: off), got {option}")
        return cls(jnp.asarray(rows)) if rows.any() else None

    def __call__(self, logits, history):
        last = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)
        is_last = (jnp.arange(logits.shape[1])[None, :] == last) & (history.length > 0)[:, None]
        return jnp.where(is_last, logits - self.penalty[:, None], logits)
