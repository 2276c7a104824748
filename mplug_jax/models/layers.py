"""Layers shared by the image encoder, the text encoder, the fusion encoder and the decoder.

Activations have the compute `dtype`; softmax, layer norm and logits are float32. Dropout is active
exactly when the caller passes a "dropout" rng to `apply`. The field `ops` of a module selects its
array operations, see ops/table.py.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from mplug_jax.arrays import Array
from mplug_jax.ops import table
from mplug_jax.ops.activations import Activation
from mplug_jax.ops.attention.common import masked_scores, may_attend, merge_heads, split_heads
from mplug_jax.ops.attention.reference import heads_forward
from mplug_jax.ops.initializers import normal
from mplug_jax.parallel import batches, mesh

_PRODUCT = "product with parameters"  # name of the output of every Dense

# Stacks up to this deep are unrolled: a loop copies the saved activations of a layer to a stack and
# back, a fifth of the train step on CPU and a third of the memory traffic on TPU. The deeper ones
# are unrolled on TPU and GPU only, where compilation may take twice as long for it.
UNROLLED_DEPTH = 4

_ON_CHIP = 32 * 2**20  # bytes of activations that XLA keeps in the memory on a TPU chip
_MOST_PARTS = 8  # the program grows with them


class Dropout(nn.Module, kw_only=True):
  """Dropout of activations, active when a "dropout" rng is given."""

  rate: float
  ops: str = "auto"

  def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `x` with dropout, in its dtype."""
    active = self.rate > 0.0 and self.has_rng("dropout")
    rng = self.make_rng("dropout") if active else None
    return table.get(self.ops).dropout(x, self.rate, rng)


def parameter(
  module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Float[Array, "*shape"]:
  """Returns `module.param(name, init, shape)`, but does not trace `init` for the shape of a value.

  That takes a twelfth of the time of tracing a small model's train step.

  Args:
    module: whose parameter it is.
    name: name in the module.
    init: (key, shape) -> value of a new parameter.
    shape: expected shape.

  Raises:
    flax.errors.ScopeParamShapeError: the parameter has another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape)
  value = module.get_variable("params", name)
  if value.shape != shape:
    raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
  return value


class Dense(nn.Module, kw_only=True):
  """Returns x @ kernel + bias in the compute dtype; parameters are float32."""

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  ops: str = "auto"

  def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
    """Returns the product in `dtype`."""
    return self._product(None, x)

  @nn.compact
  def _product(self, activation, x):
    kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    if self.use_bias:
      bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
    else:
      bias = jnp.zeros((self.features,))
    product = table.get(self.ops).linear(
      activation, x.astype(self.dtype), kernel.astype(self.dtype), bias.astype(self.dtype)
    )
    # Named for `remat`: the gradient rule hides the product from policies that look for one.
    return checkpoint_name(product, _PRODUCT)


class ActivationThenDense(Dense, kw_only=True):
  """Returns activation(x) @ kernel + bias: the second half of a feed-forward layer.

  Equal to `Dense()(activation(x))`, but keeps only x for the backward pass: in a loop over layers
  the widest activations of a model are stored once instead of twice.
  """

  activation: Activation

  def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
    """Returns the product in `dtype`."""
    return self._product(self.activation, x)


class LayerNorm(nn.Module, kw_only=True):
  """Layer normalization over the last axis, computed in float32."""

  epsilon: float
  dtype: Dtype = jnp.float32
  ops: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """Returns the normalized, scaled and shifted `x` in `dtype`."""
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    return table.get(self.ops).normalize(x, scale, bias, self.epsilon).astype(self.dtype)


def _latest(_: Any, new: Any) -> Any:
  return new


class Attention(nn.Module, kw_only=True):
  """Multi-head attention with separate query, key, value and output projections.

  Keys may come from fewer rows than queries: with M key rows and M * R query rows, consecutive
  groups of R query rows share one row of keys (R questions about an image, R answers to a
  question), whose keys and values are computed once.
  """

  width: int
  heads: int
  dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32
  kernel_init: Callable = normal(0.02)
  out_init: Callable | None = None  # default: kernel_init
  attention_impl: str = "auto"  # see ops.attention.attention
  ops: str = "auto"

  def setup(self) -> None:
    """Creates the four projections."""

    def dense(init):
      return Dense(features=self.width, dtype=self.dtype, kernel_init=init, ops=self.ops)

    self.query = dense(self.kernel_init)
    self.key = dense(self.kernel_init)
    self.value = dense(self.kernel_init)
    self.out = dense(self.out_init or self.kernel_init)

  def keys_values(
    self, x: Float[Array, "rows keys inputs"]
  ) -> tuple[Float[Array, "rows keys width"], Float[Array, "rows keys width"]]:
    """Returns (key, value) of the tokens that are attended to."""
    return self.key(x), self.value(x)

  def attend(
    self,
    x: Float[Array, "batch length inputs"],
    key: Float[Array, "rows keys width"],
    value: Float[Array, "rows keys width"],
    mask: Bool[Array, "rows keys"] | None = None,
    causal: bool = False,
  ) -> Float[Array, "batch length width"]:
    """Returns the attention of `x` over keys and values.

    Args:
      x: tokens that attend, M * R rows.
      key: keys of M rows.
      value: values of M rows.
      mask: True = may be attended to, or None for all.
      causal: whether token i attends to keys 0 to i only; R is 1.
    """
    rows, length, _ = x.shape
    query = self.query(x).reshape(key.shape[0], -1, self.width)  # [M, R * length, width]
    has_dropout = self.dropout_rate > 0.0 and self.has_rng("dropout")
    rng = self.make_rng("dropout") if has_dropout else None
    if self.is_mutable_collection("intermediates"):
      out = self._observed(query, key, value, mask, causal)
    else:
      attention = table.get(self.ops, self.attention_impl).attention
      out = attention(query, key, value, self.heads, mask, causal, self.dropout_rate, rng)
    return self.out(out).reshape(rows, length, self.width)

  def attend_cached(
    self,
    x: Float[Array, "batch length inputs"],
    key: Float[Array, "batch heads keys head_width"],
    value: Float[Array, "batch heads keys head_width"],
    allowed: Bool[Array, "..."] | None,
  ) -> Float[Array, "batch length width"]:
    """Returns the attention of a step of decoding.

    Args:
      x: tokens that attend.
      key: keys with split heads, the layout that a step reads without copies.
      value: values likewise.
      allowed: broadcastable to [batch, heads, length, keys], or None for all.
    """
    query = split_heads(self.query(x), self.heads)
    out, *_ = heads_forward(0.0, query, key, value, allowed, None)
    return self.out(merge_heads(out))

  def _observed(self, query, key, value, mask, causal):
    """Attention without dropout that records its probabilities, for attention maps.

    The probabilities, f32[B, H, L, S], are sown in "intermediates". The array in "perturbations"
    is added to them, so that a gradient with respect to it is the gradient of the probabilities.
    """
    allowed = may_attend(query.shape[1], key.shape[1], mask, causal)
    query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
    probabilities = jax.nn.softmax(masked_scores(query, key, allowed))
    self.sow(
      "intermediates",
      "probabilities",
      probabilities,
      init_fn=lambda: None,
      reduce_fn=_latest,
    )
    if self.has_variable("perturbations", "probabilities"):
      probabilities += self.get_variable("perturbations", "probabilities")
    out = jnp.einsum(
      "bhls,bhsd->bhld",
      probabilities.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
    )
    return merge_heads(out.astype(value.dtype))

  def __call__(
    self,
    x: Float[Array, "batch length inputs"],
    mask: Bool[Array, "batch length"] | None = None,
    causal: bool = False,
  ) -> Float[Array, "batch length width"]:
    """Returns the self-attention of `x`.

    Args:
      x: tokens.
      mask: True = may be attended to, or None for all.
      causal: whether token i attends to tokens 0 to i only.
    """
    return self.attend(x, *self.keys_values(x), mask, causal)


def by_parts(
  function: Callable[[Any], Any], x: Float[Array, "batch length width"], inner: int
) -> Float[Array, "batch length width"]:
  """Returns function(x), on TPU computed for a part of the rows after the other.

  A part is so small that its inner activations stay in the memory on the chip: a sixteenth of the
  memory traffic of captioning. Where gradients are computed, they are saved anyway.

  Args:
    function: function of rows, of which it changes each by itself.
    x: inputs.
    inner: bytes of the inner activations of a row.
  """
  rows = x.shape[0]
  if mesh.target()[0] != "tpu" or not isinstance(rows, int):
    return function(x)
  local = rows // batches.batch_split(rows)
  counts = (n for n in range(1, _MOST_PARTS + 1) if not local % n)
  count = next((n for n in counts if local // n * inner <= _ON_CHIP), 1)
  if count == 1:
    return function(x)
  parts = batches.split_rows(x, count, local // count)
  return batches.join_rows(jnp.stack([function(part) for part in parts]), local // count)


def remat(layer: type[nn.Module], policy: str, looped: bool = False) -> Any:
  """Returns the layer class with its activations recomputed in the backward pass.

  Args:
    layer: a Module class.
    policy: "none" keeps everything, "full" keeps only the layer's input, "dots" keeps the outputs
      of products with parameters.
    looped: the layer is the body of a loop. Outside of a loop a barrier must keep the compiler
      from finding the recomputed values equal to the first ones, and keeping those after all;
      XLA on CPU ignores it.

  Raises:
    ValueError: the policy is unknown.
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


def _unroll(depth: int, remat_policy: str) -> int:
  """Returns how many layers a turn of a loop over layers has."""
  platform, _ = mesh.target()
  unrolled = remat_policy == "none" and (depth <= UNROLLED_DEPTH or platform != "cpu")
  return depth if unrolled else 1


def scan(layer: type[nn.Module], depth: int, remat_policy: str = "none", broadcast: int = 0) -> Any:
  """Returns a stack of equal layers as one scanned module class.

  Its parameters have a leading axis [depth, ...].

  Args:
    layer: a Module class whose `__call__(carry, ...)` returns (carry, output).
    depth: number of layers.
    remat_policy: see `remat`.
    broadcast: number of arguments after the carry; every layer gets the same ones.
  """
  # "intermediates" and "perturbations" belong to Attention._observed.
  stacked: Any = {"params": 0, "intermediates": 0, "perturbations": 0}
  in_axes: Any = (nn.broadcast,) * broadcast
  return nn.scan(
    remat(layer, remat_policy, looped=True),
    variable_axes=stacked,
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=depth,
    unroll=_unroll(depth, remat_policy),
  )
