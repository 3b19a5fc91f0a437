"""decodax: run language models fast in JAX, and research how to run them faster.

import decodax

lm = decodax.load()                                   # the embedded model; or a folder, or a hub id
out = decodax.generate(lm, ["def fib(n):"], max_new_tokens=64)
print(out.text[0], out.stats.tokens_per_second)
"""

from decodax import decoding
from decodax.api import Generation, LanguageModel, generate, load, logits

__version__ = "0.1.0"

__all__ = ["Generation", "LanguageModel", "decoding", "generate", "load", "logits"]
