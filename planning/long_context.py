"""Computes how many rows of what length a plan has memory for, and what switching between long contexts costs.

Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis, arXiv 2405.08944. Everything
follows from the bytes of a cached token: rows at once = (memory - weights) / (bytes per token x tokens), the time of a
prefill, a step's time with all caches, and the time to move a context to the host or back over PCIe. Departs from it:
bytes are those of one chip of the mesh, where few key-value heads are replicated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from decodax.planning.memory import memory_of
from decodax.planning.search import Plan

MOST_ROWS = 2**16  # the most that are tried: the state of very many takes long to describe


@dataclass(frozen=True)
class Room:
    """What fits on a plan's mesh.

    cached_token_bytes: of one more token in every row, on a chip.
    most_rows: of the plan's context, up to about MOST_ROWS.
    most_tokens: in each of the plan's rows, at most the model's context.
    is_whole_context: whether `most_tokens` is the model's context.
    switch_seconds: to move one row's cache to the host's memory, or back.
    """

    cached_token_bytes: float
    most_rows: int
    most_tokens: int
    is_whole_context: bool
    switch_seconds: float

    def session_seconds(self, plan: Plan, turns: int, tokens_per_turn: int) -> float:
        """Seconds of a conversation: one prefill, then `turns` answers, each moving its cache from and to the host."""
        answers = turns * tokens_per_turn * plan.seconds_per_token
        return plan.prompt_seconds + answers + 2 * turns * self.switch_seconds


def room(plan: Plan) -> Room:
    """What fits with the plan's mesh, in multiples of its data axis and of the slots by which a cache grows."""
    step = plan.split.degree("data")
    workload, context = plan.workload, plan.split.config.max_position_embeddings

    def fits(**changed: int) -> bool:
        return memory_of(plan.split, plan.topology, replace(workload, **changed)).free >= 0

    rows = _largest(lambda count: fits(batch=count * step), MOST_ROWS // step) * step
    # The kernels take caches of multiples of 128 slots; a row has at least two tokens.
    slots = _largest(lambda count: fits(context=count * 128), -(-context // 128)) * 128
    tokens = min(max(slots, workload.context), context)
    least = 128 * plan.split.degree("context")
    held = [plan.split.decode_state_bytes(workload.batch, size, workload.cache_dtype) for size in (least, 2 * least)]
    per_token = (held[1] - held[0]) / least
    row_bytes = plan.memory.cache / max(workload.batch // plan.split.num_shards("B", workload.batch), 1)
    return Room(per_token, rows, tokens, tokens == context, row_bytes / plan.topology.chip.host_bandwidth)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to the limit that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
