"""Several sources as one: shares and repeats; no record is left out."""

import collections

import numpy as np
import pytest

from mplug_jax.data.sources.mixture import Mixture


class Letters:
  def __init__(self, letter, size):
    self.letter, self.size = letter, size

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    return {"name": f"{self.letter}{index}", "id": index // 2}


@pytest.mark.parametrize(
  ("weights", "counts"),
  [
    (None, (6, 4, 10)),
    ((1, 1, 1), (10, 10, 10)),
    ((2, 1, 1), (20, 10, 10)),
    ((0.1, 0.8, 0.1), (10, 80, 10)),
  ],
)
def test_an_epoch_has_every_record_and_the_given_shares(weights, counts):
  sizes = 6, 4, 10
  mixture = Mixture([Letters(letter, size) for letter, size in zip("abc", sizes)], weights)
  names = [mixture[i]["name"] for i in range(len(mixture))]
  seen = collections.Counter(names)
  assert (
    tuple(sum(n for name, n in seen.items() if name[0] == letter) for letter in "abc") == counts
  )
  assert len(seen) == sum(sizes)
  for letter, size, count in zip("abc", sizes, counts):
    assert all(
      n in (count // size, -(-count // size)) for name, n in seen.items() if name[0] == letter
    )


def test_images_of_different_sources_have_different_numbers():
  mixture = Mixture([Letters("a", 6), Letters("b", 4)], (1, 3))
  numbers = collections.defaultdict(set)
  for i in range(len(mixture)):
    record = mixture[i]
    numbers[record["id"]].add(record["name"])
  assert sorted(map(sorted, numbers.values())) == [
    ["a0", "a1"],
    ["a2", "a3"],
    ["a4", "a5"],
    ["b0", "b1"],
    ["b2", "b3"],
  ]


def test_what_cannot_be_mixed():
  with pytest.raises(ValueError, match=r"sources with records; these have \[6, 0\]"):
    Mixture([Letters("a", 6), Letters("b", 0)])
  for weights in ((1,), (1, 0), (1, -1), (1, np.inf)):
    with pytest.raises(ValueError, match="needs as many positive weights"):
      Mixture([Letters("a", 6), Letters("b", 4)], weights)
  with pytest.raises(IndexError, match="record 10 is not among the 10"):
    Mixture([Letters("a", 6), Letters("b", 4)])[10]
