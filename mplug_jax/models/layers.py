"""Building blocks shared by the image encoder, the text encoder, the fusion encoder and the decoder.

Shapes: B batch, L query tokens, S key tokens, D width, H heads, Dh head width. Activations have the compute `dtype`;
softmax, layer norm and logits are float32. Dropout is active exactly when the caller passes a "dropout" rng to `apply`.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mplug_jax.ops.attention import attention, masked_scores
from mplug_jax.ops.dropout import dropout, random_bits

_PRODUCT = "product with parameters"  # name of the output of every Dense
UNROLLED_DEPTH = 4  # stacks up to this deep are unrolled: a loop's stacking of saved activations costs a fifth of the step


class Activation:
  """An elementwise function whose backward pass keeps its input alone and recomputes the rest: less memory traffic."""

  def __init__(self, function, derivative):
    self.function, self.derivative = function, derivative
    self._differentiable = jax.custom_vjp(function)
    self._differentiable.defvjp(
      lambda x: (function(x), x), lambda x, cotangent: (cotangent * derivative(x),)
    )

  def __call__(self, x):
    return self._differentiable(x)


def _quick_gelu_derivative(x):
  gate = nn.sigmoid(1.702 * x)
  return gate * (1.0 + 1.702 * x * (1.0 - gate))


def _gelu_derivative(x):
  return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) * (
    1.0 / math.sqrt(2 * math.pi)
  )


# x * sigmoid(1.702 x), the activation of CLIP. f[...] -> f[...].
quick_gelu = Activation(lambda x: x * nn.sigmoid(1.702 * x), _quick_gelu_derivative)
# Exact (erf) GELU, the activation of BERT. f[...] -> f[...]. With erf rather than erfc, which JAX's own uses for precision
# far in the tail: half the time on CPU.
gelu = Activation(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))), _gelu_derivative)


def normal(stddev):
  """Initializer (key, shape, dtype) -> array: normal, mean 0. Through `random_bits`: five times faster on CPU than JAX's."""

  def init(key, shape, dtype=jnp.float32):
    return (stddev * _standard_normal(key, shape)).astype(dtype)

  return init


@functools.partial(jax.jit, static_argnums=1)
def _standard_normal(key, shape):
  uniform = (random_bits(key, shape) >> 8).astype(jnp.float32) * 2.0**-23 + (
    2.0**-24 - 1.0
  )  # inside (-1, 1), 2^24 values
  return math.sqrt(2.0) * jax.lax.erf_inv(uniform)


class Dropout(nn.Module):
  """Dropout of activations, active when a "dropout" rng is given. f[..., D] -> f[..., D]."""

  rate: float

  def __call__(self, x):
    active = self.rate > 0.0 and self.has_rng("dropout")
    return dropout(x, self.rate, self.make_rng("dropout") if active else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(activation, x, kernel, bias):
  """activation(x) times f[D, E] plus f[E]. f[..., D] -> f[..., E]; activation None = identity.

  Its own gradient rule. It keeps x alone, not activation(x) beside it. And for XLA on CPU: JAX's default computes the
  kernel's gradient transposed, for which XLA first writes a transposed copy of the whole cotangent, and sums the bias's
  gradient over strided memory: together a third of a small model's train step.
  """
  active = x if activation is None else activation.function(x)
  return jax.lax.dot_general(active, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


def _linear_forward(activation, x, kernel, bias):
  return linear(activation, x, kernel, bias), (x, kernel)


def _linear_backward(activation, saved, cotangent):
  x, kernel = saved
  active = x if activation is None else activation.function(x)
  rows, columns = active.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
  sums = jax.lax.dot_general(
    jnp.ones((1, columns.shape[0]), columns.dtype), columns, (((1,), (0,)), ((), ()))
  )[0]
  d_x = jax.lax.dot_general(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))
  if activation is not None:
    d_x *= activation.derivative(x)
  return d_x, jax.lax.dot_general(rows, columns, (((0,), (0,)), ((), ()))), sums


linear.defvjp(_linear_forward, _linear_backward)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x, scale, bias, epsilon):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis. f[..., D], f32[D], f32[D] -> f32[..., D].

  Its own gradient rule keeps the input and two numbers a row; JAX's default keeps several arrays of the input's size.
  """
  return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
  wide = x.astype(jnp.float32)
  mean = wide.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
  return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _normalise_backward(epsilon, saved, cotangent):
  del epsilon
  x, mean, inverse, scale = saved
  normed = (x.astype(jnp.float32) - mean) * inverse
  inner = cotangent * scale
  dx = inverse * (
    inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
  )
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), (cotangent * normed).sum(rows), cotangent.sum(rows)


normalise.defvjp(_normalise_forward, _normalise_backward)


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
  rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  kernel_init: Callable = normal(0.02)
  out_init: Callable | None = None  # default: kernel_init
  kernels: str = "auto"  # see attention.KERNELS

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
    rng = self.make_rng("dropout") if self.rate > 0.0 and self.has_rng("dropout") else None
    query = split_heads(query, self.heads)
    if self.is_mutable_collection("intermediates"):
      out = self._observed(query, key, value, mask)
    else:
      out = attention(query, key, value, mask, self.rate, rng, self.kernels)
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
