"""BERT in mPLUG: post-norm layers with optional cross-attention, text encoder, output layer.

Shapes: B rows, L tokens, D width, V vocabulary; memory rows M with B = M * R; K beams; at most T
decoded positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int, Shaped

from mplug_jax.arrays import Array
from mplug_jax.losses import language_modeling
from mplug_jax.models import layers
from mplug_jax.ops import activations, table
from mplug_jax.ops.attention.common import split_heads
from mplug_jax.parallel.rules import constrain

EPSILON = 1e-12  # of every layer norm in BERT

# Logits f32[B, L, V], or with labels (losses f32[B, L], label is the most probable bool[B, L]).
LogitsOrLosses = Any

KeysValues = tuple[Float[Array, "..."], Float[Array, "..."]]  # both dtype[M, S, D]


class BertConfig(NamedTuple):
  """Geometry and numerics common to all BERT parts of one model."""

  vocab_size: int
  hidden_size: int
  heads: int
  mlp_dim: int
  max_positions: int
  pad_id: int
  dropout_rate: float
  attention_dropout_rate: float
  initializer_range: float
  dtype: Dtype
  remat: str
  attention_impl: str
  ops: str
  loss_chunk: int

  @property
  def kernel_init(self) -> Callable[..., jax.Array]:
    """Returns the initializer of every kernel."""
    return table.get(self.ops).normal(self.initializer_range)

  def check_length(self, length: int) -> None:
    """Checks that texts are not longer than the position table: a look-up beyond it gives NaN.

    Raises:
      ValueError: they are.
    """
    if length > self.max_positions:
      raise ValueError(
        f"Texts of {length} tokens do not fit config.model.max_positions={self.max_positions}; "
        "lower the data's or task's maximal length."
      )

  def dense(self, width: int, name: str | None = None) -> layers.Dense:
    """Returns a dense layer with these numerics."""
    return layers.Dense(
      features=width, dtype=self.dtype, kernel_init=self.kernel_init, ops=self.ops, name=name
    )

  def norm(self, name: str | None = None) -> layers.LayerNorm:
    """Returns a layer norm with these numerics."""
    return layers.LayerNorm(epsilon=EPSILON, dtype=self.dtype, ops=self.ops, name=name)

  def dropout(self) -> layers.Dropout:
    """Returns a dropout layer with the rate of activations."""
    return layers.Dropout(rate=self.dropout_rate, ops=self.ops)

  def attention(self, name: str | None = None) -> layers.Attention:
    """Returns an attention layer with this geometry."""
    return layers.Attention(
      width=self.hidden_size,
      heads=self.heads,
      dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      attention_impl=self.attention_impl,
      ops=self.ops,
      name=name,
    )


class Memory(NamedTuple):
  """Input of cross-attention: segments along the sequence, each with its number of rows.

  A segment's rows divide the largest number of rows: [image f[B, N, D], text f[B * Q, L, D]] is
  the memory of Q questions about each image, and the image's keys and values are computed once for
  all Q.
  """

  states: tuple  # of f[M_i, S_i, D]
  masks: tuple  # of bool[M_i, S_i], or None = no padding

  @property
  def rows(self) -> int:
    """Returns the largest number of rows M."""
    return max(x.shape[0] for x in self.states)

  def repeat(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns [M, ...] from [M_i, ...], with consecutive copies of each row."""
    return x if x.shape[0] == self.rows else jnp.repeat(x, self.rows // x.shape[0], axis=0)

  @property
  def mask(self) -> Bool[Array, "rows keys"] | None:
    """Returns the joint mask, or None when no segment has padding."""
    if all(mask is None for mask in self.masks):
      return None
    masks = [
      jnp.ones(x.shape[:2], bool) if mask is None else mask
      for x, mask in zip(self.states, self.masks)
    ]
    return jnp.concatenate([self.repeat(mask) for mask in masks], axis=1)


class Embeddings(nn.Module, kw_only=True):
  """Word + position + token type (always type 0) embeddings, layer norm, dropout."""

  config: BertConfig

  def setup(self) -> None:
    """Creates the tables."""
    c = self.config

    def embed(rows):
      return nn.Embed(rows, c.hidden_size, dtype=c.dtype, embedding_init=c.kernel_init)

    self.word = embed(c.vocab_size)
    self.position = embed(c.max_positions)
    self.token_type = embed(2)
    self.norm = c.norm()
    self.dropout = c.dropout()

  def __call__(
    self, ids: Int[Array, "rows length"], positions: Int[Array, "..."]
  ) -> Float[Array, "rows length width"]:
    """Returns the embeddings; the look-up of the pad id passes no gradient.

    Args:
      ids: token ids.
      positions: [length], or [1] for the same position everywhere.
    """
    self.config.check_length(positions.shape[0])
    words = self.word(ids)
    words = jnp.where((ids == self.config.pad_id)[..., None], jax.lax.stop_gradient(words), words)
    return self.dropout(
      self.norm(words + self.position(positions) + self.token_type(jnp.zeros((1,), jnp.int32)))
    )


class BertLayer(nn.Module, kw_only=True):
  """Post-norm layer of self-attention, optional cross-attention, feed-forward; for `nn.scan`."""

  config: BertConfig
  cross: bool = False
  causal: bool = False

  def setup(self) -> None:
    """Creates the parts."""
    c = self.config
    self.attention = c.attention()
    self.attention_norm = c.norm()
    if self.cross:
      self.crossattention = c.attention()
      self.crossattention_norm = c.norm()
    self.intermediate = c.dense(c.mlp_dim)
    self.output = layers.ActivationThenDense(
      features=c.hidden_size,
      dtype=c.dtype,
      kernel_init=c.kernel_init,
      activation=activations.gelu,
      ops=c.ops,
    )
    self.output_norm = c.norm()
    self.dropout = c.dropout()

  def _feed_forward(self, x):
    out = self.output(self.intermediate(x))
    return constrain(self.output_norm(x + self.dropout(out)))

  def __call__(
    self,
    x: Float[Array, "rows length width"],
    mask: Bool[Array, "rows length"] | None = None,
    memory: Any = None,
    memory_mask: Bool[Array, "memory_rows keys"] | None = None,
  ) -> tuple[Float[Array, "rows length width"], None]:
    """Returns (output, None).

    Args:
      x: tokens.
      mask: True = may be attended to, or None for all.
      memory: `Memory`, its `cross_keys_values`, or None.
      memory_mask: `Memory.mask`.
    """
    x = self.attention_norm(x + self.dropout(self.attention(x, mask, self.causal)))
    if self.cross:
      key, value = self.cross_keys_values(memory) if isinstance(memory, Memory) else memory
      read = self.crossattention.attend(x, key, value, memory_mask)
      x = self.crossattention_norm(x + self.dropout(read))
    return self._feed_forward(x), None

  def cross_keys_values(self, memory: Memory) -> KeysValues:
    """Returns (key, value) of the memory; each segment is projected once."""
    pairs = [self.crossattention.keys_values(x) for x in memory.states]
    key, value = (jnp.concatenate([memory.repeat(x) for x in side], axis=1) for side in zip(*pairs))
    return key, value

  def step(
    self,
    x: Float[Array, "batch beams width"],
    cache: dict[str, Float[Array, "layers batch heads entries head_width"]],
    layer: int,
    seen: Bool[Array, "batch 1 beams entries"],
    cross: dict[str, Float[Array, "batch heads keys head_width"]],
    cross_mask: Bool[Array, "batch 1 1 keys"] | None,
    position: Int[Array, ""],
  ) -> tuple[Float[Array, "batch beams width"], dict[str, Float[Array, "..."]]]:
    """Decodes one position; beams are query positions of both attentions.

    Args:
      x: tokens at `position`.
      cache: {"key", "value"} with an entry for each position and beam, filled before `position`.
      layer: index of this layer in the cache.
      seen: which entries a beam attends to.
      cross: {"key", "value"} of the memory.
      cross_mask: which keys of the memory may be attended to, or None for all.
      position: index of the position.

    Returns:
      (output, the cache with `position` filled).
    """
    place = (layer, 0, 0, position * x.shape[1], 0)
    cache = {
      name: jax.lax.dynamic_update_slice(
        cache[name], split_heads(value, self.config.heads)[None], place
      )
      for name, value in zip(("key", "value"), self.attention.keys_values(x))
    }
    read = self.attention.attend_cached(x, cache["key"][layer], cache["value"][layer], seen)
    x = self.attention_norm(x + read)
    read = self.crossattention.attend_cached(x, cross["key"], cross["value"], cross_mask)
    return self._feed_forward(self.crossattention_norm(x + read)), cache


class LanguageModelHead(nn.Module, kw_only=True):
  """dense -> GELU -> layer norm -> product with a word embedding table -> + bias."""

  config: BertConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "rows length width"],
    word_table: Float[Array, "vocabulary width"],
    labels: Int[Array, "rows length"] | None = None,
  ) -> LogitsOrLosses:
    """Returns logits, or with `labels` their losses, see language_modeling.vocabulary_losses.

    Args:
      x: tokens.
      word_table: word embeddings.
      labels: ids of the expected tokens, or None.
    """
    c = self.config
    x = c.dense(c.hidden_size, name="dense")(x)
    x = c.norm("norm")(activations.gelu(x))
    bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
    if labels is None:
      return language_modeling.vocabulary_logits(x, word_table.astype(c.dtype), bias)
    return language_modeling.vocabulary_losses(x, word_table, bias, labels, c.loss_chunk)


class TextEncoder(nn.Module, kw_only=True):
  """Bidirectional BERT encoder."""

  config: BertConfig
  depth: int

  @nn.compact
  def __call__(
    self, ids: Int[Array, "rows length"], mask: Bool[Array, "rows length"]
  ) -> Float[Array, "rows length width"]:
    """Returns the tokens in the compute dtype; the mask is False for padding."""
    x = Embeddings(config=self.config, name="embeddings")(ids, jnp.arange(ids.shape[1]))
    stack = layers.scan(BertLayer, self.depth, self.config.remat, broadcast=1)
    return stack(config=self.config, name="layers")(constrain(x), mask)[0]
