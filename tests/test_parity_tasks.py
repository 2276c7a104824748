"""The model under captioning, retrieval, grounding and video captioning, against recordings of the official code.

What the objectives add (queues, rewards, box weights) is not compared here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from mplug_jax import decode, losses, train_state
from mplug_jax.models.mplug import decoding_fns, MPlug


def files(task):
  return pytest.mark.parametrize("r", parity.recordings(task), ids=lambda path: path.stem, indirect=True)


@pytest.fixture
def r(request):
  return parity.Recording(request.param)


def ids_and_mask(r, name):
  return jnp.asarray(r[f"in/{name}_ids"], jnp.int32), jnp.asarray(r[f"in/{name}_mask"]) > 0


def mean_loss(logits, ids, mask, skip=0):
  """Mean over tokens, the first `skip` positions ignored as targets."""
  counted = mask[:, 1:] & (jnp.arange(1, ids.shape[1]) >= skip)
  return jnp.where(counted, losses.token_cross_entropy(logits[:, :-1], ids[:, 1:]), 0.0).sum() / counted.sum()


@files("caption")
def test_caption(r):
  """Logits and gradients of a decoder that reads image tokens alone; every beam search."""
  ids, mask = ids_and_mask(r, "caption")
  image = r.image()

  def logits_of(m, image):
    return m.decode(ids, mask, m.memory(m.encode_image(image)))

  parity.close(r.apply(r.params, lambda m, x: m.visual_encoder(x), image), r["out/visual"])
  embeds = r.apply(r.params, MPlug.encode_image, image)
  parity.close(embeds, r["out/image_embeds"])
  parity.close(r.apply(r.params, logits_of, image), r["out/decoder_logits"], 1e-4)
  loss, gradients = jax.jit(jax.value_and_grad(lambda params: mean_loss(r.apply(params, logits_of, image), ids, mask)))(r.params)
  assert abs(float(loss) - r["out/loss"]) <= 1e-4
  r.compare_gradients(gradients, "grad/loss/", "loss")
  parity.check_beams(r, r.model.memory(embeds), jnp.full((3, 1), 101, jnp.int32))


@files("videocap")
def test_video_caption(r):
  """Frames are encoded one by one and read in a row; beams go on from a prompt."""
  video, prompt = r.image("in/video"), jnp.asarray(r["in/prompt_ids"], jnp.int32)
  ids, mask = ids_and_mask(r, "caption")
  clips, frames = video.shape[:2]

  def encode(m, video):
    return m.encode_image(video.reshape((-1,) + video.shape[2:]))

  embeds = r.apply(r.params, encode, video)
  parity.close(embeds, r["out/frame_embeds"])
  embeds = embeds.reshape(clips, frames * embeds.shape[1], -1)
  parity.close(embeds, r["out/video_embeds"])
  logits = r.apply(r.params, lambda m, x: m.decode(ids, mask, m.memory(x)), embeds)
  parity.close(logits, r["out/decoder_logits"], 1e-4)
  assert abs(float(mean_loss(logits, ids, mask, r.meta["prompt_length"])) - r["out/loss"]) <= 1e-4
  parity.check_beams(r, r.model.memory(embeds), jnp.broadcast_to(prompt, (clips, len(prompt))))


def matching_logits(m, image, text, mask):
  fused = m.fuse(text, mask, image)[1]
  return fused, m.match_logits(fused)


@files("retrieval")
def test_retrieval(r):
  """Features of both encoders and of the teacher's, fusion and match logits of the recorded pairs, in three steps."""
  teacher = r.teacher
  for step in ("step1", "step2", "step3"):
    image = r.image(f"in/{step}/image")
    ids, mask = jnp.asarray(r[f"in/{step}/text_ids"], jnp.int32), jnp.asarray(r[f"in/{step}/text_mask"]) > 0

    def features(m, image, ids, mask):
      return m.contrastive_features(m.encode_image(image), m.encode_text(ids, mask))

    encoded = r.apply(r.params, parity.encode, image, ids, mask)
    names = {"visual": "visual", "image_embeds": "image_embeds", "text_embeds": "text_embeds",
             "fusion_image": "fusion_pos_image", "fusion_text": "fusion_pos_text"}
    for ours, recorded in names.items():
      parity.close(encoded[ours], r[f"out/{step}/{recorded}"], name=recorded)
    online = {name: r.params[name] for name in teacher}
    teacher = train_state.blend_ema(teacher, online, r.meta["momentum_used"], r"^(?!fusion_encoder)")
    for suffix, params in (("", r.params), ("_m", teacher)):
      for name, feature in zip(("image_feat", "text_feat"), r.apply(params, features, image, ids, mask)):
        parity.close(feature, r[f"out/{step}/{name}{suffix}"], name=name + suffix)

    images, texts = r[f"out/{step}/neg_image_index"], r[f"out/{step}/neg_text_index"]
    rows = np.arange(len(ids))
    image_rows, text_rows = np.concatenate([rows, images, rows]), np.concatenate([rows, rows, texts])
    fused, logits = r.apply(r.params, matching_logits, encoded["image_embeds"][image_rows], encoded["text_embeds"][text_rows],
                            mask[text_rows])
    parity.close(fused[len(rows):], r[f"out/{step}/fusion_neg_text"])
    parity.close(logits, r[f"out/{step}/itm_logits"], 1e-4)


@files("grounding")
def test_grounding(r):
  """Fusion of image and phrase, location logits, and boxes decoded greedily among location tokens."""
  text, mask = ids_and_mask(r, "text")
  encoded = r.apply(r.params, parity.encode, r.image(), text, mask)
  for name, ours in encoded.items():
    parity.close(ours, r[f"out/{name}"], name=name)
  memory = r.model.memory(encoded["fusion_image"], encoded["fusion_text"], mask)
  prefix = jnp.full((len(text), 1), 344, jnp.int32)
  ids = jnp.concatenate([prefix, jnp.asarray(r["out/target_ids"], jnp.int32)], axis=1)
  logits = r.apply(r.params, lambda m: m.decode(ids, jnp.ones(ids.shape, bool), memory))
  bins = np.flatnonzero(r["out/decoder_logits"].max((0, 1)) > -5000)  # the others were lowered by 10,000
  assert (bins[0], bins[-1], len(bins)) == (345, 345 + r.meta["bins"], r.meta["bins"] + 1)
  parity.close(logits[:, :, bins], r["out/decoder_logits"][:, :, bins], 1e-4)
  masked = jnp.full(logits.shape[-1:], -10000.0).at[bins].set(0.0)
  parity.close(losses.token_cross_entropy(logits + masked, ids[:, [1, 2, 3, 4, 4]])[:, :4], r["out/token_loss"], 1e-4)

  cache = r.apply(r.params, lambda m: m.init_cache(memory, 1, 5))
  step, _ = decoding_fns(r.model, r.params)
  boxes = jax.jit(lambda cache: decode.greedy(step, cache, prefix, jnp.ones(len(text), jnp.int32), max_length=4, eos_id=102,
                                              pad_id=-1, allowed=masked == 0.0))(cache)
  np.testing.assert_array_equal(boxes.tokens[:, 0, 1:], r["out/pred_ids"])
