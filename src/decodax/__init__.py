"""decodax: run language models fast, and research how to run them faster.

import decodax

lm = decodax.load()                                   # the embedded model; or a folder, or a hub id
out = decodax.generate(lm, ["def fib(n):"], max_new_tokens=64)
print(out.text[0], out.stats.tokens_per_second)

Names are imported at their first use: the command line has to be ready for Ctrl-C before JAX and the rest are imported,
which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from decodax.core.version import __version__

if TYPE_CHECKING:
    from decodax import decoding
    from decodax import kernels_pallas as kernels_pallas
    from decodax import layers as layers
    from decodax import models as models
    from decodax import sharding as sharding
    from decodax.api import Generation, LanguageModel, generate, load, logits

__all__ = ["Generation", "LanguageModel", "__version__", "decoding", "generate", "load", "logits"]

_PACKAGES = ("decoding", "kernels_pallas", "layers", "models", "sharding")


def __getattr__(name: str) -> Any:
    if name not in (*__all__, *_PACKAGES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = import_module(f"{__name__}.{name}") if name in _PACKAGES else getattr(import_module("decodax.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
