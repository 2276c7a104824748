"""The causal text decoder: under teacher forcing, and token by token with a cache.

Shapes: B rows of the memory, K beams, T positions, H heads, Dh head width, S keys of the memory.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from mplug_jax.arrays import Array
from mplug_jax.models import layers
from mplug_jax.models.bert import (
  BertConfig,
  BertLayer,
  Embeddings,
  LanguageModelHead,
  LogitsOrLosses,
  Memory,
)
from mplug_jax.ops.attention.common import split_heads
from mplug_jax.parallel.rules import constrain


class TextDecoder(nn.Module, kw_only=True):
  """Causal BERT decoder with cross-attention; its output layer is tied to its word embeddings."""

  config: BertConfig
  depth: int

  def setup(self) -> None:
    """Creates the parts."""
    self.embeddings = Embeddings(config=self.config)
    self.layers = layers.scan(BertLayer, self.depth, self.config.remat, broadcast=3)(
      config=self.config, cross=True, causal=True
    )
    self.head = LanguageModelHead(config=self.config)

  def __call__(
    self,
    ids: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"],
    memory: Memory,
    labels: Int[Array, "rows length"] | None = None,
  ) -> LogitsOrLosses:
    """Returns logits under teacher forcing, or losses.

    Args:
      ids: token ids.
      mask: False for padding.
      memory: M rows with rows = M * R.
      labels: see LanguageModelHead.
    """
    length = ids.shape[1]
    x = constrain(self.embeddings(ids, jnp.arange(length)))
    x, _ = self.layers(x, mask, memory, memory.mask)
    return self.head(x, self.embeddings.word.embedding, labels)

  def init_cache(self, memory: Memory, beams: int, length: int) -> dict[str, Any]:
    """Returns the cache of incremental decoding.

    Args:
      memory: its rows are the items.
      beams: sequences per item K.
      length: number of positions T.

    Returns:
      {"layers": the layers' parameters, kernels in the compute dtype, and "cross":
      {"key", "value"} dtype[B, H, S, Dh], both tuples with an entry per layer; "self":
      {"key", "value"} dtype[layers, B, H, T * K, Dh], empty; "cross_mask": bool[B, 1, 1, S] or
      None; "writers": i32[B, K, T], the beam that wrote the entry of a beam's token. Beams that
      change places exchange their writers, and the entries stay}.
    """
    c = self.config
    c.check_length(length)
    # Split by layer and cast once, before the loop. A loop over stacked parameters inside the loop
    # over positions copies every kernel for every position: half the time of decoding on CPU.
    stacked = self.layers.variables["params"]
    per_layer = tuple(
      jax.tree.map_with_path(
        lambda path, x, i=i: x[i].astype(c.dtype) if path[-1].key == "kernel" else x[i], stacked
      )
      for i in range(self.depth)
    )

    def cross(params):
      key, value = self._layer(params, BertLayer.cross_keys_values, memory)
      return {"key": split_heads(key, c.heads), "value": split_heads(value, c.heads)}

    # One array for all layers: of an array for each, a TPU keeps some on the chip, and then writes
    # them back whole at every position.
    shape = (self.depth, memory.rows, c.heads, length * beams, c.hidden_size // c.heads)
    return {
      "layers": per_layer,
      "cross": tuple(map(cross, per_layer)),
      "self": {name: jnp.zeros(shape, c.dtype) for name in ("key", "value")},
      "cross_mask": None if memory.mask is None else memory.mask[:, None, None, :],
      "writers": jnp.zeros((memory.rows, beams, length), jnp.int32),
    }

  def step(
    self, tokens: Int[Array, "batch beams"], position: Int[Array, ""], cache: dict[str, Any]
  ) -> tuple[LogitsOrLosses, dict[str, Any]]:
    """Returns (logits f32[B, K, V] of the next position, cache) for the tokens at `position`."""
    x = self.embeddings(tokens, position[None])
    batch, beams, length = cache["writers"].shape
    beam = jnp.arange(beams, dtype=jnp.int32)
    writers = jax.lax.dynamic_update_slice_in_dim(
      cache["writers"], jnp.broadcast_to(beam[:, None], (batch, beams, 1)), position, 2
    )
    seen = (writers[..., None] == beam) & (jnp.arange(length) <= position)[:, None]
    seen = seen.reshape(batch, 1, beams, length * beams)
    own = cache["self"]
    for i, (params, cross) in enumerate(zip(cache["layers"], cache["cross"], strict=True)):
      x, own = self._layer(
        params, BertLayer.step, x, own, i, seen, cross, cache["cross_mask"], position
      )
    logits = self.head(x, self.embeddings.word.embedding)
    return logits, cache | {"self": own, "writers": writers}

  def _layer(self, params, method, *args) -> Any:
    """A method of one layer with the given parameters."""
    return BertLayer(config=self.config, cross=True, parent=None).apply(
      {"params": params}, *args, method=method
    )
