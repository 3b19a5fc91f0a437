"""Prepares a decoding strategy for one model: compiled functions of a state, and its name in the statistics."""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from decodax.core.arguments import is_hashable, refusal, shown
from decodax.core.method_text import method_from_text
from decodax.decoding.autoregressive import autoregressive
from decodax.decoding.built_strategies import build_once, on_devices_of
from decodax.decoding.draft_length import DraftChoice
from decodax.decoding.drafters import Children
from decodax.decoding.options import GenerateOptions
from decodax.decoding.programs import MAX_PROGRAMS, bounded_jit
from decodax.decoding.sampling import Sampling
from decodax.decoding.speculative_decoding import Speculative, speculative
from decodax.decoding.state import DecodeState
from decodax.decoding.strategies import METHODS as STRATEGIES
from decodax.decoding.strategies import Speculation, Strategy
from decodax.decoding.tree import check_draft_tokens
from decodax.models.model import Model

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel


_ahead: OrderedDict[Hashable, None] = OrderedDict()  # loops that were compiled ahead, latest last


class ReadyStrategy:
    """A strategy prepared for one model: jitted functions, their parameters, and its name in the statistics."""

    def __init__(self, lm: "LanguageModel", options: GenerateOptions, batch_size: int) -> None:
        chosen, self.fallback = _find_strategy(options), None
        self.name = getattr(chosen, "__name__", type(chosen).__name__)
        if isinstance(options.strategy, str):
            self.name = options.strategy
        if options.draft_tokens is not None and not isinstance(options.strategy, str):
            raise ValueError(
                "draft_tokens needs the name of a strategy that drafts, as in strategy='draft_model' (`decodax "
                f"methods` lists them), got {self.name!r}"
            )
        if isinstance(chosen, Strategy):
            number = getattr(chosen, "draft_tokens", None)
            if isinstance(number, int):
                check_draft_tokens(number, lm.config.max_position_embeddings)
            chosen = build_once(chosen, lm, options.draft, batch_size)
        elif options.draft is not None:
            raise ValueError(
                f"draft needs a strategy with auxiliary weights or a draft model (`decodax methods` lists them), got "
                f"{self.name!r}"
            )
        elif isinstance(chosen, Speculation):
            chosen = on_devices_of(lm, chosen)
        if isinstance(chosen, DraftChoice):
            self.fallback, chosen = chosen.reason, autoregressive
            warnings.warn(f"{self.name} falls back to plain decoding: {self.fallback}", stacklevel=4)
        self.params, self.draft_params, self.layer_policy = lm.params, None, None
        if isinstance(chosen, Speculation):
            self.draft_params = chosen.draft_params
            self.layer_policy = chosen.layer_policy
            self.params = lm.params if chosen.params is None else _checked_params(lm.params, chosen.params)
            if not isinstance(options.strategy, str):
                self.name = f"{type(chosen.drafter).__name__} + {type(chosen.verifier).__name__}"
            self._speculative = speculative(lm.model, chosen.drafter, chosen.verifier, chosen.layer_policy)
        else:
            self._speculative, self._make, self._model = None, chosen, lm.model

    @property
    def step_tokens(self) -> int:
        """Tokens of one forward of the model in the loop: those of a draft, and the last one."""
        return 1 if self._speculative is None else self._speculative.drafter.num_nodes

    def num_logits_arrays(self, sampling: Sampling) -> int:
        """Arrays [B, C, V] that a step makes: logits, those after processors, the draft's distributions, random bits.

        A product with few rows on CPU makes the logits in another layout first.
        """
        if self._speculative is None:
            return 1 + bool(sampling.processors) + sampling.do_sample
        draws = sampling.do_sample and self._speculative.drafter.children is not Children.CHOSEN
        return 2 + bool(sampling.processors) + draws

    def compile_ahead(self, sizes: Hashable, make_state: Callable[[], DecodeState]) -> None:
        """Compiles the loop in another thread, while the prompts' program compiles; once for the same sizes.

        What it raises, the call of the loop raises again.

        sizes: all that the shapes of the state depend on.
        make_state: makes such a state; only its shapes are used.
        """
        key = self._speculative or (self._make, self._model), sizes
        if key in _ahead:
            return
        _ahead[key] = None
        if len(_ahead) > MAX_PROGRAMS:
            _ahead.popitem(last=False)
        state, most = jax.eval_shape(make_state), jax.ShapeDtypeStruct((), jnp.int32)

        def compile_loop() -> None:
            with contextlib.suppress(Exception):
                if self._speculative is None:
                    _decode_plain.prepare(self._make, self._model, self.params, state, most)
                    return
                options = self._speculative, self.params, self.draft_params
                started = _start_speculation.prepare(*options, state)
                if started is not None:
                    _decode_speculation.prepare(*options, started, most)

        threading.Thread(target=compile_loop, name="compile_ahead").start()

    @property
    def constrained(self) -> Callable[[DecodeState], DecodeState]:
        """Gives a state its sharding constraints."""
        return self._model.execution.constrained if self._speculative is None else self._speculative.constrained

    def start(self, state: DecodeState) -> DecodeState:
        """Lets the drafter prefill the prompts."""
        if self._speculative is None:
            return state
        return _start_speculation(self._speculative, self.params, self.draft_params, state)

    def decode(self, state: DecodeState, max_tokens: np.int32) -> DecodeState:
        if self._speculative is None:
            return _decode_plain(self._make, self._model, self.params, state, max_tokens)
        return _decode_speculation(self._speculative, self.params, self.draft_params, state, max_tokens)


def _find_strategy(options: GenerateOptions) -> Any:
    """A `Strategy`, a `Speculation`, or a function from a model to a decode. Raises ValueError for others."""
    strategy = options.strategy
    if strategy is None:
        return autoregressive
    if isinstance(strategy, str):
        return strategy_from_text(strategy, options.draft_tokens)
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        return strategy()
    is_known = isinstance(strategy, Strategy | Speculation)
    if not is_known and (isinstance(strategy, type) or not callable(strategy) or not is_hashable(strategy)):
        expected = "a name, a Strategy object, a Speculation or a function from a model"
        raise refusal("strategy", expected, strategy)
    return strategy


def strategy_from_text(text: str, draft_tokens: int | str | None = None) -> Any:
    """The strategy that a text like "medusa:24,epsilon=0.1" names.

    draft_tokens: its option of that name, if it is not in the text.
    Raises ValueError where there is no such strategy or option.
    """
    apart = {} if draft_tokens is None else {"draft_tokens": draft_tokens}
    otherwise = ", a Speculation or a function from a model"
    return method_from_text("strategy", text, STRATEGIES, otherwise=otherwise, apart=apart)


def _checked_params(own: Any, given: Any) -> Any:
    """`given`, checked to hold all of the model's `own` weights: under the same names, of the same shapes."""
    shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(given)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        name = jax.tree_util.keystr(path)
        if shapes.get(name) != leaf.shape:
            found = "nothing" if name not in shapes else f"shape {list(shapes[name])}"
            raise ValueError(
                "params of a Speculation must hold all weights of the model (take lm.params and change or add some): "
                f"{name} must have shape {list(leaf.shape)}, got {found}"
            )
    return given


@bounded_jit(static_argnums=(0, 1), donate_argnums=(3,), name="decode")
def _decode_plain(make_decode: Any, model: Model, params: Any, state: DecodeState, max_tokens: Any) -> DecodeState:
    decode: Callable[..., DecodeState] = make_decode(model)
    if not callable(decode):
        raise ValueError(
            "strategy must be a name, a Speculation or a function from a model to a decode(params, state, max_tokens); "
            f"what this function gives is {shown(decode)}"
        )
    decoded = decode(params, state, max_tokens)
    if not isinstance(decoded, DecodeState):
        raise ValueError(
            f"the decode(params, state, max_tokens) that strategy gives must return a DecodeState, got {shown(decoded)}"
        )
    return decoded


@bounded_jit(static_argnums=(0,), donate_argnums=(3,), name="start")
def _start_speculation(decode: Speculative, params: Any, draft_params: Any, state: DecodeState) -> DecodeState:
    return decode.start(params, draft_params, state)


@bounded_jit(static_argnums=(0,), donate_argnums=(3,), name="decode")
def _decode_speculation(
    decode: Speculative, params: Any, draft_params: Any, state: DecodeState, max_tokens: Any
) -> DecodeState:
    return decode(params, draft_params, state, max_tokens)
