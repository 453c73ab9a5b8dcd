"""Package metadata: the dependency ranges that megashear works with.

The versions that this repository is developed and tested with are pinned in constraints.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that the package states, without importing it and all that it needs."""
    text = (HERE / "megashear" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("megashear/__init__.py states no __version__")
    return found[1]


setup(
    name="megashear",
    version=version(),
    description="Structured pruning and dynamic batch loading for Megatron-Core (Sheared LLaMA)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megashear*"]),
    package_data={"megashear.report": ["templates/*"]},
    install_requires=[
        "jinja2>=3.1",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "psutil",  # Megatron-Core's checkpoint writers hang without it, and do not declare it
        "pyyaml>=6",
        "rich>=13.7",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "torch>=2.6",
        "tqdm",
        "transformers>=4.45",
        "zstandard>=0.22",
    ],
    extras_require={
        # Apex is optional too, but is built from NVIDIA's sources: the package index has another
        # project under that name.
        "te": ["transformer-engine[pytorch]>=2.0"],
        "dali": ["nvidia-dali-cuda130>=1.50"],
        "dali-cuda12": ["nvidia-dali-cuda120>=1.50"],
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.31"],
        "dev": [
            "codespell>=2.3",
            "ctranslate2>=4.5",  # another engine, to run what was exported
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "tensorboard>=2.14",
            "types-PyYAML",
            "wandb>=0.31",
        ],
    },
    entry_points={"console_scripts": ["megashear=megashear.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
