"""Table rows and sizes of BERT's parts, shared by the formats that contain a BERT."""

import re

from mplug_jax.conversion.formats.format import Geometry, Rows, Shapes, shape_of

BERT_LAYER = (
  (r"attention\.self\.(query|key|value)", r"attention/\2", "linear"),
  (r"attention\.output\.dense", r"attention/out", "linear"),
  (r"attention\.output\.LayerNorm", r"attention_norm", "norm"),
  (r"intermediate\.dense", r"intermediate", "linear"),
  (r"output\.dense", r"output", "linear"),
  (r"output\.LayerNorm", r"output_norm", "norm"),
)
BERT_CROSS = (
  (r"crossattention\.self\.(query|key|value)", r"crossattention/\2", "linear"),
  (r"crossattention\.output\.dense", r"crossattention/out", "linear"),
  (r"crossattention\.output\.LayerNorm", r"crossattention_norm", "norm"),
)


def bert_layers(prefix: str, *paths: str, rows: Rows = BERT_LAYER) -> Rows:
  """Returns the table rows of a stack of BERT layers.

  Args:
    prefix: regex of the beginning of the tensor names.
    *paths: our paths of the layers, with the layer number as group 1.
    rows: rows of one layer, their names without the beginning.
  """
  return tuple(
    (rf"{prefix}\.encoder\.layer\.(\d+)\.{key}", tuple(f"{path}/{leaf}" for path in paths), kind)
    for key, leaf, kind in rows
  )


def embeddings(prefix: str, *paths: str, words: tuple[str, ...] = ()) -> Rows:
  """Returns the table rows of BERT's embeddings.

  Args:
    prefix: regex of the beginning of the tensor names.
    *paths: our modules that contain the embeddings.
    words: further targets of the word table.
  """
  tables = {
    name: tuple(f"{path}/embeddings/{name}/embedding" for path in paths)
    for name in ("word", "position", "token_type")
  }
  tables["word"] += words
  return (
    *(
      (rf"{prefix}\.embeddings\.{name}_embeddings\.weight", targets, "copy")
      for name, targets in tables.items()
    ),
    (
      rf"{prefix}\.embeddings\.LayerNorm",
      tuple(f"{path}/embeddings/norm" for path in paths),
      "norm",
    ),
    (rf"{prefix}\.embeddings\.position_ids", "0, 1, 2, ...", "constant"),
  )


def head(prefix: str, *paths: str) -> Rows:
  """Returns the table rows of a prediction head, all but the word matrix.

  Args:
    prefix: regex of the beginning of the tensor names.
    *paths: our paths of the head.
  """
  return (
    (prefix + r"\.transform\.dense", tuple(f"{path}/dense" for path in paths), "linear"),
    (prefix + r"\.transform\.LayerNorm", tuple(f"{path}/norm" for path in paths), "norm"),
    (prefix + r"\.bias", tuple(f"{path}/bias" for path in paths), "copy"),
    (prefix + r"\.decoder\.bias", prefix.replace("\\", "") + ".bias", "tied"),
  )


def bert_geometry(shapes: Shapes, prefixes: tuple[str, ...], feed_forward: str) -> Geometry:
  """Infers fields of MPlug from the first prefix with a word table; {} without one.

  Args:
    shapes: {table name: shape}.
    prefixes: beginnings of the names of BERT parts.
    feed_forward: regex of the first matrix of a feed-forward layer.
  """
  bert = next((p for p in prefixes if f"{p}.embeddings.word_embeddings.weight" in shapes), None)
  if bert is None:
    return {}
  vocab, hidden = shape_of(shapes, f"{bert}.embeddings.word_embeddings.weight", 2)
  first = f"{bert}.encoder.layer.0.intermediate.dense.weight"
  name = next((name for name in shapes if re.match(feed_forward, name)), first)
  return {
    "vocab_size": vocab,
    "hidden_size": hidden,
    "heads": max(1, hidden // 64),
    "max_positions": shape_of(shapes, f"{bert}.embeddings.position_embeddings.weight", 2)[0],
    "mlp_dim": shape_of(shapes, name, 2)[0],
  }
