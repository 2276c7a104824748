"""The skip-connected fusion encoder (paper section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mplug_jax.arrays import Array
from mplug_jax.models import layers
from mplug_jax.models.bert import (
  BertConfig,
  BertLayer,
  LanguageModelHead,
  LogitsOrLosses,
  Memory,
)
from mplug_jax.parallel.rules import constrain


def connected_layers(depth: int, stride: int, rule: str) -> tuple[int, ...]:
  """Returns the indices j (from 0) of the layers that attend over image and text together.

  Args:
    depth: number of layers.
    stride: distance of connected layers.
    rule: "released": j > 0 and j % stride == 0, as the released code (docs/official.md item 2);
      "paper": with i = j + 1, i % (stride + 1) == 0, as the paper's Algorithm 1. With 6 layers both
      give none at stride 6 and j = 3 at stride 3.

  Raises:
    ValueError: the rule is unknown.
  """
  rules = {
    "released": lambda j: j > 0 and j % stride == 0,
    "paper": lambda j: (j + 1) % (stride + 1) == 0,
  }
  if rule not in rules:
    raise ValueError(f"config.model.fusion={rule!r} is not one of {', '.join(rules)}.")
  return tuple(j for j in range(depth) if rules[rule](j))


class FusionEncoder(nn.Module, kw_only=True):
  """Asymmetric layers, where text attends to the image, and connected layers over both.

  Every `stride`-th layer is connected, see `connected_layers`. Only the layers that run exist, and
  a connected layer has no cross-attention (docs/official.md item 4).
  """

  config: BertConfig
  depth: int
  stride: int
  rule: str = "released"

  def setup(self) -> None:
    """Creates the layers."""
    layer = layers.remat(BertLayer, self.config.remat)
    self.connected = connected_layers(self.depth, self.stride, self.rule)

    def stack():
      return [layer(config=self.config, cross=j not in self.connected) for j in range(self.depth)]

    self.layer = stack()
    self.second = stack()  # used only by `pair`
    self.mlm_head = MaskedLanguageModelHead(config=self.config)

  def __call__(
    self,
    text: Float[Array, "texts length width"],
    mask: Bool[Array, "texts length"],
    image: Float[Array, "images tokens width"] | None,
    keys_values: tuple = (),
  ) -> tuple[Float[Array, "rows tokens width"] | None, Float[Array, "texts length width"]]:
    """Returns (image, text).

    Q texts share an image. The image has a row per text after a connected layer, and is unchanged
    when there is none.

    Args:
      text: B * Q texts.
      mask: True for tokens.
      image: B images; None only with the keys and values of every layer.
      keys_values: result of `image_keys_values`, which is not computed again.
    """
    for j, layer in enumerate(self.layer):
      if j in self.connected:
        image, text = self._connect(layer, image, text, mask)
      else:
        text, _ = layer(
          text,
          mask,
          keys_values[j] if j < len(keys_values) else Memory((image,), (None,)),
        )
    return image, text

  def image_keys_values(self, image: Float[Array, "images tokens width"]) -> tuple:
    """Returns the image's (key, value) of every layer before the first connected one.

    They do not depend on the text. Both are dtype[B, N, D].
    """
    alone = min(self.connected, default=self.depth)
    return tuple(layer.cross_keys_values(Memory((image,), (None,))) for layer in self.layer[:alone])

  def _connect(self, layer, image, text, mask):
    """A connected layer: image f[B, N, D], text f[B * Q, L, D] -> both, with B * Q rows."""
    tokens = image.shape[1]
    if image.shape[0] != text.shape[0]:
      image = jnp.repeat(image, text.shape[0] // image.shape[0], axis=0)
    joint_mask = jnp.concatenate([jnp.ones(image.shape[:2], bool), mask], axis=1)
    joint, _ = layer(constrain(jnp.concatenate([image, text], axis=1)), joint_mask)
    # The released code adds the layer's output to the image stream and does not normalize the sum
    # (docs/official.md item 3).
    image = image + joint[:, :tokens] if self.rule == "released" else joint[:, :tokens]
    return image, joint[:, tokens:]

  def pair(
    self,
    text: Float[Array, "texts length width"],
    mask: Bool[Array, "texts length"],
    first: Float[Array, "images tokens width"],
    second: Float[Array, "images tokens width"],
  ) -> Float[Array, "texts length width"]:
    """Returns the text after every layer was applied twice, to two images, as ALBEF for NLVR2.

    A layer and its copy share only the projections to keys and values; a connected layer has none.

    Args:
      text: B * Q texts.
      mask: True for tokens.
      first: first image of each row.
      second: second image of each row.
    """
    for j, layer in enumerate(self.layer):
      if j in self.connected:
        first, text = self._connect(layer, first, text, mask)
        second, text = self._connect(self.second[j], second, text, mask)
      else:
        text, _ = layer(text, mask, Memory((first,), (None,)))
        text, _ = self.second[j](text, mask, layer.cross_keys_values(Memory((second,), (None,))))
    return text

  def mlm_logits(
    self,
    text: Float[Array, "texts length width"],
    labels: Int[Array, "texts length"] | None = None,
  ) -> LogitsOrLosses:
    """Returns masked language modeling logits over the fused text, or losses with `labels`."""
    return self.mlm_head(text, labels)


class MaskedLanguageModelHead(nn.Module, kw_only=True):
  """Language model head with its own word table, for pre-training."""

  config: BertConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "rows length width"], labels: Int[Array, "rows length"] | None = None
  ) -> LogitsOrLosses:
    """Returns logits, or losses with `labels`, see LanguageModelHead."""
    c = self.config
    table = nn.Embed(
      c.vocab_size, c.hidden_size, embedding_init=c.kernel_init, name="word"
    ).embedding
    return LanguageModelHead(config=c, name="head")(x, table, labels)
