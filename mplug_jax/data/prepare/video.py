"""MSR-VTT, MSR-VTT-QA, MSVD-QA and VATEX: test files of the zero-shot configs of video."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted, zipped
from mplug_jax.data.prepare.writer import Output
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
  """Finds clips, all with one suffix in one folder, and tells the config where they are."""

  def __init__(
    self,
    download: Download,
    title: str,
    folders: Sequence[str],
    key: str,
    skip_missing: bool | None = None,
  ):
    """Makes a finder.

    Args:
      download: the downloaded files.
      title: the official download that the clips belong to, in words.
      folders: folders below the root in which they may be.
      key: the key of config.data for their folder.
      skip_missing: as in Images.
    """
    self._download = download
    self._title = title
    self._folders = folders
    self._key = key
    self._skip = skip_missing
    self._images: Images | None = None
    self._used: set[str] = set()
    self.suffix = ".mp4"

  def __call__(self, name: str) -> bool:
    """Returns whether a clip exists; raises FileNotFoundError as Images does."""
    if self._images is None:  # the first clip decides the suffix
      self.suffix = self._suffix(name)
      root = self._download.root
      self._images = Images(self._download, self._title, self._folders, root, self._skip)
    if self._images(name + self.suffix) is None:
      return False
    self._used.add(self._images.folder)
    return True

  def _suffix(self, name: str) -> str:
    """Returns the suffix of the clip `name`, .mp4 if there is none."""
    for suffix in (".mp4", ".avi"):
      for folder in self._folders:
        if archives.is_file(self._download.path(f"{folder}/{name}{suffix}")):
          return suffix
    return ".mp4"

  def finish(self, out: Output) -> dict[str, str]:
    """Notes how many clips are missing.

    Args:
      out: takes the note.

    Returns:
      The settings by which the config finds the clips.

    Raises:
      FileNotFoundError: as in Images.finish.
      ValueError: the clips are in several folders.
    """
    if self._images is None:
      return {}
    self._images.finish(out)
    if len(self._used) > 1:
      raise ValueError(
        f"Clips are in {' and in '.join(sorted(self._used))}; put all of them into one of these "
        "folders."
      )
    folder = os.path.abspath(self._used.pop())
    flags: dict[str, str] = {}
    if folder != os.path.abspath(os.path.join(out.folder, "videos")):
      flags[f"data.{self._key}"] = folder
    if self.suffix != ".mp4":
      flags["data.video_suffix"] = self.suffix
    return flags


def msrvtt(download: Download, out: Output) -> None:
  """Writes the 1,000 test pairs, or the whole test split if the list of pairs is missing.

  Args:
    download: the downloaded files.
    out: where the file is written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  path = download.find(_PAIRS)
  if path is None:
    title = f"{_INFO.title}, or MSRVTT_JSFUSION_test.csv, {_PAIRS.title}"
    pairs = _sentences(download.require(Wanted(title, _INFO.names))[0])
    out.note(
      "MSRVTT_JSFUSION_test.csv is missing, so this is the whole test split; the paper reports "
      "1,000 pairs"
    )
  else:
    pairs = _jsfusion(path)
  entries = out.entries("test.jsonl", "captions")
  clips = _Clips(download, "the clips of MSR-VTT", _MSRVTT_CLIPS, "image_root")
  for name, text in pairs:
    if clips(name):
      entries.add({"clip_name": name, "caption": text})
  _command(out, clips, "video_retrieval", "large", "msrvtt")


def _command(out: Output, clips: _Clips, config: str, size: str, source: str) -> None:
  """Prints the command that evaluates."""
  flags = clips.finish(out)
  root = f"root={out.folder}"
  out.command(config, size, f"data={source}", root, flags=flags, mode="evaluate")


def _jsfusion(path: str) -> Iterator[tuple[str, str]]:
  """Yields (clip, caption) of a table with columns video_id and sentence; raises ValueError."""
  _, rows = tabular.open_table(path)
  for row, location in rows:
    json_stream.check(row, {"video_id": str, "sentence": str}, location)
    yield row["video_id"], row["sentence"]


def _sentences(path: str) -> Iterator[tuple[str, str]]:
  """Yields (clip, caption) of the test split in MSR-VTT's annotations; raises ValueError."""
  split_of = {
    entry["video_id"]: entry["split"]
    for entry, _ in json_stream.entries(path, {"video_id": str, "split": str}, "videos")
  }
  types = {"video_id": str, "caption": str}
  for entry, location in json_stream.entries(path, types, "sentences"):
    if entry["video_id"] not in split_of:
      raise ValueError(
        f"{location}: video_id {entry['video_id']!r} is not among the videos of the file; get it "
        "again."
      )
    if split_of[entry["video_id"]] == "test":
      yield entry["video_id"], entry["caption"]


def _qa_files(name: str) -> list[Wanted]:
  folders = ("", f"{name}/", f"{name}.zip/{name}/", f"{name}.zip/")
  return [
    Wanted(
      f"{name}, the {split} questions", tuple(f"{folder}{split}_qa.json" for folder in folders)
    )
    for split in ("train", "test")
  ]


def msrvtt_qa(download: Download, out: Output) -> None:
  """Writes the test questions, and the answers of training as candidates.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  clips = _Clips(download, "the clips of MSR-VTT", _MSRVTT_CLIPS, "video_root")
  paths = download.require(*_qa_files("MSRVTT-QA"))
  _questions(paths, out, clips, lambda number, location: f"video{number}")


_MSVD_NAMES = Wanted(
  "the names of MSVD's clips",
  (
    "youtube_mapping.txt",
    "MSVD-QA/youtube_mapping.txt",
    "MSVD-QA.zip/MSVD-QA/youtube_mapping.txt",
  ),
)


def msvd_qa(download: Download, out: Output) -> None:
  """Writes the test questions, and the answers of training as candidates.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  paths = download.require(*_qa_files("MSVD-QA"))
  mapping = download.find(_MSVD_NAMES)
  names = _clip_names(mapping) if mapping else None

  def name(number: int, location: str) -> str:
    clip = f"vid{number}"
    if names is None:
      return clip
    if clip not in names:
      raise ValueError(f"{location}: {mapping} has no clip {clip}; get both files again.")
    return names[clip]

  folders = ("YouTubeClips", "videos", "video", "YouTubeClips.tar/YouTubeClips")
  clips = _Clips(download, "the clips of MSVD", folders, "video_root")
  _questions(paths, out, clips, name)


def _clip_names(path: str) -> dict[str, str]:
  """Returns {number of a clip: its name} of a file with lines "NAME vid1"; raises ValueError."""
  names: dict[str, str] = {}
  for number, line in enumerate(tabular.lines(path), 1):
    if not line.strip():
      continue
    name, space, clip = line.strip().rpartition(" ")
    if not space or names.setdefault(clip, name) != name:
      problem = "gives another name than an earlier one" if space else "has no name and number"
      raise ValueError(f"{path}, line {number}: {line.strip()!r} {problem}; get the file again.")
  return names


def _questions(
  paths: Sequence[str], out: Output, clips: _Clips, name: Callable[[int, str], str]
) -> None:
  """Writes questions about clips.

  Args:
    paths: the questions of training and of the test.
    out: where the files are written.
    clips: finds the clips.
    name: maps (number of a clip, location of the question) to the name of the clip.
  """
  train, test = paths
  types = {"id": int, "video_id": int, "question": str, "answer": str}
  entries = out.entries("test.jsonl", "questions")
  candidates = out.entries("answers.json", "answers, those of training, frequent ones first")
  counts = Counter(entry["answer"] for entry, _ in json_stream.entries(train, types))
  for answer, _ in counts.most_common():
    candidates.add(answer)
  for entry, location in json_stream.entries(test, types):
    clip = name(entry["video_id"], location)
    if clips(clip):
      row: dict[str, Any] = {"question_id": entry["id"], "video_id": clip}
      entries.add(row | {key: entry[key] for key in ("question", "answer")})
  _command(out, clips, "video_qa", "base", "video_qa")


_VATEX = [
  Wanted("the public test captions of VATEX", ("vatex_public_test_english_v1.1.json",)),
  Wanted("the validation captions of VATEX", ("vatex_validation_v1.0.json",)),
]


def vatex(download: Download, out: Output) -> None:
  """Writes the public test split, or else the validation split, of the clips that exist.

  Args:
    download: the downloaded files.
    out: where the file is written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  path = download.find(_VATEX[0]) or download.find(_VATEX[1]) or download.require(_VATEX[0])[0]
  entries = out.entries("test.json", "clips")
  clips = _Clips(
    download, "the clips of VATEX", ("videos", "clips"), "image_root", skip_missing=True
  )
  for entry, location in json_stream.entries(path, {"videoID": str, "enCap": list}):
    if not entry["enCap"] or not all(isinstance(text, str) for text in entry["enCap"]):
      raise ValueError(f"{location}: enCap must be a list of at least one string.")
    if clips(entry["videoID"]):
      entries.add({"videoID": entry["videoID"], "enCap": entry["enCap"]})
  _command(out, clips, "video_caption", "large", "vatex")


MSRVTT = Dataset("MSR-VTT's test clips for retrieval.", msrvtt)
MSRVTT_QA = Dataset("MSR-VTT-QA's test questions.", msrvtt_qa, own_folder=True)
MSVD_QA = Dataset("MSVD-QA's test questions.", msvd_qa)
VATEX = Dataset("VATEX's public test clips for captioning.", vatex)
