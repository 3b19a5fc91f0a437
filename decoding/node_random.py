"""Makes a verifier's random numbers: one uniform number and one draw of a token at every node of a draft tree."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key, UInt32

from decodax.core import pytree
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.top_tokens import argmax_token


@pytree.dataclass
class NodeRandom:
    """The random numbers of a round; they depend on a row's seed and on positions only, so not on the batch.

    seed: one per row.
    position: of the token that follows each node (prompt included, from 0); the root's is the lowest.
    max_depth: edges on the longest path, at most.
    is_chain: whether node c is at depth c in every row.
    """

    seed: UInt32[Array, " B"]
    position: Int[Array, "B C"]
    max_depth: int = pytree.static()
    is_chain: bool = pytree.static(default=False)

    def uniform(self) -> Float32[Array, "B C"]:
        """A number in [0, 1) for every node, which decides its acceptance; those of siblings are independent."""
        keys = self._keys(self.position - 1, Draw.ACCEPT).reshape(-1)
        node = jnp.tile(jnp.arange(self.position.shape[1], dtype=jnp.uint32), self.position.shape[0])

        def random_bits(key: Array, node: Array) -> Array:
            return jax.random.bits(jax.random.fold_in(key, node), (), jnp.uint32)

        # 24 bits, as many as float32 holds below 1: probability 1 is always accepted, probability 0 never.
        uniform = (jax.vmap(random_bits)(keys, node) >> 8).astype(jnp.float32) * 2.0**-24
        return uniform.reshape(self.position.shape)

    def sample(self, logits: Float32[Array, "B C V"]) -> Int[Array, "B C"]:
        """The token that plain decoding would draw after every node, for these logits (softmax: the distribution).

        Nodes of one depth share a position, and so the noise: it is made for max_depth + 1 positions, not for C nodes.
        """
        root = self.position[:, :1]
        levels = self.position if self.is_chain else root + jnp.arange(self.max_depth + 1, dtype=root.dtype)[None, :]
        noise = gumbel(self._keys(levels, Draw.TOKEN).reshape(-1), (logits.shape[2],))
        noise = noise.reshape(*levels.shape, logits.shape[2])
        if not self.is_chain:
            noise = jnp.take_along_axis(noise, (self.position - root)[:, :, None], axis=1)
        return jax.vmap(argmax_token, in_axes=1, out_axes=1)(logits + noise)

    def draw(self, node: Int[Array, " B"], probs: Float32[Array, "B V"]) -> Int[Array, " B"]:
        """A token after `node`, drawn from `probs` with the random numbers of plain decoding at that position."""
        position = jnp.take_along_axis(self.position, node[:, None], axis=1)[:, 0]
        return argmax_token(jnp.log(probs) + gumbel(draw_keys(self.seed, position, Draw.TOKEN), probs.shape[1:]))

    def _keys(self, position: Int[Array, "B C"], kind: Draw) -> Key[Array, "B C"]:
        # All rows and nodes along one axis: random bits over two nested axes take XLA four to eight times as long to
        # compile.
        keys = draw_keys(jnp.repeat(self.seed, position.shape[1]), position.reshape(-1), kind)
        return keys.reshape(position.shape)
