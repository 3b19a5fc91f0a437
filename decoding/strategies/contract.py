"""Defines the contract of a named strategy: it builds a drafter and a verifier, with their weights, for a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from decodax.core.arguments import instance, is_hashable, refusal, whole_number
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


@dataclass(frozen=True)
class Strategy:
    """A named decoding strategy; its options are the fields of a frozen dataclass.

    `strategy="medusa:24,epsilon=0.1"` of `generate` is `MedusaTree(24, epsilon=0.1)`, which is as good.

    lossless: with the default options its tokens follow the model's distribution exactly.
    auxiliary_weights: weights beyond the model's own that it needs, None for none.
    """

    lossless: ClassVar[bool] = True
    auxiliary_weights: ClassVar[str | None] = None

    @property
    def measures(self) -> bool:
        """Whether `build` measures times, so that its result depends on the batch."""
        return False

    def build(self, lm: "LanguageModel", draft: Any = None, batch_size: int = 1) -> Speculation | DraftChoice:
        """The strategy for this model; a `DraftChoice` of 0 tokens where plain decoding is faster, with the reason.

        draft: the auxiliary weights, a folder or its content; None for those of the embedded model.
        batch_size: rows that are decoded together, for one that measures.
        Raises ValueError where weights are missing or do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it builds")


@dataclass(frozen=True)
class DraftingStrategy(Strategy):
    """A strategy that drafts tokens.

    draft_tokens: per draft (in a tree: nodes after the root); "auto" to choose the number by times measured on this
        machine, where the strategy can.
    can_measure: whether it can.
    Raises ValueError for a number below 1.
    """

    draft_tokens: int | str | None = 1

    can_measure: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self.draft_tokens
        if (given == "auto" and self.can_measure) or given is type(self).draft_tokens:
            return
        otherwise = ", or 'auto'" if self.can_measure else ""
        object.__setattr__(self, "draft_tokens", whole_number("draft_tokens", given, least=1, otherwise=otherwise))

    @property
    def measures(self) -> bool:
        return self.draft_tokens == "auto"
