"""decodax: run language models fast, and research how to run them faster.

import decodax

lm = decodax.load()                                   # the embedded model; or a folder, or a hub id
out = decodax.generate(lm, ["def fib(n):"], max_new_tokens=64)
print(out.text[0], out.stats.tokens_per_second)

Names are imported at their first use: the command line has to be ready for Ctrl-C before JAX and the rest are imported,
which takes seconds.
"""

from typing import TYPE_CHECKING

from decodax.core.lazy import exports
from decodax.core.version import __version__

if TYPE_CHECKING:
    from decodax import decoding
    from decodax import kernels_pallas as kernels_pallas
    from decodax import layers as layers
    from decodax import models as models
    from decodax import sharding as sharding
    from decodax.api import Generation, LanguageModel, Score, generate, load, logits, score

__all__ = ["Generation", "LanguageModel", "Score", "__version__", "decoding", "generate", "load", "logits", "score"]

_PACKAGES = ("decoding", "kernels_pallas", "layers", "models", "sharding")
_OF_API: dict[str, str] = dict.fromkeys(
    ("Generation", "LanguageModel", "Score", "generate", "load", "logits", "score"), "api"
)

__getattr__, __dir__ = exports(__name__, {**dict.fromkeys(_PACKAGES, ""), **_OF_API})
