"""Packaging of ppo_nlu.

The kernels are installed as ppo_nlu.kernels and never as a top-level `kernels`: the Hugging Face
hub has a package of that very name, which transformers imports. The configs are installed beside
them, as ppo_nlu/configs.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "ppo_nlu/__init__.py").read_text("utf-8"))
README = HERE / "README.md"

setup(
    name="ppo_nlu",
    version=VERSION.group(1) if VERSION else "0",
    description="Reinforcement learning from labels for language understanding: "
    "PPO for LLMs from scratch in PyTorch",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    keywords=[
        "reinforcement learning",
        "PPO",
        "GRPO",
        "LoRA",
        "language models",
        "text classification",
        "GLUE",
        "SuperGLUE",
        "PyTorch",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["ppo_nlu", "ppo_nlu.*"]),
        "ppo_nlu.kernels",
        "ppo_nlu.configs",
    ],
    package_dir={"ppo_nlu.kernels": "kernels", "ppo_nlu.configs": "configs"},
    package_data={
        "ppo_nlu": ["py.typed", "README.md", "architectures.md", "assets/*", "assets/**/*"],
        "ppo_nlu.pretrain": ["card.md"],
        "ppo_nlu.kernels": ["*.json", "README.md"],
        "ppo_nlu.configs": ["*.yaml", "*/*.yaml", "README.md"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6,<2.14",
        "transformers>=5.0",
        "safetensors",
        "sentencepiece",
        "numpy",
        "pyyaml",
        "tqdm",
        "huggingface_hub",
        "triton; platform_system == 'Linux'",
    ],
    extras_require={
        "plot": ["matplotlib"],
        "baselines": ["scikit-learn"],
        "bench": ["matplotlib", "peft", "trl==1.16.0", "liger-kernel==0.8.5"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "parquet": ["pyarrow"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "peft",
            "scikit-learn",
            "scipy",
            "matplotlib",
            "pyarrow",
            "ruff",
            "mypy",
            "types-PyYAML",
            "setuptools>=77",
        ],
    },
)
