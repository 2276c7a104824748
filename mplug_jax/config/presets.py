"""Model geometries by size, as plain numbers: fields of mplug_jax.models.mplug.MPlug; no JAX.

A vocab_size of 0 follows the tokenizer.
"""

_BERT_BASE = dict(vocab_size=30522, hidden_size=768, heads=12, mlp_dim=3072, max_positions=512)
_CLIP_B16 = dict(patch_size=16, vision_width=768, vision_layers=12)
_CLIP_L14 = dict(patch_size=14, vision_width=1024, vision_layers=24)

PRESETS = {
  "tiny": dict(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    vocab_size=0,
    hidden_size=32,
    heads=2,
    mlp_dim=64,
    max_positions=64,
    text_layers=1,
    fusion_layers=2,
    stride=1,
    decoder_layers=1,
    embed_dim=32,
  ),
  "small": dict(
    image_size=64,
    patch_size=16,
    vision_width=128,
    vision_layers=4,
    vision_heads=4,
    vocab_size=0,
    hidden_size=128,
    heads=4,
    mlp_dim=512,
    max_positions=128,
    text_layers=2,
    fusion_layers=2,
    stride=1,
    decoder_layers=1,
    embed_dim=128,
    initializer_range=0.05,
  ),
  "base": dict(
    image_size=384,
    **_CLIP_B16,
    **_BERT_BASE,
    text_layers=6,
    fusion_layers=6,
    stride=3,
    decoder_layers=12,
  ),
  "large": dict(
    image_size=336,
    **_CLIP_L14,
    **_BERT_BASE,
    text_layers=6,
    fusion_layers=6,
    stride=6,
    decoder_layers=12,
  ),
  # Never released: the published 24 text layers and 1.1 billion parameters fit BERT-large's width.
  "huge": dict(
    image_size=336,
    **_CLIP_L14,
    vocab_size=30522,
    hidden_size=1024,
    heads=16,
    mlp_dim=4096,
    max_positions=512,
    text_layers=24,
    fusion_layers=6,
    stride=6,
    decoder_layers=12,
  ),
}

# Sizes that follow the paper's recipes; the others train from scratch on little data.
PAPER_SIZES = ("base", "large", "huge")
