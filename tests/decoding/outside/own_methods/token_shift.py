"""A mixer: adds to each token's features those of the token before it, and caches the last one's."""

import dataclasses
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core import pytree
from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.attention.predecessors import predecessors, tail_after
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.kv_cache.view import committed, staged_tokens
from decodax.layers.mixers.contract import MixingCost
from decodax.layers.row_parallel import row_parallel_linear


@pytree.dataclass
class ShiftUpdate:
    """The features of the tokens of one forward."""

    features: Float[Array, "B T F"]

    def place(self, new, slot):
        features = self.features.at[:, slot].set(new.features.astype(self.features.dtype), mode="drop")
        return dataclasses.replace(self, features=features)


@pytree.dataclass
class ShiftCache:
    """The features of the token committed last; zero before a row's first token."""

    tail: Float[Array, "B 1 F"]
    length: Int[Array, " B"]
    capacity: int = pytree.static()

    @classmethod
    def empty(cls, batch_size, capacity, num_features, dtype):
        return cls(jnp.zeros((batch_size, 1, num_features), dtype), jnp.zeros(batch_size, jnp.int32), capacity)

    def empty_like(self):
        return jax.tree.map(jnp.zeros_like, self)

    def commit(self, update, count, path=None):
        tail = tail_after(self.tail, update.features, count, path)
        return dataclasses.replace(self, tail=tail, length=self.length + count)


@dataclass(frozen=True)
class TokenShift:
    """out_t = W_out (f_t + shift * f_(t-1)) with f = W_in x.

    num_features: of f.
    """

    num_features: int

    def weights(self, hidden_size):
        return {
            "in": Weight(("F", "D"), (self.num_features, hidden_size)),
            "shift": Weight(("F",), (self.num_features,), "ones"),
            "out": Weight(("D", "F"), (hidden_size, self.num_features)),
        }

    def module(self, hidden_size, name, execution):
        return TokenShiftModule(self, hidden_size, execution, name=name)

    def empty_cache(self, batch_size, capacity, dtype, policy=KVCache):
        if policy is MarkedCache:
            raise ValueError("a token shift reads the token before, whatever it is: use a method that skips no layers")
        return ShiftCache.empty(batch_size, capacity, self.num_features, dtype)

    def unsupported_policy_reason(self, policy):
        return None if policy in (KVCache, MarkedCache) else "a token shift caches no keys and values"

    def invariant_unsupported_reason(self):
        return "a token shift reads the token before from elsewhere in a chain"

    def empty_update(self, batch_size, num_tokens, dtype):
        return ShiftUpdate(jnp.zeros((batch_size, num_tokens, self.num_features), dtype))

    def mixing_cost(self, num_new, num_cached):
        return MixingCost(2 * self.num_features, 0)

    def kernel(self, batch_size, num_new, capacity, dtype, execution=ON_THIS_DEVICE):
        return KernelSelection("xla", "there is no kernel for a token shift")


class TokenShiftModule(nn.Module):
    config: TokenShift
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, inputs, position, row_length, cache, mask):
        weight = fetch_own(self, self.config.weights(self.hidden_size))
        features = linear(inputs, weight["in"])
        last, staged = committed(cache), staged_tokens(cache)
        tail = jnp.zeros_like(features[:, :1]) if last is None else last.tail
        staged = None if staged is None else (staged[0].features, staged[1])
        before, own = jnp.moveaxis(predecessors(features, position, mask, tail, staged), 2, 0)
        mixed = own + weight["shift"][None, None] * before
        output = row_parallel_linear(mixed, weight["out"], axis_name="F", execution=self.execution)
        return output, ShiftUpdate(features)
