"""Holds what `decodax.generate` gives: the text and tokens of every row, and counts and times."""

from dataclasses import dataclass

import numpy as np

from decodax.models.layer_kernels import LayerKernel


@dataclass(frozen=True)
class Stats:
    """Counts and times of a generation. Prefill ends before the last prompt token and includes the draft's prefill.

    prefill_forwards: runs of the model before the decode loop.
    target_forwards: runs of the model in the loop.
    prefill_seconds, decode_seconds: without compiling; decode is the loop.
    compile_seconds: compiling, counted apart.
    strategy: its name, or the classes of a drafter and a verifier passed as a `Speculation`.
    num_layers: of the model.
    layer_forwards: runs of single layers of it in the loop, by target or drafter; a layer that one row of a batch
        needs runs for all.
    row_layers: the layers that each row needed, summed over the rows.
    num_cut_tokens: what the loop decoded after a stop string, which is not in the result.
    fallback: why plain decoding replaced the strategy, None where it did not.
    kernels: what ran in the layers, in prefill and in decoding, and why.
    draft_forwards: runs of a drafter's own network in the loop.
    accepted_lengths[n]: how often one forward of the model gave a row n draft tokens and one of its own; where a stop
        token or the row's limit cuts a round short, the last token counts as the model's. So new tokens and those cut
        off are exactly the sum of (n + 1) accepted_lengths[n].
    proposed[d]: how often the target verified a draft token at position d + 1 (those before it were accepted).
    accepted[d]: how often it accepted that token (in a tree: one of them).
    """

    num_prompt_tokens: int
    num_new_tokens: int
    prefill_forwards: int
    target_forwards: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    strategy: str
    num_layers: int
    layer_forwards: int
    row_layers: int
    num_cut_tokens: int = 0
    fallback: str | None = None
    kernels: tuple[LayerKernel, ...] = ()
    draft_forwards: int = 0
    accepted_lengths: tuple[int, ...] = ()
    proposed: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per row and forward of the model; 1 for plain decoding."""
        rounds = sum(self.accepted_lengths)
        return self._num_decoded / rounds if rounds else 1.0

    @property
    def tokens_per_full_forward(self) -> float:
        """Tokens decoded per row and `num_layers` layer runs (the cost of one full forward); 1 for plain decoding."""
        return self._num_decoded * self.num_layers / self.row_layers if self.row_layers else 1.0

    @property
    def _num_decoded(self) -> int:
        return self.num_new_tokens + self.num_cut_tokens

    @property
    def acceptance_per_position(self) -> tuple[float | None, ...]:
        """accepted / proposed for each position of a draft, None where none was ever proposed."""
        counts = zip(self.accepted, self.proposed, strict=True)
        return tuple(accepted / proposed if proposed else None for accepted, proposed in counts)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.num_new_tokens / max(self.decode_seconds, 1e-9)


@dataclass(frozen=True)
class Generation:
    """The generated text, one entry per prompt, or per sample: all of the first prompt, then those of the second.

    tokens: Int32 arrays, new tokens only; a stop token that ended the row is the last one.
    text: text of the tokens without special ones, up to a stop string; None where the model has no tokenizer.
    logprobs: Float32 arrays, the model's own log-probability of each token (before any sampling option).
    finish_reasons: "stop" (stop token or string), "length" (max_new_tokens or the context), or "failed" (the logits
        became NaN or infinite; the tokens before that are kept).
    seeds: of each row; with `seed=[its seed]` a prompt alone draws the same tokens.
    """

    tokens: list[np.ndarray]
    text: list[str] | None
    logprobs: list[np.ndarray]
    finish_reasons: list[str]
    seeds: list[int]
    stats: Stats
