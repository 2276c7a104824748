"""CLIP's Vision Transformer in mPLUG: all tokens after the last layer norm, no projection."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from mplug_jax.arrays import Array
from mplug_jax.models import layers
from mplug_jax.ops import activations, table
from mplug_jax.parallel.rules import constrain


class Mlp(nn.Module, kw_only=True):
  """Linear -> QuickGELU -> linear."""

  width: int
  depth: int
  dtype: Dtype
  ops: str

  @nn.compact
  def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
    """Returns the output in `dtype`."""
    normal = table.get(self.ops).normal
    x = layers.Dense(
      features=4 * self.width,
      dtype=self.dtype,
      kernel_init=normal((2 * self.width) ** -0.5),
      ops=self.ops,
      name="up",
    )(x)
    return layers.ActivationThenDense(
      features=self.width,
      dtype=self.dtype,
      kernel_init=normal(self.width**-0.5 * (2 * self.depth) ** -0.5),
      activation=activations.quick_gelu,
      ops=self.ops,
      name="down",
    )(x)


class Block(nn.Module, kw_only=True):
  """Pre-norm residual block, a body for `nn.scan`.

  The released code drops attention probabilities here, OpenAI's CLIP does not (docs/official.md
  item 43).
  """

  width: int
  heads: int
  depth: int
  attention_dropout_rate: float
  dtype: Dtype
  attention_impl: str
  ops: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "batch tokens width"]
  ) -> tuple[Float[Array, "batch tokens width"], None]:
    """Returns (output in `dtype`, None)."""
    scale = self.width**-0.5
    normal = table.get(self.ops).normal
    norm = functools.partial(layers.LayerNorm, epsilon=1e-5, dtype=self.dtype, ops=self.ops)
    normed = norm(name="ln_1")(x)
    x = x + layers.Attention(
      width=self.width,
      heads=self.heads,
      dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      kernel_init=normal(scale),
      out_init=normal(scale * (2 * self.depth) ** -0.5),
      attention_impl=self.attention_impl,
      ops=self.ops,
      name="attention",
    )(normed)
    ln_2 = norm(name="ln_2")
    mlp = Mlp(width=self.width, depth=self.depth, dtype=self.dtype, ops=self.ops, name="mlp")

    def feed_forward(x):
      return x + mlp(ln_2(x))

    if self.has_rng("dropout"):  # in training
      return constrain(feed_forward(x)), None
    inner = 4 * self.width * x.shape[1] * x.dtype.itemsize
    return constrain(layers.by_parts(feed_forward, x, inner)), None


def patchify(
  image: Float[Array, "batch height width channels"], patch: int
) -> Float[Array, "batch patches pixels"]:
  """Returns the flattened patches, patches and their pixels row by row.

  Args:
    image: height and width are multiples of `patch`.
    patch: side of a patch in pixels.
  """
  batch, height, width, channels = image.shape
  x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


class VisionTransformer(nn.Module, kw_only=True):
  """Image encoder (Radford et al. 2021). `image_size` sets the rows of the position table."""

  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  attention_dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention_impl: str = "auto"
  ops: str = "auto"

  @nn.compact
  def __call__(
    self, image: Float[Array, "batch height width 3"]
  ) -> Float[Array, "batch tokens channels"]:
    """Returns the class token and the patch tokens in `dtype`.

    Args:
      image: normalized images of `image_size`.

    Raises:
      ValueError: the image has another size (a position table fits one size only), or the patch
        size does not divide it.
    """
    if image.shape[1:] != (self.image_size, self.image_size, 3):
      raise ValueError(
        f"The image encoder was built for images of shape ({self.image_size}, {self.image_size}, "
        f"3) and got {image.shape[1:]}; set config.model.image_size, or resize the images."
      )
    if self.image_size % self.patch_size:
      raise ValueError(
        f"config.model.image_size={self.image_size} is not a multiple of the patch size "
        f"{self.patch_size}."
      )
    # A product of flattened patches: the gradient of the equal 16 x 16 convolution takes 30 times
    # as long to compile.
    x = patchify(image.astype(self.dtype), self.patch_size)
    x = layers.Dense(
      features=self.width,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.lecun_normal(),
      ops=self.ops,
      name="patch_embed",
    )(x)
    scale = self.width**-0.5
    normal = table.get(self.ops).normal
    norm = functools.partial(layers.LayerNorm, epsilon=1e-5, dtype=self.dtype, ops=self.ops)
    token = self.param("class_embedding", normal(scale), (self.width,)).astype(self.dtype)
    # CLIP's scale, width**-0.5, is small against the patches of a bright image: with it a model
    # did not learn shapes.
    positions = self.param("position_embedding", normal(1.0), (x.shape[1] + 1, self.width))
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
    x = norm(name="ln_pre")(x + positions.astype(self.dtype))
    blocks = layers.scan(Block, self.depth, self.remat)
    x, _ = blocks(
      width=self.width,
      heads=self.heads,
      depth=self.depth,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      attention_impl=self.attention_impl,
      ops=self.ops,
      name="blocks",
    )(constrain(x))
    return norm(name="ln_post")(x)
