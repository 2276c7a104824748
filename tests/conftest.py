"""Eight virtual CPU devices for every test, set before JAX starts."""

import gc
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No source lines in compiled programs: lowering and compiling take 5% less.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  # The tests compile hundreds of small programs and run each for milliseconds: unoptimized code is
  # three times faster.
  options = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
  # Without these passes, and in one module, a train step compiles in three quarters of the time.
  skipped = (
    "batch-dot-simplification",
    "constant_folding",
    "cpu-parallel-task-assigner",
    "dynamic-dimension-simplifier",
    "gemv-rewriter",
    "reshape-mover",
    "simplify-while-loops",
    "tree_reduction_rewriter",
    "while-loop-invariant-code-motion",
  )
  options.append(f"--xla_disable_hlo_passes={','.join(skipped)}")
  if (
    importlib.metadata.version("jax") < "0.11"
  ):  # newer ones do not know it, and stop at what they do not know
    options.append("--xla_cpu_use_fusion_emitters=false")
    options.append("--xla_cpu_parallel_codegen_split_count=1")
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *options])

# Many tests compile the same program; processes that tests start compile them again. What takes a
# while is kept until the tests end.
_COMPILED = (
  ""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ
  else tempfile.mkdtemp(prefix="mplug_jax_compiled_")
)
if _COMPILED:
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": _COMPILED,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }

import pytest  # noqa: E402
from absl import flags  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

gc.set_threshold(100_000, 20, 100)  # as host.prepare sets it: tracing makes objects by the million

# Grain's worker processes read absl flags, which nobody parses under pytest.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def one_device():
  """Whole runs use one of the eight devices, and equal ones share their programs."""
  from mplug_jax.training import evaluate, loop
  from mplug_jax.training.preflight import updates
  from tests.support import shared_builds

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", shared_builds.build)
    patch.setattr(updates, "build", shared_builds.build)
    patch.setattr(evaluate, "build_for_evaluation", shared_builds.build_for_evaluation)
    yield


@pytest.fixture(scope="module")
def drawn_start(one_device):
  """As `one_device`; runs start from a state drawn on the host, for which nothing is compiled."""
  from mplug_jax.training import loop
  from mplug_jax.training.preflight import updates
  from tests.support import shared_builds

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build", shared_builds.build_drawn)
    patch.setattr(updates, "build", shared_builds.build_drawn)
    yield


def pytest_sessionfinish():
  shutil.rmtree(_COMPILED, ignore_errors=True)


# Files that run in one process, because they share builds, traced functions and programs. Other
# files are groups of their own.
_GROUPS = {
  "tests/test_doctor.py": "vqa_run",
  "tests/test_remote_workdir.py": "vqa_run",
  "tests/training/test_train_errors.py": "vqa_run",
  "tests/training/test_train_loop.py": "vqa_run",
  "tests/test_bad_input.py": "vqa_files",
  "tests/tasks/test_vqa.py": "vqa_files",
  "tests/tasks/test_grounding.py": "grounding",
  "tests/tasks/test_grounding_boxes.py": "grounding",
  "tests/tasks/test_grounding_run.py": "grounding",
  "tests/data/prepare/test_captions.py": "caption_runs",
  "tests/data/storage/test_shard_access.py": "caption_runs",
  "tests/tasks/test_caption_run.py": "caption_runs",
  "tests/conversion/test_bert.py": "conversion",
  "tests/conversion/test_forms.py": "conversion",
  "tests/conversion/test_mapping.py": "conversion",
  "tests/conversion/test_sources.py": "conversion",
  "tests/conversion/test_weights.py": "conversion",
  "tests/flops/test_formulas.py": "flops",
  "tests/flops/test_traced.py": "flops",
  "tests/models/test_gradients.py": "models",
  "tests/models/test_models.py": "models",
  "tests/scenes/test_pairs.py": "scenes",
  "tests/scenes/test_scenes.py": "scenes",
}
# Groups that take longest, first: a long one that starts last leaves one of two processes idle.
_LONGEST = (
  "tests/test_notebooks.py",
  "vqa_run",
  "tests/test_distributed.py",
  "tests/performance/test_tpu.py",
  "tests/training/test_step.py",
  "vqa_files",
  "grounding",
  "tests/tasks/test_pretrain.py",
  "tests/test_checks.py",
  "tests/tasks/test_classification.py",
  "tests/tasks/test_video.py",
  "tests/test_earlier_runs.py",
  "tests/ops/test_attention.py",
  "tests/parity/test_tasks.py",
)


def _group(nodeid):
  """Returns the group of a test."""
  file = nodeid.split("::")[0]
  return _GROUPS.get(file, file)


class _Scheduling(LoadScopeScheduling):
  """Gives the tests of a group to one process.

  The mark xdist_group does not do so: pytest-xdist 3.8 writes it into node ids, which pytest 9.2
  ignores.
  """

  def _split_scope(self, nodeid):
    return _group(nodeid)


def pytest_xdist_make_scheduler(config, log):
  return _Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
  if missing := [file for file in _GROUPS if not (config.rootpath / file).exists()]:
    raise pytest.UsageError(f"tests/conftest.py groups {missing[0]}, which does not exist.")
  order = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: order.get(_group(item.nodeid), len(order)))
