"""A cache policy: keys and values in 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp

from decodax.core import pytree
from decodax.layers.kv_cache.write import invalid_without_room, slots_after, write_tokens


@pytree.dataclass
class Int8Cache:
    """Keys and values in 8 bits, each token and head with a scale of its own: value = integer x scale."""

    key: jax.Array  # int8
    value: jax.Array
    key_scale: jax.Array  # float32
    value_scale: jax.Array
    length: jax.Array

    def axes(self):
        by_token = dict.fromkeys(("key_scale", "value_scale"), "B K S")
        return dataclasses.replace(self, key="B K S H", value="B K S H", **by_token, length="B")

    @classmethod
    def empty(cls, batch_size, num_kv_heads, capacity, head_size, dtype):
        shape = (batch_size, num_kv_heads, capacity)
        integers, scales = jnp.zeros((*shape, head_size), jnp.int8), jnp.zeros(shape)
        return cls(integers, integers, scales, scales, jnp.zeros(batch_size, jnp.int32))

    capacity = property(lambda self: self.key.shape[2])

    def empty_like(self):
        return jax.tree.map(jnp.zeros_like, self)

    def read(self, start, num_tokens):
        arrays = (self.key, self.key_scale, self.value, self.value_scale)
        key, key_scale, value, value_scale = (
            jax.lax.dynamic_slice_in_dim(array, start, num_tokens, axis=2).astype(jnp.float32) for array in arrays
        )
        slot = start + jnp.arange(num_tokens)[None, :]
        filled = (slot < self.length[:, None])[:, None, :]
        return key * key_scale[..., None], value * value_scale[..., None], slot, filled

    def commit(self, update, count, path=None):
        key, value = update.key, update.value
        if path is not None:
            key, value = (jnp.take_along_axis(x, path[:, None, :, None], axis=2) for x in (key, value))
        (key, key_scale), (value, value_scale) = quantised(key), quantised(value)
        # A scale of NaN: the row fails at once and does not lose tokens in silence.
        key_scale = invalid_without_room(key_scale, self.length + count > self.capacity)
        slot = slots_after(self.length, count, key.shape[2], self.capacity)
        new = {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}
        written = {name: write_tokens(getattr(self, name), tokens, slot, axis=2) for name, tokens in new.items()}
        return dataclasses.replace(self, **written, length=self.length + count)


def quantised(numbers):
    """The numbers in 8 bits, and the scales."""
    scale = jnp.max(jnp.abs(numbers), axis=-1) * (1 / 127)
    return jnp.round(numbers / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale
