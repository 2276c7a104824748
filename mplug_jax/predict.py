"""Command line of a trained model: `python -m mplug_jax.predict --checkpoint=runs/vqa --task=vqa --image=dog.jpg --question="..."`.

Rows come from --image, from a folder (--images) or from a JSONL file (--input) with the keys of the data=jsonl configs:
  vqa: image, question. caption: image. retrieval: image, caption. grounding: image, text. nlvr2: images, sentence.
  snli_ve: image, sentence. embed: image, or caption alone.
A text that a row lacks is the one of --text (--question is the same). Names of images in a file start from its folder.

A JSON line for every row goes to --output or stdout as soon as its batch is done: the row itself and its result, or why there is none,
"error". The same command goes on behind the lines that --output has. Files that cannot be read are counted at the end.
Exit status: 0, with --strict 1 if a row has no result; 1 and one sentence if nothing can be done.
"""

import argparse
import itertools
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mplug_jax.data.images import ops
from mplug_jax.inference import jsonl
from mplug_jax.inference.row_reader import Reader

_SHOWN = 10  # rows without a result that are named at the end


class Kind(NamedTuple):
  """method: of Predictor. image, text: keys of a row, "" for none. ask: (predictor, images, texts, options) -> [result as a dictionary]."""

  method: str
  image: str
  text: str
  ask: object


def _answer(predictor, images, texts, options):
  found = predictor.answer(images, texts, truncate=options.truncate)
  return [{"answer": answer.text, "score": answer.score} for answer in found]


def _caption(predictor, images, texts, options):
  found = predictor.caption(images, prompt=options.prompt, n=options.n)
  if options.n == 1:
    return [{"caption": caption.text, "score": caption.score} for caption in found]
  return [{"captions": [caption._asdict() for caption in captions]} for captions in found]


def _match(predictor, images, texts, options):
  found = predictor.match_pairs(images, texts, truncate=options.truncate)
  return [
    match._asdict()
    if isinstance(match, tuple)
    else {name: [getattr(each, name) for each in match] for name in match[0]._fields}
    for match in found
  ]


def _locate(predictor, images, texts, options):
  found = predictor.locate(images, texts, truncate=options.truncate)
  return [{"box": [box.x0, box.y0, box.x1, box.y1], "score": box.score} for box in found]


def _compare(predictor, images, texts, options):
  return [label._asdict() for label in predictor.compare(images, texts, truncate=options.truncate)]


def _entails(predictor, images, texts, options):
  return [label._asdict() for label in predictor.entails(images, texts, truncate=options.truncate)]


def _embed(predictor, images, texts, options):
  """Rows with an image get its features, the others those of their text."""
  own = [i for i, image in enumerate(images) if image is not None]
  others = [i for i, image in enumerate(images) if image is None]
  found = [None] * len(images)
  for numbers, features in (
    (own, predictor.embed([images[i] for i in own]) if own else ()),
    (
      others,
      predictor.embed(texts=[texts[i] for i in others], truncate=options.truncate)
      if others
      else (),
    ),
  ):
    for i, feature in zip(numbers, features):
      found[i] = {"embedding": feature.tolist()}
  return found


KINDS = {
  "vqa": Kind("answer", "image", "question", _answer),
  "caption": Kind("caption", "image", "", _caption),
  "retrieval": Kind("match", "image", "caption", _match),
  "grounding": Kind("locate", "image", "text", _locate),
  "nlvr2": Kind("compare", "images", "sentence", _compare),
  "snli_ve": Kind("entails", "image", "sentence", _entails),
  "embed": Kind("embed", "image", "caption", _embed),
}


def _parse(argv):
  parser = argparse.ArgumentParser(
    prog="python -m mplug_jax.predict",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--checkpoint", required=True, help="run folder, or result of tools.convert_checkpoint"
  )
  parser.add_argument("--task", required=True, choices=KINDS)
  parser.add_argument(
    "--config", help="configs/vqa.py:base, for converted weights; default: the run's own"
  )
  parser.add_argument(
    "--tokenizer", help="vocab.txt, for converted weights; default: the run's own"
  )
  parser.add_argument(
    "--image",
    action="append",
    default=[],
    help="one image or video; given twice, the pair of nlvr2",
  )
  parser.add_argument("--images", metavar="DIR", help="all images under a folder")
  parser.add_argument("--input", metavar="FILE", help="JSONL file of rows")
  parser.add_argument(
    "--text",
    "--question",
    default=None,
    help="question, phrase, statement or caption of every row without its own",
  )
  parser.add_argument("--prompt", help="how captions begin")
  parser.add_argument("--n", type=int, default=1, help="captions of each image")
  parser.add_argument("--output", metavar="FILE", help="JSONL file of results; default: stdout")
  parser.add_argument(
    "--batch_size", type=int, default=0, help="most rows at a time; default: config.eval.batch_size"
  )
  parser.add_argument(
    "--truncate", action="store_true", help="cut texts that are too long, instead of refusing them"
  )
  parser.add_argument(
    "--explain",
    metavar="DIR",
    help="write a picture of where the model looked for every row, see mplug_jax/inference/explain.py",
  )
  parser.add_argument("--strict", action="store_true", help="exit status 1 if a row has no result")
  return parser.parse_args(argv)


def _rows(options, kind):
  """A function () -> iterator over the rows, which may be walked through twice. Raises ValueError."""
  sources = [bool(options.image), bool(options.images), bool(options.input)]
  if sum(sources) > 1 or not (any(sources) or options.task == "embed" and options.text):
    raise ValueError("Give one of --image, --images=DIR and --input=FILE.")
  if options.text is not None and not kind.text:
    raise ValueError(f"--task={options.task} takes no text; a caption begins with --prompt.")
  needs_text = kind.text and options.task != "embed" and options.text is None
  if options.input:
    keys = [] if options.task == "embed" else [kind.image, *([kind.text] if needs_text else [])]
    return lambda: jsonl.of_file(options.input, keys)
  if needs_text:
    raise ValueError(
      f"--task={options.task} needs a text: give --text, or --input=FILE with {kind.image} and {kind.text} in each line."
    )
  if options.images:
    if kind.image == "images":
      raise ValueError(
        f"--task={options.task} is about pairs of images: give --image twice, or --input=FILE."
      )
    return lambda: jsonl.of_folder(options.images)
  if kind.image == "images":
    return lambda: iter([{"images": options.image}])
  return lambda: iter([{"image": image} for image in options.image] or [{}])


def _results(predictor, kind, options, rows, batch):
  """Rows and what a Reader makes of them -> (lines, number of rows without a result)."""
  images, texts, errors = batch
  good = [number for number in range(len(rows)) if number not in errors]
  try:
    found = (
      kind.ask(predictor, [images[i] for i in good], [texts[i] for i in good], options)
      if good
      else []
    )
  except ops.ImageError as error:  # of a video: find out whose it is
    if len(good) == 1:
      return _results(
        predictor, kind, options, rows, (images, texts, errors | {good[0]: str(error)})
      )
    halves = [
      (
        rows[s],
        (images[s], texts[s], {n - s.start: e for n, e in errors.items() if s.start <= n < s.stop}),
      )
      for s in (slice(0, len(rows) // 2), slice(len(rows) // 2, len(rows)))
    ]
    (first, a), (second, b) = (_results(predictor, kind, options, *half) for half in halves)
    return first + second, a + b
  found = dict(zip(good, found))
  lines = [
    row
    | ({} if kind.text in row or not texts[i] else {kind.text: texts[i]})
    | found.get(i, {"error": errors.get(i)})
    for i, row in enumerate(rows)
  ]
  return lines, len(errors)


def _explaining(predictor, kind, options):
  """A function (lines, what a Reader made, number of the first row) that writes pictures for --explain and names them in the lines."""
  if not options.explain:
    return lambda lines, made, first: None
  if kind.method == "embed":
    raise ValueError("--explain shows where an answer came from; --task=embed gives none.")
  from mplug_jax.inference import explain

  explainer = explain.Explainer(predictor)
  given = {"prompt": options.prompt} if kind.method == "caption" else {"truncate": options.truncate}

  def write(lines, made, first):
    rows = [
      None if "error" in line or isinstance(text, list) else (image, text)
      for line, image, text in zip(lines, *made[:2])
    ]
    for line, path in zip(
      lines, explain.save_rows(explainer, kind.method, rows, options.explain, first, **given)
    ):
      line |= {"explained": path} if path else {}

  return write


def _batches(rows, size):
  while batch := list(itertools.islice(rows, size)):
    yield batch


def run(options):
  """Does what the options say; returns the exit status. Raises ValueError, OSError, checkpoint.CheckpointError."""
  kind = KINDS[options.task]
  rows = _rows(options, kind)
  total = sum(1 for _ in rows())  # also reads every line once, before anything is computed
  from mplug_jax.inference.predictor import Predictor
  from mplug_jax.reporting import progress as progress_lib
  from mplug_jax.runtime.process import tune_process

  out = jsonl.Results(options.output) if options.output else None
  done, remaining = out.done if out else 0, rows()
  if done > total:
    raise ValueError(
      f"{options.output} has {done} lines, but there are {total} rows: it is of another command; name another --output."
    )
  if done:
    for row in itertools.islice(remaining, done):
      last = row
    out.check(last)
    print(f"{options.output} has {done} of {total} rows; going on behind them.", file=sys.stderr)
  if done == total:
    return 0
  tune_process()
  predictor = Predictor.load(
    options.checkpoint, options.config, options.tokenizer, batch_size=options.batch_size
  )
  predictor.task(kind.method)  # a checkpoint that cannot is refused before anything is read
  texts = predictor.text_rows(kind.method) if kind.text else None
  read = Reader(
    kind,
    options,
    texts and (lambda text: texts([text], options.truncate)),
    0 if kind.method == "locate" or options.explain else predictor.config.model.image_size,
  )
  explained = _explaining(predictor, kind, options)
  progress, failed, shown = (
    progress_lib.Progress(total, enabled=total > 1, stream=sys.stderr),
    0,
    [],
  )
  with ThreadPoolExecutor(1) as beside:
    batches = _batches(remaining, predictor.batch_size)
    batch = next(batches, None)
    ahead = beside.submit(read, batch)
    while batch:
      following = next(batches, None)
      made, ahead = ahead.result(), beside.submit(read, following) if following else None
      lines, bad = _results(predictor, kind, options, batch, made)
      explained(lines, made, done)
      if out:
        out.write(lines)
      else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), flush=True)
      failed, done = failed + bad, done + len(batch)
      shown += [line["error"] for line in lines if "error" in line][: _SHOWN - len(shown)]
      progress.update(done)
      batch = following
  progress.pause()
  if out:
    out.close()
  if failed:
    print(
      f"{failed} of {total} rows have no result:",
      *shown,
      *(["..."] * (failed > len(shown))),
      sep="\n  ",
      file=sys.stderr,
    )
  return int(options.strict and failed > 0)


def main(argv=None):
  """Returns the exit status."""
  options = _parse(argv)
  try:
    return run(options)
  except (ValueError, OSError, RuntimeError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
  sys.exit(main())
