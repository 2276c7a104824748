"""Formulas for the operations of the model's matrix products, to test the traced counts against.

An operation count is 2 x multiply-adds of the products that the code computes: with parameters, and
of queries with keys and probabilities with values, masked or not. Elementwise work (softmax, norms,
GELU, dropout, optimizer) and recomputation by rematerialization are left out.

`model` is an `MPlug`, of which only the fields are read. A `memory` is ((rows, tokens), ...), the
segments that cross-attention reads: an image's keys and values are computed once, however many
texts share it.
"""

from mplug_jax.models.fusion import connected_layers


def linear(tokens, inputs, outputs):
  """[tokens, inputs] x [inputs, outputs]."""
  return 2 * tokens * inputs * outputs


def attention(queries, keys, width):
  """Scores and weighted sums of all heads: `queries` of all rows, each over `keys` of its row."""
  return 2 * linear(queries, width, keys)


def transformer_layer(tokens, length, width, mlp_dim):
  """Self-attention (four projections) and feed-forward of all `tokens`, in rows of `length`."""
  return (
    4 * linear(tokens, width, width)
    + attention(tokens, length, width)
    + 2 * linear(tokens, width, mlp_dim)
  )


def image_tokens(model):
  """Patches of an image, and the class token."""
  return (model.image_size // model.patch_size) ** 2 + 1


def patch_embedding(model, images):
  """The first product, whose input needs no gradient."""
  return linear(images * (image_tokens(model) - 1), 3 * model.patch_size**2, model.vision_width)


def image_encoder(model, images):
  """ViT, and the projection to the text width where the two differ."""
  length, width = image_tokens(model), model.vision_width
  layers = model.vision_layers * transformer_layer(images * length, length, width, 4 * width)
  projection = (
    linear(images * length, width, model.hidden_size) if width != model.hidden_size else 0
  )
  return patch_embedding(model, images) + layers + projection


def text_encoder(model, texts, length):
  """All layers over `texts` rows of `length` tokens."""
  return model.text_layers * transformer_layer(
    texts * length, length, model.hidden_size, model.mlp_dim
  )


def keys_values(model, memory):
  """Cross-attention keys and values of one layer: two products for every token of every segment."""
  return sum(
    2 * linear(rows * tokens, model.hidden_size, model.hidden_size) for rows, tokens in memory
  )


def crossing_layer(model, tokens, length, memory):
  """A layer of all `tokens` with cross-attention, without `keys_values`, in rows of `length`."""
  width = model.hidden_size
  read = 2 * linear(tokens, width, width) + attention(
    tokens, sum(part[1] for part in memory), width
  )
  return transformer_layer(tokens, length, width, model.mlp_dim) + read


def asymmetric_layer(model, images, texts, length):
  """Fusion layer in which `texts` rows of `length` tokens read `images` rows of image tokens."""
  memory = ((images, image_tokens(model)),)
  return crossing_layer(model, texts * length, length, memory) + keys_values(model, memory)


def connected_layer(model, texts, length):
  """Fusion layer over image and text tokens together, one row per text."""
  joint = image_tokens(model) + length
  return transformer_layer(texts * joint, joint, model.hidden_size, model.mlp_dim)


def co_attention_layer(model, rows, length):
  """Image and text as two streams, each a layer that reads the other: `rows` pairs."""
  tokens = image_tokens(model)
  image, text = ((rows, tokens),), ((rows, length),)
  streams = crossing_layer(model, rows * length, length, image) + crossing_layer(
    model, rows * tokens, tokens, text
  )
  return streams + keys_values(model, image) + keys_values(model, text)


def fusion_encoder(model, images, texts, length):
  """All fusion layers.

  From the first connected layer on, there is a row of image tokens per text.
  """
  connected = connected_layers(model.fusion_layers, model.stride, model.fusion)
  total = 0
  for layer in range(model.fusion_layers):
    if layer in connected:
      images = texts
      total += connected_layer(model, texts, length)
    else:
      total += asymmetric_layer(model, images, texts, length)
  return total


def language_model_head(model, tokens):
  """Dense layer and the product with the word table."""
  return linear(tokens, model.hidden_size, model.hidden_size) + linear(
    tokens, model.hidden_size, model.vocab_size
  )


def decoder(model, rows, length, memory):
  """Teacher forcing of `rows` sequences of `length` tokens, logits at every position."""
  tokens = rows * length
  layer = crossing_layer(model, tokens, length, memory) + keys_values(model, memory)
  return model.decoder_layers * layer + language_model_head(model, tokens)


def vqa_memory(model, images, texts, length):
  """Image and question as the decoder reads them; `fusion_encoder` explains the image rows."""
  mixed = connected_layers(model.fusion_layers, model.stride, model.fusion)
  return ((texts if mixed else images, image_tokens(model)), (texts, length))


def vqa_encode(model, images, questions, length):
  """Image encoder, text encoder and fusion of `questions` of `length` tokens about each image."""
  texts = images * questions
  return (
    image_encoder(model, images)
    + text_encoder(model, texts, length)
    + fusion_encoder(model, images, texts, length)
  )


def vqa_forward(model, images, questions, length, answers, answer_length):
  """Logits of `answers` to each of the `questions` about each image."""
  texts = images * questions
  memory = vqa_memory(model, images, texts, length)
  return vqa_encode(model, images, questions, length) + decoder(
    model, texts * answers, answer_length, memory
  )


def vqa_train_step(model, images, questions, length, answers, answer_length):
  """Forward and backward: every product has two gradients, the patch embedding one."""
  return 3 * vqa_forward(
    model, images, questions, length, answers, answer_length
  ) - patch_embedding(model, images)


def beam_generation(model, memory, beams, steps, cache_length):
  """Incremental decoding of `steps` tokens in `beams` beams per memory row.

  Keys and values of the memory are computed once; self-attention reads the whole cache of
  `cache_length` positions of all beams.
  """
  tokens = beams * max(rows for rows, _ in memory)
  step = model.decoder_layers * crossing_layer(
    model, tokens, beams * cache_length, memory
  ) + language_model_head(model, tokens)
  return model.decoder_layers * keys_values(model, memory) + steps * step


def captioning(model, images, beams, steps):
  """Image encoder and beam generation with a cache for the caption and its first token."""
  return image_encoder(model, images) + beam_generation(
    model, ((images, image_tokens(model)),), beams, steps, steps + 1
  )
