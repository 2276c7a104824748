"""BERT in mPLUG: post-norm layers with optional cross-attention, text encoder, causal text decoder.

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
    cache: dict[str, Float[Array, "batch heads entries head_width"]],
    seen: Bool[Array, "batch 1 beams entries"],
    cross: dict[str, Float[Array, "batch heads keys head_width"]],
    cross_mask: Bool[Array, "batch 1 1 keys"] | None,
    position: Int[Array, ""],
  ) -> tuple[Float[Array, "batch beams width"], dict[str, Float[Array, "..."]]]:
    """Decodes one position; beams are query positions of both attentions.

    Args:
      x: tokens at `position`.
      cache: {"key", "value"} with an entry for each position and beam, filled before `position`.
      seen: which entries a beam attends to.
      cross: {"key", "value"} of the memory.
      cross_mask: which keys of the memory may be attended to, or None for all.
      position: index of the position.

    Returns:
      (output, the cache with `position` filled).
    """
    first = position * x.shape[1]
    cache = {
      name: jax.lax.dynamic_update_slice_in_dim(
        cache[name], split_heads(value, self.config.heads), first, 2
      )
      for name, value in zip(("key", "value"), self.attention.keys_values(x))
    }
    read = self.attention.attend_cached(x, cache["key"], cache["value"], seen)
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
      {"layers": the layers' parameters, kernels in the compute dtype,
      "cross": {"key", "value"}: dtype[B, H, S, Dh],
      "self": {"key", "value"}: dtype[B, H, T * K, Dh], empty}, each a tuple with an entry per
      layer, "cross_mask": bool[B, 1, 1, S] or None, and "writers": i32[B, K, T], the beam that
      wrote the entry of a beam's token. Beams that change places exchange their writers, and the
      entries stay.
    """
    c = self.config
    c.check_length(length)
    # Split by layer and cast once, before the loop. A loop over stacked parameters inside the loop
    # over positions copies every kernel for every position: half the time of decoding on CPU.
    stacked = jax.tree.map_with_path(
      lambda path, x: x.astype(c.dtype) if path[-1].key == "kernel" else x,
      self.layers.variables["params"],
    )
    per_layer = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.depth))

    def cross(params):
      key, value = self._layer(params, BertLayer.cross_keys_values, memory)
      return {"key": split_heads(key, c.heads), "value": split_heads(value, c.heads)}

    shape = (memory.rows, c.heads, length * beams, c.hidden_size // c.heads)
    return {
      "layers": per_layer,
      "cross": tuple(map(cross, per_layer)),
      "self": tuple(
        {name: jnp.zeros(shape, c.dtype) for name in ("key", "value")} for _ in per_layer
      ),
      "cross_mask": None if memory.mask is None else memory.mask[:, None, None, :],
      "writers": jnp.zeros((memory.rows, beams, length), jnp.int32),
    }

  def step(
    self, tokens: Int[Array, "batch beams"], position: Int[Array, ""], cache: dict[str, Any]
  ) -> tuple[LogitsOrLosses, dict[str, Any]]:
    """Returns (logits f32[B, K, V] of the next position, cache) for the tokens at `position`."""
    x = self.embeddings(tokens, position[None])
    batch, beams, length = cache["writers"].shape
    own = jnp.arange(beams, dtype=jnp.int32)
    writers = jax.lax.dynamic_update_slice_in_dim(
      cache["writers"], jnp.broadcast_to(own[:, None], (batch, beams, 1)), position, 2
    )
    seen = (writers[..., None] == own) & (jnp.arange(length) <= position)[:, None]
    seen = seen.reshape(batch, 1, beams, length * beams)
    new = []
    for params, past, cross in zip(cache["layers"], cache["self"], cache["cross"], strict=True):
      x, past = self._layer(
        params, BertLayer.step, x, past, seen, cross, cache["cross_mask"], position
      )
      new.append(past)
    logits = self.head(x, self.embeddings.word.embedding)
    return logits, cache | {"self": tuple(new), "writers": writers}

  def _layer(self, params, method, *args) -> Any:
    """A method of one layer with the given parameters."""
    return BertLayer(config=self.config, cross=True, parent=None).apply(
      {"params": params}, *args, method=method
    )
