"""Building blocks shared by the image encoder, the text encoder, the fusion encoder and the decoder.

Shapes: B batch, L query tokens, S key tokens, D width, H heads, Dh head width. Activations have the compute `dtype`;
softmax, layer norm and logits are float32. Dropout is active exactly when the caller passes a "dropout" rng to `apply`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mplug_jax.ops.activations import Activation
from mplug_jax.ops.attention import attention
from mplug_jax.ops.attention.common import masked_scores
from mplug_jax.ops.dropout import dropout
from mplug_jax.ops.initializers import normal
from mplug_jax.ops.layer_norm import normalise
from mplug_jax.ops.linear import linear

_PRODUCT = "product with parameters"  # name of the output of every Dense


UNROLLED_DEPTH = 4  # stacks up to this deep are unrolled: a loop's stacking of saved activations costs a fifth of the step


class Dropout(nn.Module):
  """Dropout of activations, active when a "dropout" rng is given. f[..., D] -> f[..., D]."""

  rate: float

  def __call__(self, x):
    active = self.rate > 0.0 and self.has_rng("dropout")
    return dropout(x, self.rate, self.make_rng("dropout") if active else None)


class Dense(nn.Module):
  """activation(x) @ kernel + bias in the compute dtype; parameters are float32. f[..., D] -> dtype[..., features]."""

  features: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  activation: Activation | None = None  # of the input

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    else:
      bias = jnp.zeros((self.features,))
    # Named for `remat`: the gradient rule hides the product from policies that look for one.
    return checkpoint_name(
      linear(
        self.activation, x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype)
      ),
      _PRODUCT,
    )


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, computed in float32. f[..., D] -> dtype[..., D]."""

  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return normalise(x, scale, bias, self.epsilon).astype(self.dtype)


def split_heads(x, heads):
  """f[B, L, H * Dh] -> f[B, H, L, Dh]."""
  return x.reshape(x.shape[:2] + (heads, -1)).transpose(0, 2, 1, 3)


def merge_heads(x):
  """f[B, H, L, Dh] -> f[B, L, H * Dh]."""
  return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


class Attention(nn.Module):
  """Multi-head attention with separate query, key, value and output projections.

  Keys may come from fewer rows than queries: with M key rows and M * R query rows, consecutive groups of R query rows
  share one row of keys (R questions about an image, R answers to a question), whose keys and values are computed once.
  """

  width: int
  heads: int
  dropout_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  kernel_init: Callable = normal(0.02)
  out_init: Callable | None = None  # default: kernel_init
  attention_impl: str = "auto"  # see ops.attention.attention

  def setup(self):
    def dense(init):
      return Dense(self.width, dtype=self.dtype, kernel_init=init)

    self.query, self.key, self.value = (dense(self.kernel_init) for _ in range(3))
    self.out = dense(self.out_init or self.kernel_init)

  def keys_values(self, x):
    """f[M, S, D'] -> (key, value), both dtype[M, H, S, Dh]."""
    return split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)

  def attend(self, x, key, value, mask=None):
    """x: f[M * R, L, D]; key, value: [M, H, S, Dh]; mask: bool, broadcastable to [M, H, R * L, S] -> [M * R, L, D]."""
    rows, length, _ = x.shape
    query = self.query(x).reshape(key.shape[0], -1, self.width)  # [M, R * L, D]
    rng = self.make_rng("dropout") if self.dropout_rate > 0.0 and self.has_rng("dropout") else None
    query = split_heads(query, self.heads)
    if self.is_mutable_collection("intermediates"):
      out = self._observed(query, key, value, mask)
    else:
      out = attention(query, key, value, mask, self.dropout_rate, rng, self.attention_impl)
    return self.out(merge_heads(out)).reshape(rows, length, self.width)

  def _observed(self, query, key, value, mask):
    """`attention` without dropout that shows its probabilities f32[B, H, L, S]: they are sown in "intermediates", and what stands in
    "perturbations" is added to them, so that a gradient with respect to it is theirs. See attention_maps.py."""
    probabilities = jax.nn.softmax(masked_scores(query, key, mask))
    self.sow(
      "intermediates",
      "probabilities",
      probabilities,
      init_fn=lambda: None,
      reduce_fn=lambda _, new: new,
    )
    if self.has_variable("perturbations", "probabilities"):
      probabilities += self.get_variable("perturbations", "probabilities")
    return jnp.einsum(
      "bhls,bhsd->bhld",
      probabilities.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
    ).astype(value.dtype)

  def __call__(self, x, mask=None):
    """Self-attention. x: f[B, L, D]; mask: bool, broadcastable to [B, H, L, L] -> dtype[B, L, D]."""
    return self.attend(x, *self.keys_values(x), mask)


def remat(layer, policy, looped=False):
  """The layer class with its activations recomputed in the backward pass.

  Args:
    layer: a Module class.
    policy: "none" keeps everything, "full" keeps the layer's input only, "dots" keeps the outputs of products with
      parameters.
    looped: the layer is the body of a loop. Outside of one a barrier must keep the compiler from finding the recomputed
      values equal to the first ones, and keeping those after all; XLA on CPU ignores it.
  """
  if policy == "none":
    return layer
  policies = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),
  }
  if policy not in policies:
    raise ValueError(f"config.model.remat={policy!r} is not one of none, {', '.join(policies)}.")
  return nn.remat(layer, prevent_cse=not looped, policy=policies[policy])


def scan(layer, depth, remat_policy="none", broadcast=0):
  """A stack of `depth` equal layers as one scanned module: its parameters have a leading axis [depth, ...].

  Args:
    layer: a Module class whose `__call__(carry, ...)` returns (carry, output).
    broadcast: number of arguments behind the carry; every layer gets the same ones.
  """
  stacked = {
    "params": 0,
    "intermediates": 0,
    "perturbations": 0,
  }  # the last two: see Attention._observed
  return nn.scan(
    remat(layer, remat_policy, looped=True),
    variable_axes=stacked,
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast,) * broadcast,
    length=depth,
    unroll=depth if depth <= UNROLLED_DEPTH and remat_policy == "none" else 1,
  )
