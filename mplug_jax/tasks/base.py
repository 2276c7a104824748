"""Interface between a task and the train loop, and the image functions that tasks share."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray, UInt8

from mplug_jax.arrays import Array
from mplug_jax.models.mplug import MPlug
from mplug_jax.ops import prng
from mplug_jax.parallel import batches

# {name: array} of a batch; {name: ShapeDtypeStruct} where a task describes one.
Batch: TypeAlias = dict[str, Any]
# Pytree of parameters.
Params: TypeAlias = Any
# {loss term: its sum over the batch, f32[]}
Terms: TypeAlias = dict[str, Any]
# {metric: (sum f32[], count f32[])}
Metrics: TypeAlias = dict[str, tuple[Any, Any]]
# Function (params, batch) -> {name: array}.
PredictFn: TypeAlias = Callable[[Params, Batch], dict[str, Any]]

# CLIP's channel statistics, for pixels from 0 to 255.
_MEAN = tuple(255 * x for x in (0.48145466, 0.4578275, 0.40821073))
_STD = tuple(255 * x for x in (0.26862954, 0.26130258, 0.27577711))

# Activations of the feed-forward layer of one image from which encoding several images at once is
# slower on CPU, because they no longer fit into its cache.
_OUT_OF_CACHE = 2**20


def normalize(
  image: UInt8[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
  """Normalizes pixels u8[B, H, W, 3] by CLIP's mean and standard deviation: f32[B, H, W, 3]."""
  return (jnp.asarray(image, jnp.float32) - jnp.asarray(_MEAN)) / jnp.asarray(_STD)


def image_shape(config: Any, size: int) -> tuple[int, ...]:
  """Shape of one image or clip.

  Args:
    config: run config; data.frames is the number of frames of a clip, 0 for images.
    size: height and width in pixels.

  Returns:
    (size, size, 3), or (frames, size, size, 3) of clips.
  """
  frames = config.data.frames
  return (frames, size, size, 3) if frames else (size, size, 3)


def batch_structs(
  batch_size: int, shapes: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Describes a batch.

  Args:
    batch_size: rows B.
    shapes: {name: (shape of one row, dtype)}.

  Returns:
    {name: ShapeDtypeStruct of shape [B, ...]}.
  """
  return {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    for name, (shape, dtype) in shapes.items()
  }


def encode_image(module: MPlug, image: Any) -> Float[Array, "batch tokens width"]:
  """Encodes images or clips; tokens that were encoded before are returned unchanged.

  Args:
    module: bound model.
    image: images u8[B, S, S, 3], clips u8[B, F, S, S, 3] or tokens f[B, N, D].

  Returns:
    Image tokens f[B, N, D]; of clips f[B, F * N, D], the tokens of the frames one after another.
  """
  if image.ndim == 3:
    return image
  tokens = module.encode_image(normalize(image.reshape((-1, *image.shape[-3:]))))
  return tokens.reshape(image.shape[0], -1, tokens.shape[-1])


def next_token_scores(
  logits: Float[Array, "rows length vocabulary"], ids: Int[Array, "rows length"], pad_id: int
) -> Float[Array, "rows predicted"]:
  """Log-probabilities of all tokens but the first, 0 for padding.

  Args:
    logits: f32[R, T, V], of the token after each position.
    ids: i32[R, T].
    pad_id: id of padding.

  Returns:
    f32[R, T - 1].
  """
  scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[
    ..., 0
  ]
  return jnp.where(ids[:, 1:] != pad_id, scores, 0.0)


def contrastive_features(
  module: MPlug,
  image_tokens: Float[Array, "batch tokens width"] | None,
  text: Float[Array, "rows length width"] | None,
  frames: int = 0,
) -> tuple[Any, Any]:
  """Features for image-text contrast, see MPlug.contrastive_features.

  Args:
    module: bound model.
    image_tokens: f[B, N, D], or None.
    text: text tokens f[R, L, D], or None.
    frames: frames of a clip, whose first tokens are averaged; 0 for images.

  Returns:
    Unit vectors f32[B, E] of the images and f32[R, E] of the texts; None for None.
  """
  if image_tokens is not None and frames:
    first = image_tokens.reshape(image_tokens.shape[0], frames, -1, image_tokens.shape[-1])[:, :, 0]
    # The projection is linear: this is the mean of the projected frames.
    image_tokens = first.mean(1, keepdims=True)
  return module.contrastive_features(image_tokens, text)


class Task(abc.ABC):
  """Parameters to initialize, a loss to minimize and functions that predict.

  A task has no knowledge of devices, optimizers and files. The train loop minimizes the sum over
  loss terms of coefficient x total / loss normalizer. Both are sums over the global batch, so
  that neither the mesh nor the number of microbatches changes the result.

  Attributes:
    coefficients: {loss term: coefficient}; 1 for terms that it does not name.
    zero_shot: (fields of config.task, fields of config.data) with which a checkpoint of another
      task predicts.
    separate_images: whether a text is fused with each of a row's images by itself.
  """

  coefficients: Mapping[str, float] = {}
  zero_shot: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
  separate_images: bool = False

  def __init__(self, model: MPlug, config: Any, tokenizer: Any):
    """Stores the arguments.

    Args:
      model: model without parameters.
      config: config of the run.
      tokenizer: see data/text/tokenizer_base.py.
    """
    self.model = model
    self.config = config
    self.tokenizer = tokenizer

  @abc.abstractmethod
  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of a batch of `batch_size` rows."""

  @abc.abstractmethod
  def forward(self, module: MPlug, batch: Batch) -> Any:
    """Calls every module that the task trains; `init` makes their parameters from it.

    Args:
      module: bound model.
      batch: see `batch_spec`.
    """

  def init(self, rng: PRNGKeyArray, batch: Batch) -> Params:
    """Returns new parameters.

    Args:
      rng: random key.
      batch: any batch, of which only the shapes matter.
    """
    variables = self.model.init(
      self.model_key(rng), batch, method=lambda module, b: self.forward(module, b)
    )
    return variables["params"]

  def model_key(self, rng: PRNGKeyArray) -> PRNGKeyArray:
    """Returns the key that the model derives those of dropout sites and parameters from."""
    return prng.model_key(rng, self.config.prng_impl)

  def init_extra(self) -> Any:
    """Returns state besides parameters, such as queues; it is sharded and saved with them."""
    return ()

  def prepare(self, state: Any, batch: Batch, host: Any) -> Batch:
    """Work on the host before an update; none by default.

    Args:
      state: TrainState.
      batch: numpy arrays with the rows of this process, without names that this method adds.
      host: see training.build.Host.

    Returns:
      The rows of this process with every name of `batch_spec`.
    """
    del state, host
    return batch

  def project(self, params: Params) -> Params:
    """Maps parameters after an update to allowed ones, for instance by clamping a temperature."""
    return params

  @abc.abstractmethod
  def loss_normalizers(self, batch: Batch, rng: PRNGKeyArray) -> Terms:
    """Returns {loss term: f32[]}, the divisor of its total. Cheap, without parameters."""

  @abc.abstractmethod
  def loss(
    self, params: Params, state: Any, batch: Batch, rng: PRNGKeyArray
  ) -> tuple[Terms, Metrics, Any]:
    """Loss of a batch, a pure function.

    Args:
      params: parameters to differentiate by.
      state: TrainState; tasks read step, ema_params and extra.
      batch: see `batch_spec`.
      rng: random key of this update.

    Returns:
      ({loss term: total f32[]}, {metric: (sum f32[], count f32[])}, new extra state).
    """

  @abc.abstractmethod
  def predict_fns(self) -> dict[str, PredictFn]:
    """Returns {name: function (params, batch) -> {name: array}}."""

  def explained_scores(self, module: MPlug, batch: Batch) -> Float[Array, "rows words"]:
    """Returns the log-probabilities that attention maps explain; one text per row.

    Args:
      module: bound model.
      batch: what `forward` reads, with the result to explain in place of the target.

    Raises:
      NotImplementedError: the task has no such scores.
    """
    raise NotImplementedError(f"{type(self).__name__} has no scores to explain.")

  def predict_sample(self, name: str, params: Params, sample: Batch) -> Batch:
    """Returns the batch that a predict function is traced with when a run is built.

    Args:
      name: name of the predict function.
      params: shapes of the parameters.
      sample: shapes of a training batch of one row.

    Returns:
      `sample`, unless the function reads results of other functions, see training.build.Build.
    """
    del name, params
    return sample

  def apply(
    self,
    params: Params,
    method: Callable[..., Any],
    *args: Any,
    rng: PRNGKeyArray | None = None,
  ) -> Any:
    """Calls `method(module, *args)` with the bound model.

    Args:
      params: parameters.
      method: function of the bound model.
      *args: its further arguments.
      rng: key for dropout; None turns dropout off.
    """
    rngs = None if rng is None else {"dropout": self.model_key(rng)}
    return self.model.apply({"params": params}, *args, method=method, rngs=rngs)

  def with_tokens(
    self, params: Params, batch: Batch, encode: Callable[..., Any] | None = None
  ) -> Batch:
    """Replaces the images of a batch by their tokens, for evaluation.

    On CPU, large images are encoded one by one on each device, so that the activations stay in
    the cache: 20% less time for 16 images of the base preset.

    Args:
      params: parameters.
      batch: images, clips or tokens as "image"; tokens are kept.
      encode: function (module, batch) -> tokens; `encode_image` by default.

    Returns:
      The batch with tokens f[B, N, D] as "image".
    """
    image = batch["image"]
    if image.ndim == 3:
      return batch
    rows = image.shape[0]  # Symbolic, not an int, while a function is exported.
    encode = encode or (lambda module, batch: encode_image(module, batch["image"]))

    def together(params, batch):
      return self.apply(params, encode, batch)

    def one_by_one(params, batch):
      parts = batches.split_rows(batch, rows // batches.batch_split(rows))
      return batches.join_rows(jax.lax.map(lambda part: together(params, part), parts))

    patches = (self.model.image_size // self.model.patch_size) ** 2
    activations = patches * 4 * self.model.vision_width
    if activations < _OUT_OF_CACHE or not isinstance(rows, int) or rows == 1:
      return batch | {"image": together(params, batch)}
    return batch | {
      "image": jax.lax.platform_dependent(params, batch, default=together, cpu=one_by_one)
    }
