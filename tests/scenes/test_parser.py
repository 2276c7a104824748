"""Captions of scenes parse to the forms they were made from."""

import pytest

from mplug_jax.scenes import oracle, parser
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import text as scene_text
from mplug_jax.scenes.text import Desc, Statement


@pytest.mark.parametrize("difficulty", ["default", "hard"])
def test_every_caption_parses_to_its_form(difficulty):
  config = scenes.SceneConfig(None, 0, difficulty)
  templates = set()
  for index in range(150):
    for caption in scene_text.caption_forms(scenes.scene(config, "test", index), 8):
      assert parser.parse(caption.text) == caption.form, caption.text
      templates.add(caption.template)
  assert len(templates) == scene_text.TEMPLATE_COUNT


@pytest.mark.parametrize(
  ("text", "form"),
  [
    (
      "a tiny red disc sits left of a plus sign",
      Statement((Desc("small", "red", "circle"), Desc(shape="cross")), (("left", 0, 1),)),
    ),
    (
      "compared with a red star, a big thing is bigger",
      Statement((Desc("large"), Desc(None, "red", "star")), (("larger", 0, 1),)),
    ),
    (
      "a circle with a star under it",
      Statement((Desc(shape="circle"), Desc(shape="star")), (("above", 0, 1),)),
    ),
    (
      "a circle and a star are above a square",
      Statement(
        (Desc(shape="circle"), Desc(shape="star"), Desc(shape="square")),
        (("above", 0, 2), ("above", 1, 2)),
      ),
    ),
    ("a circle sits larger than a star", None),
    ("a circle of a star", None),
    ("", None),
    ("a red", None),
  ],
)
def test_parse_of_single_texts(text, form):
  assert parser.parse(text) == form


def test_oracle_tells_a_caption_from_its_opposite():
  scene = scenes.scene(scenes.SceneConfig(), "test", 3)
  caption = next(c for c in scene_text.caption_forms(scene, 8) if c.template[0] == "pair")
  (name, i, j), *_ = caption.form.relations
  assert oracle.holds(parser.parse(caption.text), scene) is True
  assert (
    oracle.holds(caption.form._replace(relations=((scene_text.OPPOSITE[name], i, j),)), scene)
    is False
  )
