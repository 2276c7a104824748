"""The interface between a task and the train loop."""

import abc

import jax
import jax.numpy as jnp

from mplug_jax.parallel import batches

# CLIP's channel statistics, for images of 0 to 255.
_MEAN = tuple(255 * x for x in (0.48145466, 0.4578275, 0.40821073))


_STD = tuple(255 * x for x in (0.26862954, 0.26130258, 0.27577711))


_OUT_OF_CACHE = (
  2**20
)  # numbers in the feed-forward layer of one image from which several images side by side are slower on CPU


def normalise(image):
  """u8[B, H, W, 3] -> f32[B, H, W, 3] with CLIP's mean and standard deviation."""
  return (image.astype(jnp.float32) - jnp.asarray(_MEAN)) / jnp.asarray(_STD)


def image_shape(config, size):
  """Shape of what a row shows, without the row: an image of `size` pixels, or config.data.frames of them."""
  return (config.data.frames,) * bool(config.data.frames) + (size, size, 3)


def encode_image(module, image):
  """u8[B, S, S, 3] -> f[B, N, D] tokens; of clips u8[B, F, S, S, 3] -> f[B, F * N, D], the frames' tokens one after another.

  Tokens f[B, N, D] come back as they are: an image that was encoded before.
  """
  if image.ndim == 3:
    return image
  tokens = module.encode_image(normalise(image.reshape((-1,) + image.shape[-3:])))
  return tokens.reshape(image.shape[0], -1, tokens.shape[-1])


def contrastive_features(module, image_tokens, text, frames=0):
  """MPlug.contrastive_features with the mean of the first tokens of all `frames` of a clip; 0: an image."""
  if image_tokens is not None and frames:
    first = image_tokens.reshape(image_tokens.shape[0], frames, -1, image_tokens.shape[-1])[:, :, 0]
    image_tokens = first.mean(
      1, keepdims=True
    )  # the projection is linear: the mean of the frames' projections
  return module.contrastive_features(image_tokens, text)


class Task(abc.ABC):
  """What to initialise, what to minimise, what to predict. Knows nothing of devices, optimizers or files.

  The loop minimises the sum over terms of coefficient x total / loss normalizer, both taken over the whole global
  batch, so that neither the mesh nor the number of microbatches changes the result.
  """

  coefficients = {}  # of loss terms; 1 where not named

  def __init__(self, model, config, tokenizer):
    """model: MPlug; config: the run's ConfigDict; tokenizer: see data/tokenizer.py."""
    self.model, self.config, self.tokenizer = model, config, tokenizer

  @abc.abstractmethod
  def batch_spec(self, batch_size):
    """{name: ShapeDtypeStruct} of a batch."""

  @abc.abstractmethod
  def forward(self, module, batch):
    """A pass through every module the task trains, as a method of the bound model; `init` makes their parameters."""

  def init(self, rng, batch):
    """key, batch -> parameters."""
    return self.model.init(rng, batch, method=lambda module, b: self.forward(module, b))["params"]

  def init_extra(self):
    """State besides parameters (queues); sharded and saved with the train state."""
    return ()

  def prepare(self, state, batch, host):
    """Work on the host, once per update; by default none.

    Args:
      state: the TrainState. batch: this process's rows as numpy arrays, of which the data gives some names of `batch_spec` only.
      host: see build.Host.

    Returns:
      this process's rows with every name of `batch_spec`.
    """
    del state, host
    return batch

  def project(self, params):
    """Parameters after an update -> the nearest allowed ones, for instance a clamped temperature; by default all are."""
    return params

  @abc.abstractmethod
  def loss_normalizers(self, batch, rng):
    """{term: f32[]}: what each term's total is divided by. Cheap, without parameters."""

  @abc.abstractmethod
  def loss(self, params, state, batch, rng):
    """-> ({term: f32[] total}, {metric: (f32[] sum, f32[] count)}, extra). Pure. `state` holds step, ema_params, extra."""

  @abc.abstractmethod
  def predict_fns(self):
    """{name: function (params, batch) -> arrays}."""

  def predict_sample(self, name, params, sample):
    """What the predict function `name` is traced with when a run is built: `sample`, a training batch of one row, unless it reads
    what others leave on the devices (see build.Build). Of shapes alone, like `params`."""
    del name, params
    return sample

  def apply(self, params, method, *args, rng=None):
    """`method(module, *args)` of the bound model; dropout is active when `rng` is given."""
    rngs = None if rng is None else {"dropout": rng}
    return self.model.apply({"params": params}, *args, method=method, rngs=rngs)

  def with_tokens(self, params, batch, encode=None):
    """An evaluation's batch with the tokens of its images, or clips, as "image"; as it is where it has them already.

    On CPU large images are encoded one a device at a time, whose activations stay in the cache: a fifth less time for 16 of base.
    encode: method (module, batch) -> tokens, default `encode_image`.
    """
    image = batch["image"]
    if image.ndim == 3:
      return batch
    rows = image.shape[0]  # of an export: no number
    encode = encode or (lambda module, batch: encode_image(module, batch["image"]))

    def together(params, batch):
      return self.apply(params, encode, batch)

    def one_by_one(params, batch):
      parts = batches.split_rows(batch, rows // batches.batch_split(rows))
      return batches.join_rows(jax.lax.map(lambda part: together(params, part), parts))

    numbers = (self.model.image_size // self.model.patch_size) ** 2 * 4 * self.model.vision_width
    if numbers < _OUT_OF_CACHE or not isinstance(rows, int) or rows == 1:
      return batch | {"image": together(params, batch)}
    return batch | {
      "image": jax.lax.platform_dependent(params, batch, default=together, cpu=one_by_one)
    }
