"""Defines the contract of a named strategy: it builds a drafter and a verifier, with their weights, for a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from decodax.core.arguments import instance, is_hashable, refusal
from decodax.decoding.draft_length import DraftChoice
from decodax.decoding.drafters import Drafter
from decodax.decoding.early_exit import LayerPolicy
from decodax.decoding.speculative_decoding import ALL_LAYERS
from decodax.decoding.verifiers import Verifier

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True, eq=False)
class Speculation:
    """How tokens are drafted and verified; build one and pass it as `strategy=` to `decodax.generate`.

    drafter, verifier: how tokens are proposed and accepted.
    draft_params: the drafter's weights.
    layer_policy: which of the target's layers run.
    params: the target's weights where the strategy changes or adds some (layer gates, a LoRA adapter); None for the
        model's own.
    """

    drafter: Drafter
    verifier: Verifier
    draft_params: Any = None
    layer_policy: LayerPolicy = ALL_LAYERS
    params: Any = None

    def __post_init__(self) -> None:
        instance("drafter", self.drafter, Drafter, "a drafter (decodax.decoding.drafters)")
        instance("verifier", self.verifier, Verifier, "a verifier (decodax.decoding.verifiers)")
        instance("layer_policy", self.layer_policy, LayerPolicy, "a layer policy (decodax.decoding.early_exit)")
        for name in ("drafter", "verifier", "layer_policy"):
            item = getattr(self, name)
            if not is_hashable(item):
                raise refusal(name, "hashable, as compiled code is kept for it: a frozen dataclass without lists", item)


class Strategy:
    """A named decoding strategy.

    lossless: its tokens follow the model's distribution exactly.
    auxiliary_weights: weights beyond the model's own that it needs, None for none.
    """

    lossless: ClassVar[bool] = True
    auxiliary_weights: ClassVar[str | None] = None

    @staticmethod
    def build(
        lm: "LanguageModel", draft: Any, draft_tokens: int | str | None, batch_size: int = 1
    ) -> Speculation | DraftChoice:
        """The strategy for this model; a `DraftChoice` of 0 tokens where plain decoding is faster, with the reason.

        draft: the auxiliary weights, a folder or its content; None for those of the embedded model.
        draft_tokens: tokens per draft, None for the strategy's default, "auto" to choose them for this machine.
        batch_size: rows that are decoded together, for "auto".
        Raises ValueError where weights are missing or do not fit.
        """
        raise NotImplementedError
