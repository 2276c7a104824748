"""The skip-connected fusion encoder (paper section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp

from mplug_jax.models import layers
from mplug_jax.models.bert import BertConfig, BertLayer, LanguageModelHead, Memory
from mplug_jax.parallel.rules import constrain


def connected_layers(depth, stride, rule):
  """Indices j (from 0) of the layers that attend over image and text together.

  Args:
    rule: "released": j > 0 and j % stride == 0, as the released code (docs/official.md item 2); "paper": with i = j + 1,
      i % (stride + 1) == 0, as the paper's Algorithm 1. With 6 layers both give none at stride 6 and j = 3 at stride 3.
  """
  rules = {
    "released": lambda j: j > 0 and j % stride == 0,
    "paper": lambda j: (j + 1) % (stride + 1) == 0,
  }
  if rule not in rules:
    raise ValueError(f"config.model.fusion={rule!r} is not one of {', '.join(rules)}.")
  return tuple(j for j in range(depth) if rules[rule](j))


class FusionEncoder(nn.Module):
  """Text attends to the image (asymmetric layers); every `stride` layers both attend to both (connected layers).

  Only the layers that run exist, and a connected layer has no cross-attention (docs/official.md item 4).
  """

  config: BertConfig
  depth: int
  stride: int
  rule: str = "released"

  def setup(self):
    layer = layers.remat(BertLayer, self.config.remat)
    self.connected = connected_layers(self.depth, self.stride, self.rule)
    self.layer = [layer(self.config, cross=j not in self.connected) for j in range(self.depth)]
    self.second = [
      layer(self.config, cross=j not in self.connected) for j in range(self.depth)
    ]  # of `pair` alone
    self.mlm_head = MaskedLanguageModelHead(self.config)

  def __call__(self, text, mask, image, keys_values=()):
    """text: f[B * Q, L, D]; mask: bool[B * Q, L]; image: f[B, N, D] -> (image f[B or B * Q, N, D], text f[B * Q, L, D]).

    Q texts share an image. The image comes back with a row per text once a connected layer has mixed them, and
    unchanged when there is none. `keys_values` of `image_keys_values` are not computed again; with those of every layer
    `image` may be None.
    """
    for j, layer in enumerate(self.layer):
      if j in self.connected:
        image, text = self._connect(layer, image, text, mask)
      else:
        text, _ = layer(
          text,
          mask[:, None, None, :],
          keys_values[j] if j < len(keys_values) else Memory((image,), (None,)),
        )
    return image, text

  def image_keys_values(self, image):
    """What the layers before the first connected one read of an image, whatever the text: f[B, N, D] -> a (key, value) pair a
    layer, both dtype[B, H, N, Dh]."""
    alone = min(self.connected, default=self.depth)
    return tuple(layer.cross_keys_values(Memory((image,), (None,))) for layer in self.layer[:alone])

  def _connect(self, layer, image, text, mask):
    """A connected layer: image f[B, N, D], text f[B * Q, L, D] -> both, with B * Q rows."""
    tokens = image.shape[1]
    if image.shape[0] != text.shape[0]:
      image = jnp.repeat(image, text.shape[0] // image.shape[0], axis=0)
    joint_mask = jnp.concatenate([jnp.ones(image.shape[:2], bool), mask], axis=1)
    joint, _ = layer(
      constrain(jnp.concatenate([image, text], axis=1)), joint_mask[:, None, None, :]
    )
    # The released code adds the layer's output to the image stream and normalizes no more (docs/official.md item 3).
    image = image + joint[:, :tokens] if self.rule == "released" else joint[:, :tokens]
    return image, joint[:, tokens:]

  def pair(self, text, mask, first, second):
    """Every layer twice in a row, for the first and for the second image, as ALBEF for NLVR2.

    A layer and its second share the projections to keys and values alone; a connected layer has none to share.

    Args:
      text: f[B * Q, L, D]. mask: bool[B * Q, L]. first, second: images f[B, N, D].

    Returns:
      Text f[B * Q, L, D].
    """
    own = mask[:, None, None, :]
    for j, layer in enumerate(self.layer):
      if j in self.connected:
        first, text = self._connect(layer, first, text, mask)
        second, text = self._connect(self.second[j], second, text, mask)
      else:
        text, _ = layer(text, own, Memory((first,), (None,)))
        text, _ = self.second[j](text, own, layer.cross_keys_values(Memory((second,), (None,))))
    return text

  def mlm_logits(self, text, labels=None):
    """f[B, L, D] -> f32[B, L, V]: masked language modelling over the fused text; labels: see LanguageModelHead."""
    return self.mlm_head(text, labels)


class MaskedLanguageModelHead(nn.Module):
  """Language model head with a word table of its own, as the fusion encoder's in pre-training: see LanguageModelHead."""

  config: BertConfig

  @nn.compact
  def __call__(self, x, labels=None):
    c = self.config
    table = nn.Embed(
      c.vocab_size, c.hidden_size, embedding_init=c.kernel_init, name="word"
    ).embedding
    return LanguageModelHead(c, name="head")(x, table, labels)
