"""A data set of questions about gray pictures, as an extension would add it: one file and one row.

Distributed as gray.txt, lines "SPLIT,IMAGE,QUESTION,ANSWER", and a folder of pictures.
"""

from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted
from mplug_jax.data.prepare.writer import Output
from mplug_jax.data.storage import tabular

_ROWS = Wanted("the questions of Gray", ("gray.txt", "gray.zip/gray.txt"))


def gray(download: Download, out: Output) -> None:
  """Writes the questions of every split."""
  (path,) = download.require(_ROWS)
  images = Images(download, "the pictures of Gray", ("pictures", "gray.zip/pictures"), out.folder)
  entries = {split: out.entries(f"{split}.jsonl", "questions") for split in ("train", "val")}
  for line in tabular.lines(path):
    split, name, question, answer = line.strip().split(",")
    if image := images(name):
      entries[split].add({"image": image, "question": question, "answer": answer})
  images.finish(out)
  out.command("vqa", "base", "data=jsonl", f"root={out.folder}", mode="train")


GRAY = Dataset("Gray, questions about gray pictures.", gray)
