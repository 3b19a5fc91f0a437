"""Lists named real shapes of `flash_prefill`: tests compile the kernels for them, benchmarks time them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Shape:
    """A chunk of a prompt and one set of keys; `offset` and `length` are the same for all rows."""

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    offset: int = 0
    length: int | None = None
    window: int | None = None
    num_sink_tokens: int = 0
    softcap: float | None = None
    has_sink_logits: bool = False
    dtype: str = "bfloat16"

    def operands(self) -> dict[str, Any]:
        """Shapes of the arrays that `flash_prefill` takes."""
        described = {
            "query": (self.batch, self.num_queries, self.num_heads, self.head_size),
            "key": (self.batch, self.num_kv_heads, self.num_keys, self.head_size),
            "value": (self.batch, self.num_kv_heads, self.num_keys, self.value_size),
        }
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for name, shape in described.items()}
        for name in ("offset", "length"):
            arrays[name] = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        if self.has_sink_logits:
            arrays["sink_logits"] = jax.ShapeDtypeStruct((self.num_heads,), jnp.float32)
        return arrays

    def random_operands(self, seed: int) -> dict[str, jax.Array]:
        """Operands with normal numbers, and this shape's offset and length."""
        values = {"offset": self.offset, "length": self._length}
        arrays = {}
        for index, (name, leaf) in enumerate(self.operands().items()):
            if name in values:
                arrays[name] = jnp.full(leaf.shape, values[name], leaf.dtype)
            else:
                arrays[name] = jax.random.normal(
                    jax.random.fold_in(jax.random.key(seed), index), leaf.shape, leaf.dtype
                )
        return arrays

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        return {
            "scale": self.head_size**-0.5,
            "causal": True,
            "window": self.window,
            "num_sink_tokens": self.num_sink_tokens,
            "softcap": self.softcap,
        }

    @property
    def _length(self) -> int:
        return self.num_keys if self.length is None else self.length

    def _scores(self) -> int:
        """Unmasked pairs of a query and a key, of one head of one row."""
        query = self.offset + np.arange(self.num_queries)
        last = np.minimum(query + 1, self._length)
        first = np.zeros_like(last) if self.window is None else np.maximum(query + 1 - self.window, 0)
        sinks = np.minimum(np.minimum(first, last), self.num_sink_tokens)
        return int(np.sum(np.maximum(last - first, 0) + sinks))

    def flops(self) -> int:
        """Operations of the two matrix products, counting only unmasked pairs."""
        return 2 * self.batch * self.num_heads * self._scores() * (self.head_size + self.value_size)

    def bytes_moved(self) -> int:
        """Bytes of queries, output and log-sum-exp, and of every key and value that is read, once."""
        item_bytes = jnp.dtype(self.dtype).itemsize
        read_keys = min(self._length, self.offset + self.num_queries)
        if self.window is not None:
            unread = max(self.offset + 1 - self.window, 0)
            read_keys -= max(unread - self.num_sink_tokens, 0)
        sizes = self.head_size + self.value_size
        tokens = self.batch * self.num_queries * self.num_heads
        keys = self.batch * self.num_kv_heads * max(read_keys, 0)
        return item_bytes * sizes * (tokens + keys) + 4 * tokens


SHAPES: dict[str, Shape] = {
    "llama3-8b prefill, 16k": Shape(1, 16384, 16384, 32, 8, 128, 128),
    "llama3-8b chunk of 2k after 30k cached, batch 4": Shape(
        4, 2048, 32768, 32, 8, 128, 128, offset=30000, length=30000
    ),
    "gemma2-9b local layer, 8k": Shape(2, 8192, 8192, 16, 8, 256, 256, window=4096, softcap=50.0),
    "gpt-oss-20b local layer, 8k": Shape(2, 8192, 8192, 64, 8, 64, 64, window=128, has_sink_logits=True),
    "deepseek-v2-lite prefill, 4k": Shape(2, 4096, 4096, 16, 16, 192, 128),
    "llama3-8b prompt of 100": Shape(1, 100, 100, 32, 8, 128, 128),
    "llama3-8b streaming, 16k": Shape(1, 16384, 16384, 32, 8, 128, 128, window=1024, num_sink_tokens=4),
}
