"""BERT as mPLUG uses it: post-norm layers with optional cross-attention, the text encoder, the causal text decoder.

Shapes: B rows, L tokens, D width, V vocabulary; memory rows M with B = M * R; K beams; T decoded positions at most.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.losses import language_modeling
from mplug_jax.models import layers
from mplug_jax.ops import activations, initializers
from mplug_jax.parallel.rules import constrain

EPSILON = 1e-12  # of every layer norm in BERT


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
  dtype: jnp.dtype
  remat: str
  attention_impl: str
  loss_chunk: int

  @property
  def kernel_init(self):
    return initializers.normal(self.initializer_range)

  def check_length(self, length):
    """Raises ValueError for texts longer than the table of positions: a look-up beyond its end would give NaN."""
    if length > self.max_positions:
      raise ValueError(
        f"Texts of {length} tokens do not fit config.model.max_positions={self.max_positions}; lower the data's or "
        "task's maximal length."
      )

  def dense(self, width: int, name: str | None = None) -> layers.Dense:
    """Returns a dense layer with these numerics."""
    return layers.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name=name)

  def norm(self, name: str | None = None) -> layers.LayerNorm:
    """Returns a layer norm with these numerics."""
    return layers.LayerNorm(EPSILON, self.dtype, name=name)

  def attention(self, name: str | None = None) -> layers.Attention:
    """Returns an attention layer with this geometry."""
    return layers.Attention(
      width=self.hidden_size,
      heads=self.heads,
      dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      attention_impl=self.attention_impl,
      name=name,
    )


class Memory(NamedTuple):
  """What cross-attention reads: segments along the sequence, each with its own number of rows.

  A segment's rows divide the largest number of rows: [image f[B, N, D], text f[B * Q, L, D]] is the memory of Q
  questions about each image, and the image's keys and values are computed once for all Q.
  """

  states: tuple  # of f[M_i, S_i, D]
  masks: tuple  # of bool[M_i, S_i], or None = no padding

  @property
  def rows(self):
    return max(x.shape[0] for x in self.states)

  def repeat(self, x):
    """f[M_i, ...] -> f[M, ...], each row repeated in place."""
    return x if x.shape[0] == self.rows else jnp.repeat(x, self.rows // x.shape[0], axis=0)

  @property
  def mask(self):
    """bool[M, 1, 1, S], or None when no segment has padding."""
    if all(mask is None for mask in self.masks):
      return None
    masks = [
      jnp.ones(x.shape[:2], bool) if mask is None else mask
      for x, mask in zip(self.states, self.masks)
    ]
    return jnp.concatenate([self.repeat(mask) for mask in masks], axis=1)[:, None, None, :]


class Embeddings(nn.Module):
  """Word + position + token type (always type 0) embeddings, layer norm, dropout."""

  config: BertConfig

  def setup(self):
    c = self.config

    def table(rows):
      return nn.Embed(rows, c.hidden_size, dtype=c.dtype, embedding_init=c.kernel_init)

    self.word, self.position, self.token_type = (
      table(c.vocab_size),
      table(c.max_positions),
      table(2),
    )
    self.norm = c.norm()
    self.dropout = layers.Dropout(c.dropout_rate)

  def __call__(self, ids, positions):
    """ids: i32[B, L]; positions: i32[L] -> dtype[B, L, D]. The look-up of the pad id passes no gradient."""
    self.config.check_length(positions.shape[0])
    words = self.word(ids)
    words = jnp.where((ids == self.config.pad_id)[..., None], jax.lax.stop_gradient(words), words)
    return self.dropout(
      self.norm(words + self.position(positions) + self.token_type(jnp.zeros((1,), jnp.int32)))
    )


class BertLayer(nn.Module):
  """Post-norm layer: self-attention, optional cross-attention, feed-forward. A body for `nn.scan`."""

  config: BertConfig
  cross: bool = False

  def setup(self):
    c = self.config
    self.attention = c.attention()
    self.attention_norm = c.norm()
    if self.cross:
      self.crossattention = c.attention()
      self.crossattention_norm = c.norm()
    self.intermediate = c.dense(c.mlp_dim)
    self.output = layers.ActivationThenDense(
      c.hidden_size, dtype=c.dtype, kernel_init=c.kernel_init, activation=activations.gelu
    )
    self.output_norm = c.norm()
    self.dropout = layers.Dropout(c.dropout_rate)

  def _feed_forward(self, x):
    out = self.output(self.intermediate(x))
    return constrain(self.output_norm(x + self.dropout(out)))

  def __call__(self, x, mask=None, memory=None, memory_mask=None):
    """x: f[B, L, D]; mask: bool[B, 1, L | 1, L]; memory: `Memory`, its `cross_keys_values`, or None -> (dtype[B, L, D], None)."""
    x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
    if self.cross:
      keys_values = self.cross_keys_values(memory) if isinstance(memory, Memory) else memory
      read = self.crossattention.attend(x, *keys_values, memory_mask)
      x = self.crossattention_norm(x + self.dropout(read))
    return self._feed_forward(x), None

  def cross_keys_values(self, memory):
    """`Memory` of M rows -> (key, value), both dtype[M, H, S, Dh]; each memory segment is projected once."""
    pairs = [self.crossattention.keys_values(x) for x in memory.states]
    return tuple(jnp.concatenate([memory.repeat(x) for x in side], axis=2) for side in zip(*pairs))

  def step(self, x, cache, cross, position, cross_mask):
    """One position of incremental decoding; beams are query positions of the cross-attention.

    Args:
      x: f[B, K, D]. position: i32[].
      cache: {"key", "value"}: dtype[B, K, H, T, Dh], positions before `position` filled.
      cross: (key, value) dtype[B, H, S, Dh]. cross_mask: bool[B, 1, 1, S] or None.

    Returns:
      (dtype[B, K, D], the cache with `position` filled).
    """
    new = self.attention.keys_values(x)  # [B, H, K, Dh]
    cache = {
      name: jax.lax.dynamic_update_slice_in_dim(
        cache[name], value.transpose(0, 2, 1, 3)[:, :, :, None], position, 3
      )
      for name, value in zip(("key", "value"), new)
    }
    batch, beams = x.shape[:2]
    flat = jax.tree.map(lambda c: c.reshape((batch * beams,) + c.shape[2:]), cache)
    seen = (jnp.arange(flat["key"].shape[2]) <= position)[None, None, None, :]
    read = self.attention.attend(x.reshape(batch * beams, 1, -1), flat["key"], flat["value"], seen)
    x = self.attention_norm(x + read.reshape(x.shape))
    read = self.crossattention.attend(x, *cross, cross_mask)
    return self._feed_forward(self.crossattention_norm(x + read)), cache


class LanguageModelHead(nn.Module):
  """dense -> GELU -> layer norm -> product with a word embedding table -> + bias."""

  config: BertConfig

  @nn.compact
  def __call__(self, x, table, labels=None):
    """x: f[B, L, D]; table: f[V, D] -> f32[B, L, V]; with labels i32[B, L] their losses instead, see losses.vocabulary_losses."""
    c = self.config
    x = c.norm("norm")(activations.gelu(c.dense(c.hidden_size, name="dense")(x)))
    bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
    if labels is None:
      return language_modeling.vocabulary_logits(x, table.astype(c.dtype), bias)
    return language_modeling.vocabulary_losses(x, table, bias, labels, c.loss_chunk)


class TextEncoder(nn.Module):
  """Bidirectional BERT encoder. i32[B, L], bool[B, L] -> dtype[B, L, D]."""

  config: BertConfig
  depth: int

  @nn.compact
  def __call__(self, ids, mask):
    x = Embeddings(self.config, name="embeddings")(ids, jnp.arange(ids.shape[1]))
    stack = layers.scan(BertLayer, self.depth, self.config.remat, broadcast=1)
    return stack(self.config, name="layers")(constrain(x), mask[:, None, None, :])[0]


class TextDecoder(nn.Module):
  """Causal BERT decoder with cross-attention; its output layer is tied to its word embeddings."""

  config: BertConfig
  depth: int

  def setup(self):
    self.embeddings = Embeddings(self.config)
    self.layers = layers.scan(BertLayer, self.depth, self.config.remat, broadcast=3)(
      self.config, cross=True
    )
    self.head = LanguageModelHead(self.config)

  def __call__(self, ids, mask, memory, labels=None):
    """Teacher forcing. ids: i32[B, L]; mask: bool[B, L]; memory: `Memory`, M rows with B = M * R; labels: see LanguageModelHead ->
    f32[B, L, V], or losses."""
    length = ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None] & mask[:, None, None, :]
    x = constrain(self.embeddings(ids, jnp.arange(length)))
    x, _ = self.layers(x, causal, memory, memory.mask)
    return self.head(x, self.embeddings.word.embedding, labels)

  def init_cache(self, memory, beams, length):
    """What incremental decoding reads and writes, each of these a tuple with an entry per layer.

    Returns:
      {"layers": the layers' parameters, kernels in the compute dtype, "cross": (key, value) dtype[B, H, S, Dh],
       "self": {"key", "value"}: dtype[B, K, H, T, Dh], empty} and "cross_mask": bool[B, 1, 1, S] or None.
    """
    c = self.config
    c.check_length(length)
    # Taken apart and cast once, before the loop. A loop over the stacked ones inside the loop over positions copies
    # every kernel for every position: half the time of decoding on CPU.
    stacked = jax.tree.map_with_path(
      lambda path, x: x.astype(c.dtype) if path[-1].key == "kernel" else x,
      self.layers.variables["params"],
    )
    per_layer = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.depth))
    shape = (memory.rows, beams, c.heads, length, c.hidden_size // c.heads)
    return {
      "layers": per_layer,
      "cross": tuple(
        self._layer(params, BertLayer.cross_keys_values, memory) for params in per_layer
      ),
      "self": tuple(
        {name: jnp.zeros(shape, c.dtype) for name in ("key", "value")} for _ in per_layer
      ),
      "cross_mask": memory.mask,
    }

  def step(self, tokens, position, cache):
    """tokens: i32[B, K] at `position` i32[] -> (f32[B, K, V] for the next position, cache)."""
    x, new = self.embeddings(tokens, position[None]), []
    for params, own, cross in zip(cache["layers"], cache["self"], cache["cross"], strict=True):
      x, own = self._layer(params, BertLayer.step, x, own, cross, position, cache["cross_mask"])
      new.append(own)
    return self.head(x, self.embeddings.word.embedding), cache | {"self": tuple(new)}

  def _layer(self, params, method, *args):
    """A method of one layer with the given parameters."""
    return BertLayer(self.config, cross=True, parent=None).apply(
      {"params": params}, *args, method=method
    )
