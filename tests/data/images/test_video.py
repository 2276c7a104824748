"""Clips: sampled frames, video files, unreadable files, and the reader of clips."""

import numpy as np
import pytest

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops, reader, video
from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.scenes import scene


def test_frame_numbers():
  assert video.frame_numbers(300, 16, "official").tolist() == list(
    range(0, 271, 18)
  )  # docs/official.md item 37
  assert video.frame_numbers(5, 8, "official").tolist() == [0] * 8
  assert video.frame_numbers(300, 3).tolist() == [50, 150, 250]
  assert video.frame_numbers(8, 8).tolist() == list(range(8))
  assert video.frame_numbers(2, 5).tolist() == [0, 0, 1, 1, 1]
  assert video.frame_numbers(4, 2, "2").tolist() == [2, 2]
  assert video.frame_numbers(4, 1, "9").tolist() == [3]
  with pytest.raises(
    ValueError,
    match=r"data\.frame_sampling='random' is neither a frame number nor one of uniform, official",
  ):
    video.frame_numbers(4, 2, "random")


@pytest.fixture(scope="module")
def clip():
  """u8[8, 96, 96, 3]."""
  return scene_sources.SceneClips(scene.SceneConfig(96), "test")[0]["image"]


@pytest.fixture(scope="module")
def file(clip, tmp_path_factory):
  """An MPEG-4 file with every frame four times."""
  path = tmp_path_factory.mktemp("video") / "clip.mp4"
  video.write_mp4(path, np.repeat(clip, 4, axis=0))
  return path


def test_read_clip_returns_the_sampled_frames(clip, file):
  for sampling, wanted in (("uniform", [1, 3, 5, 7]), ("official", [0, 2, 4, 6]), ("17", [4] * 4)):
    frames = video.read_clip(file, 4, sampling)
    errors = [[np.abs(a.astype(int) - b).mean() for b in clip] for a in frames]
    assert np.argmin(errors, axis=1).tolist() == wanted, sampling
    assert np.min(errors) < 6, sampling
  with pytest.raises(OSError, match="cannot write a video"):
    video.write_mp4(file.parent / "no folder" / "x.mp4", clip)


def test_broken_and_truncated_videos(file, tmp_path):
  for name, data in (
    ("text.mp4", b"no video at all"),
    ("cut.mp4", file.read_bytes()[:4000]),
    ("empty.mp4", b""),
  ):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=f"Video .*{name} cannot be read: no frame can be decoded"):
      video.read_clip(tmp_path / name, 4)
  with pytest.raises(ImageError, match="Video .*none.mp4 does not exist"):
    video.read_clip(tmp_path / "none.mp4", 4)


def test_reader_of_clips(clip, file, tmp_path):
  read = reader.ImageReader(32, dict(scale=(0.5, 1.0), flip=0.5, randaugment=None), frames=4)
  frames, corrupt = read(clip, "clip")
  assert frames.shape == (4, 32, 32, 3)
  assert not corrupt
  np.testing.assert_array_equal(frames[2], ops.eval_transform(clip[5], 32))
  drawn, _ = read(np.repeat(clip[:1], 8, axis=0), "still", np.random.default_rng(0))
  assert (drawn == drawn[:1]).all()
  assert not np.array_equal(drawn[0], ops.eval_transform(clip[0], 32))
  black, corrupt = read(tmp_path / "none.mp4", "none", np.random.default_rng(0))
  assert corrupt
  assert black.shape == (4, 32, 32, 3)
  assert not black.any()
  assert video.contact_image(file, 4).shape == (192, 192, 3)
