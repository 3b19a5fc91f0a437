"""The options of `decodax.generate`, under the names that transformers and vLLM use, checked before anything runs."""

import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from decodax.core.arguments import (
    flag,
    in_order,
    inside,
    is_integer,
    plain,
    refusal,
    strings,
    text,
    token_ids,
    whole_number,
)
from decodax.decoding.logits_processors import METHODS as PROCESSORS
from decodax.decoding.own_processor import own_processors
from decodax.decoding.random import fold_seed
from decodax.decoding.sampling import Sampling

_OBJECTS = ("logits_processors", "strategy", "draft", "on_text")  # which no array stands for
_OF_EVERY_TEMPLATE = ("messages", "tools", "documents", "chat_template", "add_generation_prompt")
_MOST_TOKENS = 2**31 - 1  # more than any context has; positions are int32


@dataclass(frozen=True)
class _Options:
    """The options of `decodax.generate`, whose help lists them, beside those of logits processors.

    Those have the processors' names (`logits_processors.METHODS`). They, and `seed`, take one value, or one per prompt.
    None means that an option is not given, whichever it is.

    Numbers may be Python's, NumPy's or JAX's, and lists also tuples or arrays; kept are Python's. What an option cannot
    take is refused by a ValueError that names it, so no annotation says less than the reader takes.
    """

    n: Any = 1
    max_new_tokens: Any = 128
    stop: Any = ()
    stop_token_ids: Any = None
    seed: Any = 0
    logits_processors: Any = ()
    strategy: Any = None
    draft: Any = None
    draft_tokens: Any = None
    on_text: Any = None
    block_tokens: Any = 16
    batch_size: Any = None
    tools: Any = None
    documents: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _OBJECTS:
                value = (
                    list(value) if isinstance(value, Iterator) else plain(value)
                )  # an iterator ends at its first use
            self._keep(field.name, field.default if value is None else value)
        for name in ("n", "max_new_tokens", "block_tokens"):
            self._keep(name, min(whole_number(name, getattr(self, name), least=1), _MOST_TOKENS))
        if self.batch_size is not None:
            self._keep("batch_size", whole_number("batch_size", self.batch_size, least=1))
        self._keep("stop", strings("stop", self.stop))
        if self.stop_token_ids is not None:
            self._keep("stop_token_ids", tuple(token_ids("stop_token_ids", self.stop_token_ids)))
        self._keep("seed", _read_seed(self.seed))
        self._keep("logits_processors", own_processors(self.logits_processors))
        if self.draft_tokens is not None and not (isinstance(self.draft_tokens, str) and self.draft_tokens == "auto"):
            number = whole_number("draft_tokens", self.draft_tokens, least=1, otherwise=", or 'auto'")
            self._keep("draft_tokens", number)
        if self.on_text is not None and not callable(self.on_text):
            raise refusal("on_text", "a function of a row and a piece of text", self.on_text)
        self._check_chat_options()

    def _check_chat_options(self) -> None:
        if self.chat_template is not None:
            self._keep("chat_template", text("chat_template", self.chat_template))
        self._keep("continue_final_message", flag("continue_final_message", self.continue_final_message))
        given = {} if self.chat_template_kwargs is None else self.chat_template_kwargs
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise refusal("chat_template_kwargs", "a mapping of names to values, or None", given)
        taken = sorted(name for name in given if name in _OF_EVERY_TEMPLATE)
        if taken:
            raise ValueError(f"chat_template_kwargs must not hold {', '.join(taken)}, which every template is given")

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as the dataclass itself does, being frozen

    @classmethod
    def read(cls, options: dict[str, Any]) -> Self:
        """The options by name; raises TypeError, with the nearest known name, for one that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
                raise TypeError(f"generate has no option {name!r}: {hint}")
        return cls(**options)

    @property
    def chat_options(self) -> dict[str, Any]:
        """The options that are given for prompts that are messages, and mean nothing for other prompts."""
        names = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message")
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    def end_tokens(self, of_model: Sequence[int], vocab_size: int) -> tuple[int, ...]:
        """The token ids that end a row: those given, or else the model's; ValueError for one outside the vocabulary."""
        if self.stop_token_ids is None:
            return tuple(of_model)
        return tuple(dict.fromkeys(inside("stop_token_ids", list(self.stop_token_ids), vocab_size)))  # each once

    def seeds(self, num_rows: int) -> np.ndarray:
        """The seeds of `num_rows` prompts, as UInt32[B].

        Raises ValueError when there are neither one nor as many seeds as prompts.
        """
        if not isinstance(self.seed, Sequence):
            return np.asarray([fold_seed(self.seed, row) for row in range(num_rows)], np.uint32)
        if len(self.seed) != num_rows:
            raise ValueError(
                f"seed must be a whole number, or one per prompt ({num_rows}), got {len(self.seed)} numbers"
            )
        seeds = (fold_seed(0, row) if seed is None else seed for row, seed in enumerate(self.seed))
        return np.asarray(list(seeds), np.uint32)

    def sample_seeds(self, num_rows: int) -> np.ndarray:
        """The seeds of all samples of `num_rows` prompts, as UInt32[B n]; the first of each prompt has the prompt's."""
        seeds = self.seeds(num_rows).tolist()
        return np.asarray([fold_seed(seed, 0, sample) for seed in seeds for sample in range(self.n)], np.uint32)

    def sampling(self, num_rows: int, vocab_size: int, end_token_ids: Sequence[int]) -> Sampling:
        """The pipeline that these options ask for; warns where an option shapes a draw that greedy rows never make."""
        options = {name: getattr(self, name) for name in PROCESSORS}
        own = self.logits_processors
        sampling = Sampling.create(num_rows, vocab_size, end_token_ids=end_token_ids, logits_processors=own, **options)
        if not sampling.do_sample:
            given = [name for name, option in options.items() if option is not None]
            idle = [name for name in given if PROCESSORS[name].only_sampling and _is_on(name, options[name])]
            idle += ["n"] * (self.n > 1)
            if idle:
                warnings.warn(
                    f"{', '.join(idle)} changes nothing at temperature 0 (greedy): set temperature above 0 to sample",
                    stacklevel=4,
                )
        return sampling


if TYPE_CHECKING:

    class GenerateOptions(_Options):
        def __init__(self, **options: Any) -> None: ...

else:
    # The options of logits processors are fields, too: one for each processor, None where it is not given.
    GenerateOptions = dataclasses.make_dataclass(
        "GenerateOptions",
        [(name, Any, dataclasses.field(default=None)) for name in PROCESSORS],
        bases=(_Options,),
        frozen=True,
        namespace={"__module__": __name__},
    )
    GenerateOptions.__doc__ = _Options.__doc__


def _is_on(name: str, option: Any) -> bool:
    """Whether a number, or one for each row, is given and is none of those that switch the option off."""
    values, off = in_order(option), (None, *PROCESSORS[name].off)
    return any(value not in off for value in ([option] if values is None else values))


def _read_seed(seed: Any) -> int | list[int | None]:
    """One seed as an int, several as a list, modulo 2**32."""
    seeds = in_order(seed)
    if not all(is_integer(one) or (one is None and seeds is not None) for one in ([seed] if seeds is None else seeds)):
        raise refusal("seed", "a whole number, or one per prompt", seed)
    return int(seed) % 2**32 if seeds is None else [None if one is None else int(one) % 2**32 for one in seeds]
