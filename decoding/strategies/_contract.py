"""The contract of a named strategy: from a language model to a drafter, a verifier and what was trained for them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from decodax.arguments import instance, is_hashable, refusal
from decodax.decoding.depth import Depth
from decodax.decoding.draft_length import DraftChoice
from decodax.decoding.drafters import Drafter
from decodax.decoding.speculative import FULL_DEPTH
from decodax.decoding.verifiers import Verifier

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


@dataclass(frozen=True, eq=False)
class Speculation:
    """How tokens are drafted and verified; build one by hand and pass it as `strategy=` to `decodax.generate`.

    depth: which of the target's layers run. params: the target's weights where the strategy changes or adds some (a
    router of layers, a low-rank change); None for the model's own.
    """

    drafter: Drafter
    verifier: Verifier
    draft_params: Any = None
    depth: Depth = FULL_DEPTH
    params: Any = None

    def __post_init__(self) -> None:
        instance("drafter", self.drafter, Drafter, "a drafter (decodax.decoding.drafters)")
        instance("verifier", self.verifier, Verifier, "a verifier (decodax.decoding.verifiers)")
        instance("depth", self.depth, Depth, "a depth (decodax.decoding.depth)")
        for name in ("drafter", "verifier", "depth"):
            part = getattr(self, name)
            if not is_hashable(part):
                raise refusal(name, "hashable, as compiled code is kept for it: a frozen dataclass without lists", part)


class Strategy:
    """A way of decoding that has a name. `lossless`: its tokens follow the model's law exactly.

    trained_part: weights beyond the model's own that it needs, None for none.
    """

    lossless: ClassVar[bool] = True
    trained_part: ClassVar[str | None] = None

    @staticmethod
    def build(lm: "LanguageModel", draft: Any, draft_tokens: int | str | None) -> Speculation | DraftChoice:
        """The strategy for this model; a `DraftChoice` of 0 tokens where plain decoding is faster, with the reason.

        draft: the trained part, a folder or what it holds; None for what comes with the model.
        draft_tokens: tokens per draft, None for the strategy's default, "auto" to choose them for this machine.
        Raises ValueError where a part is missing or does not fit.
        """
        raise NotImplementedError
