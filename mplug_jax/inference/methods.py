"""Methods of Predictor, one row each: read by the predictor, the commands and the exports."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mplug_jax.data import boxes
from mplug_jax.inference import method_results
from mplug_jax.inference.results import Label


class Text(NamedTuple):
  """Texts that a method reads.

  Attributes:
    noun: the text in messages.
    length: field of config.data with the number of tokens.
    words: whether config.data.max_words limits the words.
    lower: whether the text is lowercased.
    ends: whether rows end with [eos].
    key: name of the token ids in the task's batch.
    axes: axes between the rows and the tokens of the batch: "q" for any number of texts, 1.
  """

  noun: str
  length: str
  words: bool = False
  lower: bool = False
  ends: bool = False
  key: str = ""
  axes: tuple[str | int, ...] = ()


class Command(NamedTuple):
  """Use of a method by the predict command.

  Attributes:
    name: value of --task.
    image: key of an input row with its image; "images" for a pair.
    text: key of an input row with its text; "": none.
    results: function (predictor, images, texts, options) -> one dictionary a row; None: the
      method is called with images and texts and the fields of its results are written.
    text_lists: whether a row may have a list of texts.
    either: whether a row has an image or a text, not both.
    outputs: function (options of the command line) -> keys of the results; None: they are not
      known before the first result.
  """

  name: str
  image: str
  text: str = ""
  results: Callable[..., list[dict[str, Any]]] | None = None
  text_lists: bool = False
  either: bool = False
  outputs: Callable[[Any], tuple[str, ...]] | None = None


class Tab(NamedTuple):
  """Tab of a method on the demo page.

  Attributes:
    title: of the tab.
    button: label of the button.
    label: of the text field; "": there is none.
    example: shown in the empty text field.
    describe: function result -> text; None: the tab searches through images.
  """

  title: str
  button: str
  label: str = ""
  example: str = ""
  describe: Callable[[Any], str] | None = None


class Function(NamedTuple):
  """An exported function of a method.

  Attributes:
    inputs: names in the task's batch that a caller gives.
    make: function task -> function (params, batch) -> {name: array}.
    labels: names in the task's batch that predict functions read but do not use; zeros are given.
    constants: function task -> entries of serving.json that give the outputs their meaning.
  """

  inputs: tuple[str, ...]
  make: Callable[[Any], Callable]
  labels: tuple[str, ...] = ()
  constants: Callable[[Any], dict[str, Any]] = lambda task: {}


class Method(NamedTuple):
  """A method of Predictor.

  Attributes:
    verb: what it does, for messages.
    task: task whose predict functions it runs.
    trained: tasks whose checkpoints have learned it.
    parts: parts of the parameters that it needs in addition to the image encoder.
    config: config file that trains a checkpoint for it.
    text: the texts that it reads; None: none.
    command: its use by the predict command; None: none.
    tab: its tab on the demo page; None: none.
    functions: {name: exported function}.
    explained: whether Explainer has a method of the same name.
    images_per_text: images that a classifier must read for this method; 0: any number.
    canvas: whether images keep their proportions, on a square canvas.
  """

  verb: str
  task: str
  trained: tuple[str, ...]
  parts: tuple[str, ...]
  config: str
  text: Text | None = None
  command: Command | None = None
  tab: Tab | None = None
  functions: dict[str, Function] = {}
  explained: bool = False
  images_per_text: int = 0
  canvas: bool = False


def _predict(name: str) -> Callable[[Any], Callable]:
  """Returns `make` of a predict function."""
  return lambda task: task.predict_fns()[name]


def _features(function: str, key: str) -> Callable[[Any], Callable]:
  """Returns `make` of the contrastive features of an image or a text."""
  return lambda task: (
    lambda params, batch: {"feature": task.apply(params, getattr(task, function), batch[key])}
  )


def _locate(task: Any) -> Callable:
  """Returns `make` of the boxes of phrases, cut at the edges of their image."""
  function = task.predict_fns()["locate"]

  def locate(params: Any, batch: Any) -> dict[str, Any]:
    out = function(params, batch)
    return {"box": boxes.cut(out["box"], out["size"][:, None]), "score": out["score"]}

  return locate


def _keys(*names: str) -> Callable[[Any], tuple[str, ...]]:
  """Returns `outputs` of a command that adds these keys whatever its options."""
  return lambda options: names


def _answers(task: Any) -> dict[str, Any]:
  return {"answers": list(task.answers)} if task.config.task.predict == "rank" else {}


def _box_text(box: Any) -> str:
  x0, y0, x1, y1, _ = box
  return f"left {x0:.0f}, top {y0:.0f}, right {x1:.0f}, bottom {y1:.0f} (pixels)"


_FUSED = ("text_encoder", "fusion_encoder")
_DECODED = (*_FUSED, "text_decoder")
_STATEMENT = Text("statement", "max_text", words=True, key="sentence", axes=(1,))
_CAPTION = Text("text", "max_caption", words=True, key="caption")
_CLASSIFY = Function(
  ("image", "sentence"),
  _predict("classify"),
  labels=("label",),
  constants=lambda task: {"labels": list(task.config.data.labels)},
)
METHODS = {
  "answer": Method(
    verb="answer questions",
    task="vqa",
    trained=("vqa", "pretrain"),
    parts=_DECODED,
    config="configs/vqa.py",
    text=Text("question", "max_question", key="question", axes=("q",)),
    command=Command(
      "vqa", "image", "question", method_results.answers, outputs=_keys("answer", "score")
    ),
    tab=Tab(
      "Ask",
      "Ask",
      "Question",
      "what color is the circle?",
      lambda answer: answer.text or "(no answer)",
    ),
    functions={
      "answer": Function(
        ("image", "question"),
        lambda task: task.predict_fns()[task.config.task.predict],
        constants=_answers,
      )
    },
    explained=True,
  ),
  "caption": Method(
    verb="tell what it sees",
    task="caption",
    trained=("caption", "scst", "pretrain"),
    parts=("text_decoder",),
    config="configs/caption.py",
    command=Command(
      "caption", "image", results=method_results.captions, outputs=method_results.caption_keys
    ),
    tab=Tab("Describe", "Describe", describe=lambda caption: caption.text or "(no caption)"),
    functions={
      "caption": Function(
        ("image",),
        _predict("generate"),
        constants=lambda task: {"prompt": task.prompt.decoded},  # output tokens begin with it
      )
    },
    explained=True,
  ),
  "match": Method(
    verb="match images with texts",
    task="retrieval",
    trained=("retrieval", "pretrain"),
    parts=(*_FUSED, "vision_proj", "text_proj", "itm_head", "temp"),
    config="configs/retrieval.py",
    text=_CAPTION,
    command=Command(
      "retrieval",
      "image",
      "caption",
      method_results.matches,
      text_lists=True,
      outputs=_keys("similarity", "probability"),
    ),
    functions={"match": Function(("image", "caption"), lambda task: task.match_pairs)},
    explained=True,
  ),
  "embed": Method(
    verb="embed images and texts",
    task="retrieval",
    trained=("retrieval", "pretrain"),
    parts=("text_encoder", "vision_proj", "text_proj"),
    config="configs/retrieval.py",
    text=_CAPTION,
    command=Command(
      "embed",
      "image",
      "caption",
      method_results.embeddings,
      either=True,
      outputs=_keys("embedding"),
    ),
    tab=Tab("Search", "Search", "What to look for", "a red circle above a blue square"),
    functions={
      "embed_image": Function(("image",), _features("image_features", "image")),
      "embed_text": Function(("caption",), _features("text_features", "caption")),
    },
  ),
  "locate": Method(
    verb="locate what a phrase means",
    task="grounding",
    trained=("grounding",),
    parts=_DECODED,
    config="configs/grounding.py",
    text=Text("phrase", "max_phrase", lower=True, ends=True, key="phrase", axes=("q",)),
    command=Command(
      "grounding", "image", "text", method_results.boxes, outputs=_keys("box", "score")
    ),
    tab=Tab("Locate", "Locate", "What to find", "the large red circle", _box_text),
    functions={
      "locate": Function(
        ("image", "placed", "size", "phrase"),
        _locate,
        labels=("box",),
      )
    },
    explained=True,
    canvas=True,
  ),
  "compare": Method(
    verb="judge statements about two images",
    task="classification",
    trained=("classification",),
    parts=(*_FUSED, "cls_head"),
    config="configs/nlvr2.py",
    text=_STATEMENT,
    command=Command("nlvr2", "images", "sentence", outputs=_keys(*Label._fields)),
    functions={"compare": _CLASSIFY},
    explained=True,
    images_per_text=2,
  ),
  "entails": Method(
    verb="judge statements about an image",
    task="classification",
    trained=("classification",),
    parts=(*_FUSED, "cls_head"),
    config="configs/snli_ve.py",
    text=_STATEMENT,
    command=Command("snli_ve", "image", "sentence", outputs=_keys(*Label._fields)),
    functions={"entails": _CLASSIFY},
    explained=True,
    images_per_text=1,
  ),
}


def commands() -> dict[str, str]:
  """Returns {value of --task: method} of the predict command."""
  return {row.command.name: name for name, row in METHODS.items() if row.command}


def functions() -> dict[str, tuple[str, Function]]:
  """Returns {exported function: (method, Function)}."""
  return {
    function: (name, row.functions[function])
    for name, row in METHODS.items()
    for function in row.functions
  }
