from setuptools import find_packages, setup

setup(
  name="mplug_jax",
  version="0.1.0",
  description="mPLUG (Li et al., EMNLP 2022) in JAX/Flax for TPU and GPU meshes",
  long_description=open("README.md", encoding="utf-8").read(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["mplug_jax", "mplug_jax.*"]),
  python_requires=">=3.11",
  # Lower bounds are the oldest that was run (jax 0.10 is the last one for Python 3.11).
  install_requires=[
    "jax>=0.10.0",
    "flax>=0.12",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "tensorflow-datasets>=4.9.9",
    "sentencepiece>=0.2",
    "ml_collections>=1.0",
    "clu>=0.0.12",
    "grain>=0.2.12",
    "fsspec",
    "msgpack>=1.0",
    "numpy>=2.0",
    "tokenizers>=0.21",
    "easy-vqa>=1.0",
    "Pillow>=11",
    "opencv-python-headless>=4.10",
    "tensorboardX>=2.6",
    "matplotlib>=3.9",
  ],
  extras_require={
    "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.8", "flatbuffers", "scikit-image>=0.25"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "convert": ["torch", "safetensors"],
    "eval": ["pycocoevalcap"],  # METEOR and SPICE, which need Java
    "video": ["av"],  # codecs that OpenCV lacks
    "export": ["flatbuffers"],  # tools/export_serving.py
    "demo": ["gradio>=5"],  # mplug_jax/demo.py
    "notebooks": ["scikit-image>=0.25"],  # its photographs
  },
)
