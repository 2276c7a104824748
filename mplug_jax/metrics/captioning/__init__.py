"""Caption metrics of the COCO caption evaluation, without Java: BLEU, ROUGE-L, CIDEr-D, CIDEr.

Values are percentages, as papers report them: 100 times those of pycocoevalcap. Papers and
pycocoevalcap call "CIDEr-D" "CIDEr"; see cider.py for the difference. METEOR and SPICE need
pycocoevalcap and Java; without them their value is a text "not computed: ...".

Own code rather than pycocoevalcap, whose tokenizer needs Java: the same values from Python alone.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from mplug_jax.metrics.captioning import bleu, cider, java_metrics, rouge
from mplug_jax.metrics.captioning.cider import CiderD, DocumentFrequency, document_frequency
from mplug_jax.metrics.captioning.ptb.tokenizer import tokenize

__all__ = [
  "ALL",
  "DEFAULT",
  "CiderD",
  "DocumentFrequency",
  "cider_note",
  "document_frequency",
  "evaluate",
  "evaluate_tokens",
  "score",
  "score_domains",
  "tokenize",
  "without_empty",
]

_BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
DEFAULT = (*_BLEU, "ROUGE-L", "CIDEr-D")
ALL = (*DEFAULT, "CIDEr", "METEOR", "SPICE")
OVERALL = "overall"
_SHOWN = 5  # image ids in a message

# {image id: [caption, ...]}
Captions = Mapping[Any, Sequence[str]]


def evaluate(
  candidates: Captions, references: Captions, metrics: Sequence[str] = DEFAULT
) -> dict[str, float | str]:
  """Scores one caption per image; captions are tokenized first.

  References without a token count as none.

  Args:
    candidates: {image id: [caption]}.
    references: {image id: [caption, ...]} of the same images.
    metrics: names of `ALL`.

  Returns:
    {metric: percentage, or "not computed: <reason>" for METEOR and SPICE}.

  Raises:
    ValueError: no images, images that differ, not one candidate, no references, an unknown metric.
  """
  _check(candidates, references, metrics)
  kept, _ = without_empty(_tokenize({image: references[image] for image in candidates}))
  return evaluate_tokens(
    _tokenize(candidates), {image: kept.get(image, []) for image in candidates}, metrics
  )


def without_empty(
  references: Captions, name: Callable[[Any], Any] = lambda image: image
) -> tuple[dict[Any, list[str]], list[str]]:
  """Leaves out references without a token; they say nothing about an image.

  Args:
    references: {image id: [caption, ...]}, tokens separated by spaces.
    name: function from an image id to the one that messages name.

  Returns:
    ({image id: [caption, ...]} of the images that keep one, sentences on what is left out).
  """
  filled = {image: [text for text in texts if text.strip()] for image, texts in references.items()}
  lost = {image: len(references[image]) - len(texts) for image, texts in filled.items()}
  sentences = []
  if any(lost.values()):
    images = _some([name(image) for image, number in lost.items() if number])
    total = sum(map(len, references.values()))
    sentences.append(
      f"{sum(lost.values())} of {total} reference captions have no word and do not count, those of "
      f"{images}."
    )
  kept = {image: texts for image, texts in filled.items() if texts}
  if missing := references.keys() - kept.keys():
    sentences.append(
      f"{len(missing)} of {len(references)} images have no reference caption and are not scored."
    )
  return kept, sentences


def _check(candidates: Captions, references: Captions, metrics: Sequence[str]) -> None:
  unknown = [name for name in metrics if name not in ALL]
  if unknown:
    raise ValueError(f"metric {unknown[0]!r} is unknown; choose from {', '.join(ALL)}.")
  if not candidates:
    raise ValueError("there are no captions to evaluate; give at least one image.")
  if candidates.keys() != references.keys():
    raise ValueError(
      f"candidates and references are of different images: "
      f"{_some(candidates.keys() ^ references.keys())}."
    )
  if wrong := [image for image, captions in candidates.items() if len(captions) != 1]:
    raise ValueError(f"every image needs exactly one candidate; wrong for {_some(wrong)}.")
  if wrong := [image for image, captions in references.items() if not captions]:
    raise ValueError(f"every image needs at least one reference; none for {_some(wrong)}.")


def _some(images: Iterable[Any]) -> str:
  """Returns number and names of images, such as "3 images: 17, 21, 40"."""
  ordered = sorted(images, key=str)
  names = [*map(repr, ordered[:_SHOWN]), *(["..."] if len(ordered) > _SHOWN else [])]
  unit = "image" if len(ordered) == 1 else "images"
  return f"{len(ordered)} {unit}: {', '.join(names)}"


def _tokenize(captions: Captions) -> dict[Any, list[str]]:
  """Tokenizes {image: [caption, ...]}, all captions as one text."""
  tokens = iter(tokenize([caption for group in captions.values() for caption in group]))
  return {image: [next(tokens) for _ in group] for image, group in captions.items()}


def evaluate_tokens(
  candidates: Captions, references: Captions, metrics: Sequence[str] = DEFAULT
) -> dict[str, float | str]:
  """Scores one caption per image, as `evaluate`, for tokenized captions.

  Args:
    candidates: {image id: [caption]}, tokens separated by spaces.
    references: {image id: [caption, ...]}, tokens separated by spaces.
    metrics: names of `ALL`.

  Returns:
    As `evaluate`.

  Raises:
    ValueError: as `evaluate`.
  """
  _check(candidates, references, metrics)
  lines = [captions[0] for captions in candidates.values()]
  groups = [references[image] for image in candidates]
  values: dict[str, float | str] = {}
  if any(name in _BLEU for name in metrics):
    scores, _ = bleu.bleu(lines, groups)
    values |= {name: 100 * float(value) for name, value in zip(_BLEU, scores)}
  if "ROUGE-L" in metrics:
    values["ROUGE-L"] = 100 * float(rouge.rouge_l(lines, groups).mean())
  if "CIDEr-D" in metrics or "CIDEr" in metrics:
    frequency = document_frequency(groups)
    for name, scorer in (("CIDEr-D", CiderD), ("CIDEr", cider.Cider)):
      if name in metrics:
        values[name] = 100 * float(scorer(frequency).score(lines, groups).mean())
  for name in ("METEOR", "SPICE"):
    if name in metrics:
      try:
        values[name] = 100 * java_metrics.score(
          name, dict(enumerate([line] for line in lines)), dict(enumerate(groups))
        )
      except java_metrics.Unavailable as reason:
        values[name] = f"not computed: {reason}"
  return {name: values[name] for name in metrics}


def cider_note(references: Captions) -> str:
  """Returns a sentence if every CIDEr of a set is 0 whatever the captions are, else "".

  Args:
    references: {image id: [caption, ...]}, tokens separated by spaces.
  """
  frequency = document_frequency(list(references.values()))
  if any(count < frequency.images for count in frequency.counts.values()):
    return ""
  reason = (
    "it is computed from one image alone"
    if len(references) == 1
    else f"no n-gram of the references tells the {len(references)} images apart"
  )
  return f"CIDEr says nothing here: {reason}, so that it is 0 for every caption."


def score(
  results: Sequence[Mapping[str, Any]],
  annotations: Mapping[str, Any],
  metrics: Sequence[str] = DEFAULT,
  partial: bool = False,
) -> dict[str, float | str]:
  """Scores a file of results over all images.

  Args:
    results: as for `score_domains`.
    annotations: as for `score_domains`.
    metrics: names of `ALL`.
    partial: as for `score_domains`.

  Returns:
    {metric: percentage, or "not computed: <reason>"}.

  Raises:
    ValueError: as `score_domains`.
  """
  candidates, references, _ = _match(results, annotations, partial)
  return evaluate(candidates, references, metrics)


def score_domains(
  results: Sequence[Mapping[str, Any]],
  annotations: Mapping[str, Any],
  metrics: Sequence[str] = DEFAULT,
  partial: bool = False,
) -> dict[str, dict[str, float | str]]:
  """Scores a file of results over all images and for each domain.

  A domain is evaluated as a separate set, document frequencies and corpus BLEU included.

  Args:
    results: [{"image_id", "caption"}], one for each image, as COCO's results.
    annotations: {"images": [{"id", ...}], "annotations": [{"image_id", "caption"}, ...]}, as COCO's
      captions; images may have a "domain", as those of NoCaps.
    metrics: names of `ALL`.
    partial: evaluates only the images that have a result; otherwise every image needs one.

  Returns:
    {"overall": {metric: percentage, or "not computed: <reason>"}, domain: ..., ...}.

  Raises:
    ValueError: malformed entries; images missing, unknown or repeated in the results; an image
      without annotations that have a word.
  """
  candidates, references, domains = _match(results, annotations, partial)
  _check(candidates, references, metrics)
  candidates = _tokenize(candidates)
  references, sentences = without_empty(_tokenize(references))
  _refuse("annotations: no caption with a word", candidates.keys() - references.keys())
  for sentence in sentences:
    logging.warning("annotations: %s", sentence)
  groups = {OVERALL: list(candidates)}
  for image in candidates:
    if image in domains:
      groups.setdefault(domains[image], []).append(image)
  if {"CIDEr-D", "CIDEr"} & set(metrics):
    for name, images in groups.items():
      if note := cider_note({image: references[image] for image in images}):
        logging.warning("%s: %s", name, note)
  return {
    name: evaluate_tokens(
      {i: candidates[i] for i in images}, {i: references[i] for i in images}, metrics
    )
    for name, images in groups.items()
  }


def _match(
  results: Any, annotations: Any, partial: bool
) -> tuple[dict[Any, list[str]], dict[Any, list[str]], dict[Any, str]]:
  """Returns {image: [caption]}, {image: [reference, ...]} and {image: domain}.

  The images are in the order of the annotations.
  """
  if not isinstance(annotations, Mapping) or not all(
    isinstance(annotations.get(key), list) for key in ("images", "annotations")
  ):
    raise ValueError(
      'annotations: not of the form {"images": [...], "annotations": [...]}; give a file of '
      "captions as COCO has it."
    )
  if not isinstance(results, list):
    raise ValueError(
      'results: not a list [{"image_id": ..., "caption": ...}, ...]; give a file of results as '
      "COCO has it."
    )
  images = {}
  for entry in annotations["images"]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), (int, str)):
      raise ValueError(f'annotations: an image without a number or text as "id": {entry!r}.')
    images[entry["id"]] = entry.get("domain")
  references = _captions(annotations["annotations"], "annotations")
  candidates = _captions(results, "results")
  repeated = [image for image, captions in candidates.items() if len(captions) > 1]
  _refuse("results: more than one caption", repeated)
  _refuse("results: not in the annotations", candidates.keys() - images.keys())
  _refuse("annotations: no caption", images.keys() - references.keys())
  if not partial:
    missing = images.keys() - candidates.keys()
    _refuse("results: no caption (evaluate those present with --partial)", missing)
  order = [image for image in images if image in candidates]
  return (
    {image: candidates[image] for image in order},
    {image: references[image] for image in order},
    {image: domain for image, domain in images.items() if isinstance(domain, str)},
  )


def _refuse(problem: str, images: Collection[Any]) -> None:
  """Raises ValueError if any image has the problem."""
  if images:
    raise ValueError(f"{problem} for {_some(images)}.")


def _captions(entries: Sequence[Any], name: str) -> dict[Any, list[str]]:
  """Groups [{"image_id", "caption"}] to {image: [caption, ...]}."""
  captions: dict[Any, list[str]] = {}
  for number, entry in enumerate(entries):
    if (
      not isinstance(entry, Mapping)
      or not isinstance(entry.get("image_id"), (int, str))
      or not isinstance(entry.get("caption"), str)
    ):
      raise ValueError(
        f'{name}: entry {number} is {entry!r}, not {{"image_id": number or text, "caption": text}}.'
      )
    captions.setdefault(entry["image_id"], []).append(entry["caption"])
  return captions
