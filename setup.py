"""Installs mmx. Python 3.11 and newer Pythons get different JAX versions: no newer JAX supports 3.11 (README)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mmx",
    version="0.1.0",
    description="MiniMax-01 in JAX: hybrid lightning attention and mixture of experts, trained on TPU and GPU meshes",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["mmx", "mmx.*", "pallas_kernels", "pallas_kernels.*", "launch", "configs", "configs.*"]
    ),
    package_data={"pallas_kernels": ["*/*.json"], "mmx": ["pod/*.json", "plan/*.json"]},
    install_requires=[
        "jax>=0.10.2,<0.11.1; python_version < '3.12'",
        "flax>=0.12.8,<0.12.9; python_version < '3.12'",
        "jax>=0.11.2,<0.13; python_version >= '3.12'",
        "flax>=0.12.9,<0.13; python_version >= '3.12'",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8.6,<0.9",
        "tensorstore>=0.1.86",
        "einops>=0.8.2,<0.9",
        "absl-py>=2.4,<3",
        "ml_collections>=1.1,<2",
        "tokenizers>=0.22,<0.24",
        "numpy>=2.0,<3",
        "ml_dtypes>=0.5",
        "tensorboardX>=2.6.5,<3",
        "matplotlib>=3.10,<4",
    ],
    extras_require={
        "tpu": [
            "jax[tpu]>=0.10.2,<0.11.1; python_version < '3.12'",
            "jax[tpu]>=0.11.2,<0.13; python_version >= '3.12'",
        ],
        "cuda": [
            "jax[cuda13]>=0.10.2,<0.11.1; python_version < '3.12'",
            "jax[cuda13]>=0.11.2,<0.13; python_version >= '3.12'",
        ],
        "data": ["pyarrow>=20"],
        "convert": ["torch>=2.13", "transformers>=5.23,<6", "safetensors>=0.8"],
        "dev": ["pytest>=9", "pytest-xdist>=3.8", "ruff>=0.15", "pyarrow>=20"],
    },
)
