"""Clips: MSR-VTT, MSR-VTT-QA, MSVD-QA and VATEX -> what the zero-shot configs of video read.

Test splits alone.
"""

import os
from collections import Counter

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.download import Images, Wanted, zipped
from mplug_jax.data.storage import archives, tabular

_MSRVTT_CLIPS = (
  "videos",
  "TestVideo",
  "videos/all",
  "MSRVTT/videos/all",
  "MSRVTT_Videos",
  "TrainValVideo",
  "test_videos.zip/TestVideo",
  "MSRVTT.zip/MSRVTT/videos/all",
)
_PAIRS = zipped(
  "MSRVTT_JSFUSION_test.csv",
  "the 1,000 test pairs of MSR-VTT",
  "msrvtt_data.zip",
  folders=("", "msrvtt_data"),
  inner="msrvtt_data",
)
_INFO = Wanted(
  "the test annotations of MSR-VTT",
  (
    "test_videodatainfo.json",
    "test_videodatainfo.zip/test_videodatainfo.json",
    "MSRVTT_data.json",
    "msrvtt_data/MSRVTT_data.json",
  ),
)


class _Clips:
  """Finds clips, all of one suffix in one folder, and says so to the config.

  Args:
    key: the key of config.data that names their folder.
  """

  def __init__(self, download, what, folders, key, skip_missing=None):
    self._download, self._what, self._folders, self._key, self._skip = (
      download,
      what,
      folders,
      key,
      skip_missing,
    )
    self._images, self.suffix, self._used = None, ".mp4", set()

  def __call__(self, name):
    """Whether a clip is there. Raises FileNotFoundError as Images."""
    if self._images is None:  # the first one tells what they are called
      there = (
        suffix
        for suffix in (".mp4", ".avi")
        for folder in self._folders
        if archives.is_file(self._download.path(f"{folder}/{name}{suffix}"))
      )
      self.suffix = next(there, ".mp4")
      self._images = Images(
        self._download, self._what, self._folders, self._download.root, self._skip
      )
    found = self._images(name + self.suffix) is not None
    if found:
      self._used.add(self._images.folder)
    return found

  def finish(self, out):
    """-> the flags of the config.

    Raises FileNotFoundError as Images; ValueError: several folders.
    """
    if self._images is None:
      return {}
    self._images.finish(out)
    if len(self._used) > 1:
      raise ValueError(
        f"Clips lie in {' and in '.join(sorted(self._used))}; put all of them into one of these "
        f"folders."
      )
    folder, flags = self._used.pop(), {}
    if os.path.abspath(folder) != os.path.abspath(os.path.join(out.folder, "videos")):
      flags[f"data.{self._key}"] = os.path.abspath(folder)
    return flags | ({"data.video_suffix": self.suffix} if self.suffix != ".mp4" else {})


def msrvtt(download, out):
  """MSR-VTT for retrieval: the 1,000 test pairs, or all clips and captions of the test split if the list of pairs is not there."""
  path = download.find(_PAIRS)
  if path is None:
    path = download.require(
      Wanted(f"{_INFO.what}, or MSRVTT_JSFUSION_test.csv, {_PAIRS.what}", _INFO.names)
    )[0]
    out.note(
      "MSRVTT_JSFUSION_test.csv is not there, so this is the whole test split; the paper's "
      "figures are about 1,000 pairs"
    )
    pairs = _sentences(path)
  else:
    pairs = _jsfusion(path)
  entries = out.entries("test.jsonl", "captions")
  clips = _Clips(download, "the clips of MSR-VTT", _MSRVTT_CLIPS, "image_root")
  for name, text in pairs:
    if clips(name):
      entries.add({"clip_name": name, "caption": text})
  out.command(
    "video_retrieval",
    "large",
    "data=msrvtt",
    f"root={out.folder}",
    flags=clips.finish(out),
    mode="evaluate",
  )


def _jsfusion(path):
  """(clip, caption) of a table with the columns video_id and sentence. Raises ValueError."""
  _, rows = tabular.open_table(path)
  for row, where in rows:
    json_stream.check(row, {"video_id": str, "sentence": str}, where)
    yield row["video_id"], row["sentence"]


def _sentences(path):
  """(clip, caption) of the clips of split "test" that a file of MSR-VTT's lists.

  Raises ValueError.
  """
  split_of = {
    entry["video_id"]: entry["split"]
    for entry, _ in json_stream.entries(path, {"video_id": str, "split": str}, "videos")
  }
  for entry, where in json_stream.entries(path, {"video_id": str, "caption": str}, "sentences"):
    if entry["video_id"] not in split_of:
      raise ValueError(
        f"{where}: video_id {entry['video_id']!r} is not among the videos of the file; get it "
        f"again."
      )
    if split_of[entry["video_id"]] == "test":
      yield entry["video_id"], entry["caption"]


def _qa_files(name):
  return [
    Wanted(
      f"{name}, the {split} questions",
      tuple(
        f"{folder}{split}_qa.json"
        for folder in ("", f"{name}/", f"{name}.zip/{name}/", f"{name}.zip/")
      ),
    )
    for split in ("train", "test")
  ]


def msrvtt_qa(download, out):
  """MSR-VTT-QA: the test questions, and the answers of training to choose from."""
  clips = _Clips(download, "the clips of MSR-VTT", _MSRVTT_CLIPS, "video_root")
  _questions(
    download.require(*_qa_files("MSRVTT-QA")), out, clips, lambda number, where: f"video{number}"
  )


def msvd_qa(download, out):
  """MSVD-QA: the test questions, and the answers of training to choose from."""
  train, test = download.require(*_qa_files("MSVD-QA"))
  mapping = download.find(
    Wanted(
      "the names of MSVD's clips",
      (
        "youtube_mapping.txt",
        "MSVD-QA/youtube_mapping.txt",
        "MSVD-QA.zip/MSVD-QA/youtube_mapping.txt",
      ),
    )
  )
  names = (
    dict(reversed(line.split()) for line in tabular.lines(mapping) if len(line.split()) == 2)
    if mapping
    else None
  )

  def name(number, where):
    if names is not None and f"vid{number}" not in names:
      raise ValueError(f"{where}: {mapping} has no clip vid{number}; get both files again.")
    return f"vid{number}" if names is None else names[f"vid{number}"]

  clips = _Clips(
    download,
    "the clips of MSVD",
    ("YouTubeClips", "videos", "video", "YouTubeClips.tar/YouTubeClips"),
    "video_root",
  )
  _questions((train, test), out, clips, name)


def _questions(paths, out, clips, name):
  """name: function (number of a clip, where) -> its name."""
  train, test = paths
  types = {"id": int, "video_id": int, "question": str, "answer": str}
  entries = out.entries("test.jsonl", "questions")
  candidates = out.entries("answers.json", "answers, those of training, frequent ones first")
  for answer, _ in Counter(
    entry["answer"] for entry, _ in json_stream.entries(train, types)
  ).most_common():
    candidates.add(answer)
  for entry, where in json_stream.entries(test, types):
    clip = name(entry["video_id"], where)
    if clips(clip):
      entries.add(
        {
          "question_id": entry["id"],
          "video_id": clip,
          "question": entry["question"],
          "answer": entry["answer"],
        }
      )
  out.command(
    "video_qa",
    "base",
    "data=video_qa",
    f"root={out.folder}",
    flags=clips.finish(out),
    mode="evaluate",
  )


_VATEX = [
  Wanted("the public test captions of VATEX", ("vatex_public_test_english_v1.1.json",)),
  Wanted("the validation captions of VATEX", ("vatex_validation_v1.0.json",)),
]


def vatex(download, out):
  """VATEX for captioning: the public test split, or the validation split if that is not there.

  Such clips as could be downloaded.
  """
  path = download.find(_VATEX[0]) or download.find(_VATEX[1]) or download.require(_VATEX[0])[0]
  entries = out.entries("test.json", "clips")
  clips = _Clips(
    download, "the clips of VATEX", ("videos", "clips"), "image_root", skip_missing=True
  )
  for entry, where in json_stream.entries(path, {"videoID": str, "enCap": list}):
    if not entry["enCap"] or not all(isinstance(text, str) for text in entry["enCap"]):
      raise ValueError(f"{where}: enCap must be a list of at least one string.")
    if clips(entry["videoID"]):
      entries.add({"videoID": entry["videoID"], "enCap": entry["enCap"]})
  out.command(
    "video_caption",
    "large",
    "data=vatex",
    f"root={out.folder}",
    flags=clips.finish(out),
    mode="evaluate",
  )
