"""Metrics of captions as the COCO caption evaluation computes them, without Java: tokens, BLEU, ROUGE-L, CIDEr-D, CIDEr.

Values are percentages, as papers report them: 100 times those of pycocoevalcap. "CIDEr-D" is what
papers and pycocoevalcap call "CIDEr"; see cider.py for the difference. METEOR and SPICE need
pycocoevalcap and Java, and are reported as a text "not computed: ..." without.
"""

from collections.abc import Mapping, Sequence

from mplug_jax.metrics.captioning import bleu, cider, java_metrics, rouge
from mplug_jax.metrics.captioning.cider import CiderD, DocumentFrequency, document_frequency
from mplug_jax.metrics.captioning.ptb.tokenizer import tokenize

__all__ = [
  "ALL",
  "DEFAULT",
  "CiderD",
  "DocumentFrequency",
  "document_frequency",
  "evaluate",
  "evaluate_tokens",
  "score",
  "score_domains",
  "tokenize",
]

_BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
DEFAULT = (*_BLEU, "ROUGE-L", "CIDEr-D")
ALL = (*DEFAULT, "CIDEr", "METEOR", "SPICE")
OVERALL = "overall"
_SHOWN = 5  # image ids in a message


def evaluate(
  candidates: Mapping, references: Mapping, metrics: Sequence[str] = DEFAULT
) -> dict[str, float | str]:
  """Scores of one caption per image, captions as they were written.

  Args:
    candidates: {image id: [caption]}.
    references: {image id: [caption, ...]} of the same images.
    metrics: names of `ALL`.

  Returns:
    {metric: percentage, or "not computed: <why>" for METEOR and SPICE}.

  Raises:
    ValueError: no images, images that differ, not one candidate, no references, an unknown metric.
  """
  _check(candidates, references, metrics)
  return evaluate_tokens(
    _tokenize(candidates), _tokenize({image: references[image] for image in candidates}), metrics
  )


def _check(candidates, references, metrics):
  unknown = [name for name in metrics if name not in ALL]
  if unknown:
    raise ValueError(f"metric {unknown[0]!r} is unknown; choose from {', '.join(ALL)}.")
  if not candidates:
    raise ValueError("there are no captions to evaluate; give one image at least.")
  if candidates.keys() != references.keys():
    raise ValueError(
      f"candidates and references are of different images: "
      f"{_some(candidates.keys() ^ references.keys())}."
    )
  if wrong := [image for image, captions in candidates.items() if len(captions) != 1]:
    raise ValueError(f"an image needs exactly one candidate, not so {_some(wrong)}.")
  if wrong := [image for image, captions in references.items() if not captions]:
    raise ValueError(f"an image needs one reference at least, not so {_some(wrong)}.")


def _some(images):
  """ "3 images: 17, 21, 40" """
  images = sorted(images, key=str)
  return (
    f"{len(images)} image{'s' * (len(images) != 1)}: {', '.join(map(repr, images[:_SHOWN]))}"
    f"{', ...' if len(images) > _SHOWN else ''}"
  )


def _tokenize(captions):
  """{image: [caption, ...]} -> the same of tokens, all captions as one text."""
  tokens = iter(tokenize([caption for group in captions.values() for caption in group]))
  return {image: [next(tokens) for _ in group] for image, group in captions.items()}


def evaluate_tokens(
  candidates: Mapping, references: Mapping, metrics: Sequence[str] = DEFAULT
) -> dict[str, float | str]:
  """`evaluate` for captions that are tokenized already: tokens separated by spaces.

  Raises ValueError as it does.
  """
  _check(candidates, references, metrics)
  lines, groups = (
    [captions[0] for captions in candidates.values()],
    [references[image] for image in candidates],
  )
  values = {}
  if any(name in _BLEU for name in metrics):
    values = dict(zip(_BLEU, 100 * bleu.bleu(lines, groups)[0]))
  if "ROUGE-L" in metrics:
    values["ROUGE-L"] = 100 * rouge.rouge_l(lines, groups).mean()
  if "CIDEr-D" in metrics or "CIDEr" in metrics:
    frequency = document_frequency(groups)
    for name, scorer in (("CIDEr-D", CiderD), ("CIDEr", cider.Cider)):
      if name in metrics:
        values[name] = 100 * scorer(frequency).score(lines, groups).mean()
  values = {name: float(value) for name, value in values.items()}
  for name in ("METEOR", "SPICE"):
    if name in metrics:
      try:
        values[name] = 100 * java_metrics.score(
          name, dict(enumerate([line] for line in lines)), dict(enumerate(groups))
        )
      except java_metrics.Unavailable as why:
        values[name] = f"not computed: {why}"
  return {name: values[name] for name in metrics}


def score(
  results: Sequence[Mapping],
  annotations: Mapping,
  metrics: Sequence[str] = DEFAULT,
  partial: bool = False,
) -> dict[str, float | str]:
  """`score_domains` for all images alone: {metric: percentage, or "not computed: <why>"}."""
  candidates, references, _ = _match(results, annotations, partial)
  return evaluate(candidates, references, metrics)


def score_domains(
  results: Sequence[Mapping],
  annotations: Mapping,
  metrics: Sequence[str] = DEFAULT,
  partial: bool = False,
) -> dict[str, dict[str, float | str]]:
  """Scores of a file of results against a file of annotations, over all images and for each domain.

  A domain is evaluated as a set of its own, document frequencies and corpus BLEU included.

  Args:
    results: [{"image_id", "caption"}], one for each image, as COCO's results.
    annotations: {"images": [{"id", ...}], "annotations": [{"image_id", "caption"}, ...]}, as COCO's
      captions; images may have a "domain", as those of NoCaps.
    metrics: names of `ALL`.
    partial: evaluates the images that have a result, instead of insisting on all.

  Returns:
    {"overall": {metric: percentage, or "not computed: <why>"}, domain: ..., ...}.

  Raises:
    ValueError: entries of another form; images missing, unknown or twice in the results; an image
      without annotations.
  """
  candidates, references, domains = _match(results, annotations, partial)
  _check(candidates, references, metrics)
  candidates, references = _tokenize(candidates), _tokenize(references)
  groups = {OVERALL: list(candidates)}
  for image in candidates:
    if image in domains:
      groups.setdefault(domains[image], []).append(image)
  return {
    name: evaluate_tokens(
      {i: candidates[i] for i in images}, {i: references[i] for i in images}, metrics
    )
    for name, images in groups.items()
  }


def _match(results, annotations, partial):
  """-> ({image: [caption]}, {image: [caption, ...]}, {image: domain}), in the order of the annotations' images."""
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
  references, candidates = (
    _captions(annotations["annotations"], "annotations"),
    _captions(results, "results"),
  )
  for problem, found in (
    (
      "results: more than one caption",
      [image for image, captions in candidates.items() if len(captions) > 1],
    ),
    ("results: not in the annotations", [image for image in candidates if image not in images]),
    ("annotations: no caption", [image for image in images if image not in references]),
    (
      "results: no caption (evaluate those present with --partial)",
      [] if partial else images.keys() - candidates.keys(),
    ),
  ):
    if found:
      raise ValueError(f"{problem} for {_some(found)}.")
  order = [image for image in images if image in candidates]
  return (
    {image: candidates[image] for image in order},
    {image: references[image] for image in order},
    {image: domain for image, domain in images.items() if isinstance(domain, str)},
  )


def _captions(entries, where):
  """[{"image_id", "caption"}] -> {image: [caption, ...]}."""
  captions = {}
  for number, entry in enumerate(entries):
    if (
      not isinstance(entry, Mapping)
      or not isinstance(entry.get("image_id"), (int, str))
      or not isinstance(entry.get("caption"), str)
    ):
      raise ValueError(
        f'{where}: entry {number} is {entry!r}, not {{"image_id": number or text, "caption": '
        f"text}}."
      )
    captions.setdefault(entry["image_id"], []).append(entry["caption"])
  return captions
