"""The config argument: what follows the colon of --config=configs/vqa.py:base,data=jsonl."""

# In the order in which a config looks for files.
SUFFIXES = (
  ".jsonl",
  ".json",
  ".csv",
  ".tsv",
  ".parquet",
  ".jsonl.gz",
  ".json.gz",
  ".csv.gz",
  ".tsv.gz",
)
