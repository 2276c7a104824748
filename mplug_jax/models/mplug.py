"""mPLUG: the image encoder, text encoder, fusion encoder and text decoder, and the heads of every task.

Shapes: B images, Q texts about each (usually 1), N image tokens, L text tokens, D hidden size, V vocabulary.
Parameters appear only for the methods that a task calls when it initialises.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.models import layers
from mplug_jax.models.bert import BertConfig, Memory, TextDecoder, TextEncoder
from mplug_jax.models.fusion import FusionEncoder
from mplug_jax.models.vit import VisionTransformer


class Scalar(nn.Module):
  """One learned number f32[], a module so that it exists only for the tasks that use it."""

  initial: float

  @nn.compact
  def __call__(self):
    return self.param("value", nn.initializers.constant(self.initial), ())


class ClassificationHead(nn.Module, kw_only=True):
  """Two-layer head of SNLI-VE and NLVR2: f[B, F] -> f32[B, C]."""

  width: int
  classes: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    x = nn.relu(layers.Dense(self.width, dtype=self.dtype, name="dense")(x))
    return layers.Dense(self.classes, dtype=self.dtype, name="out")(x).astype(jnp.float32)


class MPlug(nn.Module, kw_only=True):
  """The model. Geometry as in presets.PRESETS; `stride` and `fusion` choose the connected layers of the fusion encoder."""

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
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention_impl: str = "auto"  # or "reference", see ops/attention
  # Positions whose logits over the vocabulary exist at a time in a loss; 0: all.
  loss_chunk: int = 0

  def setup(self):
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
    )
    self.visn_fc = bert.dense(self.hidden_size)
    self.visn_layer_norm = bert.norm()
    self.visn_dropout = layers.Dropout(self.dropout_rate)
    self.text_encoder = TextEncoder(bert, self.text_layers)
    self.fusion_encoder = FusionEncoder(bert, self.fusion_layers, self.stride, self.fusion)
    self.text_decoder = TextDecoder(bert, self.decoder_layers)
    self.vision_proj = bert.dense(self.embed_dim)
    self.text_proj = bert.dense(self.embed_dim)
    self.itm_head = bert.dense(2)
    self.cls_head = ClassificationHead(
      width=self.hidden_size, classes=self.classes, dtype=self.dtype
    )
    self.temp = Scalar(self.temperature)

  def encode_image(self, image):
    """Normalised f32[B, S, S, 3] -> dtype[B, 1 + N, D]; projected to the text width where the two differ."""
    x = self.visual_encoder(image)
    if self.vision_width == self.hidden_size:
      return x
    return self.visn_dropout(self.visn_layer_norm(self.visn_fc(x)))

  def encode_text(self, ids, mask):
    """i32[B, L], bool[B, L] (True = token) -> dtype[B, L, D]."""
    return self.text_encoder(ids, mask)

  def fuse(self, text, mask, image):
    """text: f[B * Q, L, D]; mask: bool[B * Q, L]; image: f[B, N, D] -> (image, text), see FusionEncoder."""
    return self.fusion_encoder(text, mask, image)

  def fuse_images(self, text, mask, image, count):
    """Texts about `count` = N images each -> what `class_logits` reads.

    Pairing "shared": the text is fused with every image by the same layers, and the first tokens lie side by side (F = N D).
    "duplicated": one pass, every layer twice for two images, see FusionEncoder.pair (F = D).

    Args:
      text: f[B * Q, L, D]. mask: bool[B * Q, L]. image: f[B * N, S, D], N one after the other for every Q texts.

    Returns:
      f[B * Q, F].
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

  def memory(self, image, text=None, mask=None):
    """What the decoder reads: image tokens, then fused text tokens (captioning: image tokens alone) -> Memory."""
    return Memory((image,), (None,)) if text is None else Memory((image, text), (None, mask))

  def decode(self, ids, mask, memory):
    """Teacher forcing. i32[R, T], bool[R, T], Memory of M rows (R = M * answers) -> f32[R, T, V]."""
    return self.text_decoder(ids, mask, memory)

  def decode_losses(self, ids, mask, memory, labels):
    """As `decode`, with labels i32[R, T] -> (losses f32[R, T], right bool[R, T]), see losses.vocabulary_losses."""
    return self.text_decoder(ids, mask, memory, labels)

  def init_cache(self, memory, beams, length):
    """Cache for decoding `length` positions of `beams` sequences per memory row, see TextDecoder.init_cache."""
    return self.text_decoder.init_cache(memory, beams, length)

  def decode_step(self, tokens, position, cache):
    """tokens: i32[M, K] at `position` i32[] -> (f32[M, K, V] logits of the next position, cache)."""
    return self.text_decoder.step(tokens, position, cache)

  def contrastive_features(self, image, text):
    """Image and text tokens f[B, N, D], f[B, L, D] (either may be None) -> unit vectors f32[B, E] of their first tokens."""

    def unit(x):
      x = x.astype(jnp.float32)
      return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return (
      None if image is None else unit(self.vision_proj(image[:, 0])),
      None if text is None else unit(self.text_proj(text[:, 0])),
    )

  def match_logits(self, text):
    """Fused text f[B, L, D] -> f32[B, 2]; class 1 = the text describes the image."""
    return self.itm_head(text[:, 0]).astype(jnp.float32)

  def mlm_logits(self, text):
    """Fused text f[B, L, D] -> f32[B, L, V]."""
    return self.fusion_encoder.mlm_logits(text)

  def mlm_losses(self, text, labels):
    """Fused text f[B, L, D], i32[B, L] -> (losses f32[B, L], right bool[B, L])."""
    return self.fusion_encoder.mlm_logits(text, labels)

  def class_logits(self, features):
    """f[B, F] -> f32[B, classes]."""
    return self.cls_head(features)

  def contrastive_temperature(self):
    """f32[]: similarities are divided by it."""
    return self.temp()


def decoding_fns(model, params):
  """(step_fn, reorder_fn) for mplug_jax.decoding.beam_search over the cache of `MPlug.init_cache`."""

  def step(cache, tokens, position):
    return model.apply({"params": params}, tokens, position, cache, method=MPlug.decode_step)

  def reorder(cache, parents):
    index = parents[:, :, None, None, None]
    moved = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), cache["self"])
    return cache | {"self": moved}

  return step, reorder
