"""mPLUG: image encoder, text encoder, fusion encoder, text decoder, and the heads of every task.

A batch has B images and `texts` = B * Q texts, Q about each image (usually 1). Parameters exist
only for the methods that a task calls when it initializes.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from mplug_jax.arrays import Array
from mplug_jax.models import layers
from mplug_jax.models.bert import BertConfig, Memory, TextEncoder
from mplug_jax.models.fusion import FusionEncoder
from mplug_jax.models.text_decoder import TextDecoder
from mplug_jax.models.vit import VisionTransformer


class Scalar(nn.Module, kw_only=True):
  """One learned number f32[], a module so that it exists only for the tasks that use it."""

  initial: float

  @nn.compact
  def __call__(self) -> Float[Array, ""]:
    """Returns the number."""
    return self.param("value", nn.initializers.constant(self.initial), ())


class ClassificationHead(nn.Module, kw_only=True):
  """Two-layer head of SNLI-VE and NLVR2."""

  width: int
  classes: int
  dtype: Dtype
  ops: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """Returns float32 logits."""
    dense = functools.partial(layers.Dense, dtype=self.dtype, ops=self.ops)
    x = nn.relu(dense(features=self.width, name="dense")(x))
    return dense(features=self.classes, name="out")(x).astype(jnp.float32)


class MPlug(nn.Module, kw_only=True):
  """The model.

  The geometry is one of config.presets.PRESETS; `stride` and `fusion` choose the connected layers
  of the fusion encoder.
  """

  image_size: int
  patch_size: int
  vision_width: int
  vision_layers: int
  vocab_size: int
  hidden_size: int
  heads: int
  mlp_dim: int
  max_positions: int
  text_layers: int
  fusion_layers: int
  stride: int
  decoder_layers: int
  pad_id: int
  vision_heads: int = 0  # 0 = heads of width 64, as CLIP
  fusion: str = "released"
  pairing: str = "shared"  # how a text is fused with several images, see `fuse_images`
  embed_dim: int = 256
  classes: int = 2
  temperature: float = 0.07
  dropout_rate: float = 0.1
  attention_dropout_rate: float = 0.1
  vision_attention_dropout_rate: float = 0.1
  initializer_range: float = 0.02
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention_impl: str = "auto"  # or "reference", see ops/attention
  ops: str = "auto"  # or "reference", see ops/table.py
  # Positions whose logits over the vocabulary exist at a time in a loss; 0: all.
  loss_chunk: int = 0

  def setup(self) -> None:
    """Creates the parts."""
    bert = BertConfig(
      vocab_size=self.vocab_size,
      hidden_size=self.hidden_size,
      heads=self.heads,
      mlp_dim=self.mlp_dim,
      max_positions=self.max_positions,
      pad_id=self.pad_id,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      initializer_range=self.initializer_range,
      dtype=self.dtype,
      remat=self.remat,
      attention_impl=self.attention_impl,
      ops=self.ops,
      loss_chunk=self.loss_chunk,
    )
    self.visual_encoder = VisionTransformer(
      image_size=self.image_size,
      patch_size=self.patch_size,
      width=self.vision_width,
      depth=self.vision_layers,
      heads=self.vision_heads or self.vision_width // 64,
      attention_dropout_rate=self.vision_attention_dropout_rate,
      dtype=self.dtype,
      remat=self.remat,
      attention_impl=self.attention_impl,
      ops=self.ops,
    )
    self.visn_fc = bert.dense(self.hidden_size)
    self.visn_layer_norm = bert.norm()
    self.visn_dropout = bert.dropout()
    self.text_encoder = TextEncoder(config=bert, depth=self.text_layers)
    self.fusion_encoder = FusionEncoder(
      config=bert, depth=self.fusion_layers, stride=self.stride, rule=self.fusion
    )
    self.text_decoder = TextDecoder(config=bert, depth=self.decoder_layers)
    self.vision_proj = bert.dense(self.embed_dim)
    self.text_proj = bert.dense(self.embed_dim)
    self.itm_head = bert.dense(2)
    self.cls_head = ClassificationHead(
      width=self.hidden_size, classes=self.classes, dtype=self.dtype, ops=self.ops
    )
    self.temp = Scalar(initial=self.temperature)

  def encode_image(
    self, image: Float[Array, "images height width 3"]
  ) -> Float[Array, "images tokens channels"]:
    """Returns tokens of normalized images, projected to the text width where it differs."""
    x = self.visual_encoder(image)
    if self.vision_width == self.hidden_size:
      return x
    return self.visn_dropout(self.visn_layer_norm(self.visn_fc(x)))

  def encode_text(
    self, ids: Int[Array, "texts length"], mask: Bool[Array, "texts length"]
  ) -> Float[Array, "texts length hidden"]:
    """Returns text tokens; the mask is True for tokens, False for padding."""
    return self.text_encoder(ids, mask)

  def fuse(
    self,
    text: Float[Array, "texts length hidden"],
    mask: Bool[Array, "texts length"],
    image: Float[Array, "images tokens hidden"],
  ) -> tuple[Float[Array, "rows tokens hidden"], Float[Array, "texts length hidden"]]:
    """Returns (image, text) after the fusion encoder, see FusionEncoder."""
    fused_image, fused_text = self.fusion_encoder(text, mask, image)
    assert fused_image is not None  # it is None only when `image` is
    return fused_image, fused_text

  def fuse_images(
    self,
    text: Float[Array, "texts length hidden"],
    mask: Bool[Array, "texts length"],
    image: Float[Array, "images tokens hidden"],
    count: int,
  ) -> Float[Array, "texts features"]:
    """Returns the features of `class_logits` for texts about `count` images each.

    Pairing "shared": the same layers fuse the text with every image, and the first tokens are
    concatenated (count * hidden features). "duplicated": one pass, every layer twice for two
    images, see FusionEncoder.pair (hidden features).

    Args:
      text: text tokens.
      mask: True for tokens.
      image: image tokens, `count` consecutive images for every Q texts.
      count: number of images of a text.
    """
    rows = image.shape[0] // count
    if self.pairing == "duplicated":
      first, second = image.reshape((rows, count) + image.shape[1:]).swapaxes(0, 1)
      return self.fusion_encoder.pair(text, mask, first, second)[:, 0]

    def for_every_image(x):  # [B * Q, ...] -> [B * N * Q, ...]
      x = x.reshape((rows, -1) + x.shape[1:])
      return jnp.repeat(x, count, axis=0).reshape((-1,) + x.shape[2:])

    _, fused = self.fuse(for_every_image(text), for_every_image(mask), image)
    return (
      fused[:, 0]
      .reshape(rows, count, -1, fused.shape[-1])
      .swapaxes(1, 2)
      .reshape(text.shape[0], -1)
    )

  def memory(
    self,
    image: Float[Array, "images tokens hidden"],
    text: Float[Array, "texts length hidden"] | None = None,
    mask: Bool[Array, "texts length"] | None = None,
  ) -> Memory:
    """Returns the decoder's memory: image tokens, then fused text tokens (captioning: no text)."""
    return Memory((image,), (None,)) if text is None else Memory((image, text), (None, mask))

  def decode(
    self, ids: Int[Array, "rows length"], mask: Bool[Array, "rows length"], memory: Memory
  ) -> Float[Array, "rows length vocabulary"]:
    """Returns logits under teacher forcing; rows = memory rows * answers."""
    return self.text_decoder(ids, mask, memory)

  def decode_losses(
    self,
    ids: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"],
    memory: Memory,
    labels: Int[Array, "rows length"],
  ) -> tuple[Float[Array, "rows length"], Bool[Array, "rows length"]]:
    """Returns (losses, label is the most probable word), see `vocabulary_losses`."""
    return self.text_decoder(ids, mask, memory, labels)

  def init_cache(self, memory: Memory, beams: int, length: int) -> dict[str, Any]:
    """Returns the cache for `length` positions of `beams` sequences per memory row.

    See TextDecoder.init_cache.
    """
    return self.text_decoder.init_cache(memory, beams, length)

  def decode_step(
    self, tokens: Int[Array, "rows beams"], position: Int[Array, ""], cache: dict[str, Any]
  ) -> tuple[Float[Array, "rows beams vocabulary"], dict[str, Any]]:
    """Returns (logits of the next position, cache) for the tokens at `position`."""
    return self.text_decoder.step(tokens, position, cache)

  def contrastive_features(
    self,
    image: Float[Array, "images tokens hidden"] | None,
    text: Float[Array, "texts length hidden"] | None,
  ) -> tuple[Float[Array, "images width"] | None, Float[Array, "texts width"] | None]:
    """Returns float32 unit vectors of the first tokens of images and of texts."""

    def unit(x):
      x = x.astype(jnp.float32)
      return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return (
      None if image is None else unit(self.vision_proj(image[:, 0])),
      None if text is None else unit(self.text_proj(text[:, 0])),
    )

  def match_logits(self, text: Float[Array, "texts length hidden"]) -> Float[Array, "texts 2"]:
    """Returns float32 logits of fused texts; class 1 = the text describes the image."""
    return self.itm_head(text[:, 0]).astype(jnp.float32)

  def mlm_logits(
    self, text: Float[Array, "texts length hidden"]
  ) -> Float[Array, "texts length vocabulary"]:
    """Returns masked language modeling logits of fused texts, float32."""
    return self.fusion_encoder.mlm_logits(text)

  def mlm_losses(
    self, text: Float[Array, "texts length hidden"], labels: Int[Array, "texts length"]
  ) -> tuple[Float[Array, "texts length"], Bool[Array, "texts length"]]:
    """Returns (losses, label is the most probable word) of fused texts."""
    return self.fusion_encoder.mlm_logits(text, labels)

  def class_logits(self, features: Float[Array, "texts features"]) -> Float[Array, "texts classes"]:
    """Returns float32 logits of the classes."""
    return self.cls_head(features)

  def contrastive_temperature(self) -> Float[Array, ""]:
    """Returns the number by which similarities are divided."""
    return self.temp()


def decoding_fns(model: MPlug, params: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns (step_fn, reorder_fn) of mplug_jax.decoding over the cache of `MPlug.init_cache`."""

  def step(cache, tokens, position):
    return model.apply({"params": params}, tokens, position, cache, method=MPlug.decode_step)

  def reorder(cache, parents):
    moved = jnp.take_along_axis(cache["writers"], parents[:, :, None], axis=1)
    return cache | {"writers": moved}

  return step, reorder
