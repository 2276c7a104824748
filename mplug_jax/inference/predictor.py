"""Use of a trained model: `Predictor.load(folder)`, then answers, captions, matches, boxes and classes of images and texts.

Images are paths, encoded bytes, PIL images or arrays u8[H, W], [H, W, 3 | 4]; clips are paths of video files, arrays u8[T, H, W, 3] or
`Clip(frames)`. One image gives one result, a list of images a list of results. Results do not depend on what else is in a call.
"""

import functools

import flax
import numpy as np

from mplug_jax.data.examples import caption as caption_data
from mplug_jax.inference import checkpoint as restored
from mplug_jax.inference import inputs, method_tasks, methods
from mplug_jax.inference.batching import Programs, padded
from mplug_jax.inference.results import Answer, Box, Caption, Hit, Index, Label, Match

_PROMPT_WIDTHS = 8  # prompts are padded to a multiple of it


class Predictor:
  """A checkpoint in use.

  Attributes:
    config, tokenizer, model, mesh, params: see restored.Restored.
  """

  def __init__(self, checkpoint, batch_size=0):
    """checkpoint: restored.Restored. batch_size: most rows that are computed at a time, 0: config.eval.batch_size."""
    self.path, self.config, self.tokenizer, self.model, self.mesh, self.params = checkpoint
    self._parts = checkpoint.parts
    self._programs = Programs(self.params, self.mesh, batch_size or self.config.eval.batch_size)
    data = self.config.data
    self._images = inputs.ImageRows(
      self.config.model.image_size, data.get("frames", 0), data.get("frame_sampling", "centres")
    )
    self._task = functools.lru_cache(None)(self._make_task)

  @classmethod
  def load(cls, checkpoint, config=None, tokenizer=None, *, batch_size=0, devices=None):
    """Reads a checkpoint.

    Changes no setting of the calling process; `mplug_jax.tune_process()` before it makes
    computations on CPU faster and keeps compiled programs for the next start.

    Args:
      checkpoint: run folder of mplug_jax.main, or what tools.convert_checkpoint made of PyTorch weights.
      config: "configs/vqa.py:base" or a ConfigDict, for weights that do not say what they were trained for. Default: the run's own; of
        converted weights what their parts are made for.
      tokenizer: the vocab.txt of converted weights. Default: the run's own.
      batch_size: most images, and most texts, that are computed at a time; default config.eval.batch_size.
      devices: JAX devices to use; default all of this process.

    Raises:
      FileNotFoundError, ValueError, checkpoint.CheckpointError: the checkpoint cannot be used; one sentence.
    """
    if batch_size < 0:
      raise ValueError(f"batch_size={batch_size} must be at least 1, or 0 for the config's own.")
    return cls(restored.restore(checkpoint, config, tokenizer, devices), batch_size)

  @property
  def batch_size(self):
    """Most images, and most texts, that are computed at a time."""
    return self._programs.sizes[-1]

  def can(self, method):
    """Whether the checkpoint has what the method of this name needs."""
    return not self._refusal(method)

  # ---- questions and captions

  def answer(self, images, questions, *, candidates=None, truncate=False):
    """Answers questions.

    Args:
      images: one or many. questions: one, or a list: of one image all of them, of many one for each, which may be a list itself.
      candidates: strings to choose the answers from; default: they are generated, or chosen as config.task.predict says.
      truncate: cut questions that are too long, with a warning, instead of refusing them.

    Returns:
      Answer, or (nested) list of them, one for each question.
    """
    changes = (
      {} if candidates is None else {"predict": "rank", "rank_answers": _candidates(candidates)}
    )
    task = self.task("answer", **changes)
    rank = task.config.task.predict == "rank"
    images, questions, requests, shape = inputs.pairs(images, questions, "question")
    batch = {"question": self.text_rows("answer")(questions, truncate)[:, None]}
    out = self._ask("answer", "rank" if rank else "generate", images, requests, batch, **changes)
    if rank:
      return shape(
        [
          Answer(task.answers[answers[0, 0]], float(scores[0, 0]))
          for answers, scores in zip(out["answer"], out["probability"])
        ]
      )
    return shape(
      [
        Answer(self.tokenizer.decode(tokens[0, : length[0]]), float(score[0]))
        for tokens, length, score in zip(out["tokens"], out["length"], out["score"])
      ]
    )

  def caption(self, images, *, prompt=None, n=1):
    """Captions images.

    Args:
      images: one or many. prompt: how captions begin, which is not in their text; default config.task.prompt.
      n: captions of each image, best first.

    Returns:
      Caption, or with n > 1 a list of n; for many images a list of these.
    """
    if n < 1:
      raise ValueError(f"n={n} must be at least 1 caption.")
    task = self.task("caption")
    said = task.prompt if prompt is None else self._prompt(task, prompt)
    width = (
      -(-len(said.start) // _PROMPT_WIDTHS) * _PROMPT_WIDTHS
      if prompt is not None
      else len(said.start)
    )
    start = np.array([*said.start, *[self.tokenizer.pad_id] * (width - len(said.start))], np.int32)
    given = inputs.as_list(images)
    batch = {
      "prompt": np.tile(start, (len(given), 1)),
      "prompt_length": np.full(len(given), len(said.start), np.int32),
    }
    out = self._ask("caption", n, given, [(i,) for i in range(len(given))], batch)
    found = [
      [
        Caption(
          self.tokenizer.decode(tokens[:length]).removeprefix(said.said).strip(), float(score)
        )
        for tokens, length, score in zip(*each)
        if np.isfinite(score)
      ]
      for each in zip(out["tokens"], out["length"], out["score"])
    ]
    found = [captions[0] for captions in found] if n == 1 else found
    return found[0] if inputs.is_one(images) else found

  def _prompt(self, task, text):
    """A prompt of the user's -> caption.Prompt. Raises ValueError: there is no room behind it."""
    config = task.config.copy_and_resolve_references()
    config.task.prompt = text
    return caption_data.prompt(config, self.tokenizer)

  # ---- images and texts compared

  def embed(self, images=None, texts=None, *, truncate=False):
    """Unit vectors whose products are similarities, of images or of texts: f32[E] of one, f32[N, E] of many."""
    if (images is None) == (texts is None):
      raise ValueError("embed takes images= or texts=, one of them.")
    if texts is not None:
      task, many = self.task("embed"), _texts(texts)
      batch = {"caption": self.text_rows("embed")(many, truncate)}
      feature = self._programs.rows(
        "embed_texts",
        lambda: (
          lambda params, batch: {
            "feature": task.apply(params, task.text_features, batch["caption"])
          }
        ),
        batch,
      )["feature"]
      return feature[0] if isinstance(texts, str) else feature
    feature = np.stack(self._features(inputs.as_list(images))["feature"])
    return feature[0] if inputs.is_one(images) else feature

  def match(self, images, texts, *, truncate=False):
    """Compares every image with every text -> Match."""
    given, many = inputs.as_list(images), _texts(texts)
    captions = self.text_rows("match")(many, truncate)
    requests = [(i,) for i in range(len(given)) for _ in many]
    out = self._ask(
      "match", "match", given, requests, {"caption": np.tile(captions, (len(given), 1))}
    )

    def matrix(values):
      found = np.reshape(values, (len(given), len(many))).tolist()
      found = [row[0] for row in found] if isinstance(texts, str) else found
      return found[0] if inputs.is_one(images) else found

    return Match(matrix(out["similarity"]), matrix(out["probability"]))

  def match_pairs(self, images, texts, *, truncate=False):
    """Compares each image with its own texts; arguments as of `answer`. -> Match, or (nested) list of them, one for each text."""
    images, texts, requests, shape = inputs.pairs(images, texts, "text")
    out = self._ask(
      "match", "match", images, requests, {"caption": self.text_rows("match")(texts, truncate)}
    )
    return shape([Match(float(s), float(p)) for s, p in zip(out["similarity"], out["probability"])])

  def index(self, images, *, rerank=True):
    """Images to `search` in -> Index.

    rerank: keep their tokens in memory (f32[577, 768] of an image of base size, 1.8 MB) for the model that reads image and text
      together, if the checkpoint has one; otherwise they are found by similarity alone.
    """
    images = inputs.as_list(images)
    out = self._features(images, tokens=rerank and self.can("match"))
    return Index(images, np.stack(out["feature"]), out.get("tokens"))

  def search(self, query, index, *, k=10, candidates=32, truncate=False):
    """Finds images.

    Args:
      query: a text (str), or an image in another form than that: a pathlib.Path, bytes, ... index: of `index`.
      k: most results. candidates: the most similar images, which are ranked again by the model that reads image and text together, with a
        text as query and where the index has what that needs.

    Returns:
      [Hit], best first.
    """
    if not isinstance(query, str):
      feature = self.embed(query)
    else:
      feature = self.embed(texts=query, truncate=truncate)
    similarity = index.features @ feature
    best = np.argsort(-similarity, kind="stable")
    scores = similarity
    if isinstance(query, str) and index.tokens is not None:
      task, chosen = self.task("match"), best[: max(k, candidates)]
      caption = self.text_rows("match")([query], truncate)
      rows = {
        "image": np.stack([index.tokens[i] for i in chosen]),
        "caption": np.repeat(caption, len(chosen), axis=0),
      }
      scores = similarity.copy()
      scores[chosen] = self._programs.rows("search", lambda: task.match_pairs, rows)["score"]
      best = chosen[np.argsort(-scores[chosen], kind="stable")]
    return [Hit(int(i), index.images[i], float(scores[i]), float(similarity[i])) for i in best[:k]]

  def _features(self, images, tokens=False):
    """-> {"feature": f32[N, E]}, with "tokens": [N] of dtype[T, D] if wanted."""
    self.task("embed")
    return self._ask(
      "embed", "tokens" if tokens else "features", images, [(i,) for i in range(len(images))], {}
    )

  # ---- boxes and classes

  def locate(self, images, phrases, *, truncate=False):
    """Finds what phrases mean; arguments as of `answer`.

    Returns:
      Box in pixels of the image, or (nested) list of them, one for each phrase.
    """
    images, phrases, requests, shape = inputs.pairs(images, phrases, "phrase")
    _no_clips(images, "locate")
    batch = {
      "phrase": self.text_rows("locate")(phrases, truncate)[:, None],
      "box": np.zeros((len(phrases), 1, 4), np.float32),
    }
    out = self._ask("locate", "locate", images, requests, batch)
    return shape(
      [Box(*box[0].tolist(), float(score[0])) for box, score in zip(out["box"], out["score"])]
    )

  def entails(self, images, statements, *, truncate=False):
    """Classifies statements about an image; arguments as of `answer`. -> Label, or (nested) list, one for each statement."""
    images, statements, requests, shape = inputs.pairs(images, statements, "statement")
    return shape(self._classify("entails", images, requests, statements, truncate))

  def compare(self, pairs, statements, *, truncate=False):
    """Classifies statements about two images.

    Args:
      pairs: (first, second) or a list of such. statements: one, or a list: of one pair all of them, of many one for each, which may be a
        list itself.

    Returns:
      Label, or (nested) list of them, one for each statement.
    """
    images, statements, requests, shape = inputs.pairs_of_images(pairs, statements)
    return shape(self._classify("compare", images, requests, statements, truncate))

  def _classify(self, method, images, requests, statements, truncate):
    _no_clips(images, method)
    batch = {
      "sentence": self.text_rows(method)(statements, truncate)[:, None],
      "label": np.full((len(statements), 1), -1, np.int32),
    }
    out = self._ask(method, "classify", images, requests, batch)
    found = [dict(zip(self.config.data.labels, row.tolist())) for row in out["probability"]]
    return [Label(label := max(scores, key=scores.get), scores[label], scores) for scores in found]

  # ---- the model

  def task(self, method, frames=0, **changes):
    """The Task behind a method, see methods.METHODS. frames: of clips; 0: images. changes: of config.task.

    Raises:
      ValueError: the checkpoint cannot do it; says what is missing and what trains it.
    """
    if problem := self._refusal(method):
      raise ValueError(problem)
    return self._task(method, frames, **changes)

  def _refusal(self, method):
    return method_tasks.refusal(method, self.path, self._parts, self.config)

  def _make_task(self, method, frames, **changes):
    return method_tasks.make_task(
      method, self.model, self.config, self.tokenizer, frames, **changes
    )

  def text_rows(self, method):
    """The inputs.TextRows of the texts that a method takes. Raises ValueError as `task`."""
    data = self.task(method).config.data
    text = methods.METHODS[method].text
    if text is None:
      raise ValueError(f"Predictor.{method} reads no text.")
    return inputs.TextRows(
      text.noun,
      self.tokenizer,
      data[text.length],
      data.max_words if text.words else 0,
      lower=text.lower,
      ends=text.ends,
    )

  def image_rows(self, method, images):
    """Images as the method shows them to the model -> {"image": u8[B, S, S, 3], ...}; clips, if there are no images among them, as
    u8[B, F, S, S, 3]. Raises image_ops.ImageError."""
    if methods.METHODS[method].canvas:
      return self._images.on_canvas(images)
    return self._images.resized(images)

  def encode(self, method, images):
    """Images, or clips -> (tokens dtype[size, N, D] on the devices, those behind the images without meaning; {name: [B, ...]}, what else
    `image_rows` says of them)."""
    rows, task = self.image_rows(method, images), self._task(method, 0)
    canvas = methods.METHODS[method].canvas
    encode = task.evaluated_image if canvas else None
    size = self._programs.whole(len(images))
    tokens = self._call(
      ("encode", canvas),
      lambda: lambda params, batch: task.with_tokens(params, batch, encode)["image"],
      {name: padded(x, size) for name, x in rows.items()},
    )
    return tokens, {name: x for name, x in rows.items() if name != "image"}

  def _ask(self, method, what, images, requests, rows, **changes):
    """Runs a predict function on requests, see Programs.requests; images and clips may be mixed, and come more than once.

    what: name of a predict function, a number of captions, or one of those below. -> {name: [R, ...]}, lists where clips differ in shape.
    """
    first = {inputs.identity(image): number for number, image in reversed(list(enumerate(images)))}
    requests = [
      tuple(first[inputs.identity(images[number])] for number in request) for request in requests
    ]
    found = [None] * len(requests)
    for clips in (False, True):
      chosen = [
        number
        for number, request in enumerate(requests)
        if inputs.is_clip(images[request[0]]) == clips
      ]
      if not chosen:
        continue
      frames = self._images.frames if clips else 0
      task = self._task(method, frames, **changes)
      key, make = (method, frames, what, *changes.items()), functools.partial(_program, task, what)
      out = self._programs.requests(
        images,
        [requests[number] for number in chosen],
        {name: x[chosen] for name, x in rows.items()},
        functools.partial(self.encode, method),
        functools.partial(self._call, key, make),
      )
      for place, number in enumerate(chosen):
        found[number] = {name: x[place] for name, x in out.items()}
    return {name: [each[name] for each in found] for name in found[0]}

  def _call(self, key, make, batch):
    """Programs.call; parameters that do not fit the model are one sentence."""
    try:
      return self._programs.call(key, make, batch)
    except flax.errors.FlaxError as error:
      raise ValueError(
        f"{self.path} does not fit this configuration: {str(error).splitlines()[0]}"
      ) from error


def _program(task, what):
  """A function (params, batch) -> {name: array} of a task."""
  if isinstance(what, int):
    return functools.partial(task.captions, count=what)
  if what == "match":
    return task.match_pairs
  if what in ("features", "tokens"):
    return lambda params, batch: (
      {"feature": task.apply(params, task.image_features, batch["image"])}
      | ({"tokens": batch["image"]} if what == "tokens" else {})
    )
  fn = task.predict_fns()[what]
  if what == "classify" and task.config.data.images_per_text == 1:
    return lambda params, batch: fn(params, batch | {"image": batch["image"][:, None]})
  return fn


def _texts(texts):
  """One text or many -> list. Raises ValueError for none."""
  found = [texts] if isinstance(texts, str) else list(texts)
  if not found:
    raise ValueError("There is no text: the list is empty.")
  return found


def _candidates(texts):
  if (
    isinstance(texts, str)
    or not all(isinstance(text, str) and text.strip() for text in texts)
    or not texts
  ):
    raise ValueError("candidates must be a list of answers to choose from, none of them empty.")
  return tuple(texts)


def _no_clips(images, method):
  if any(inputs.is_clip(image) for image in images):
    raise ValueError(f"{method} looks at images; a clip has no place in it.")
