"""Weights of `Decoder` from the two formats they are published in: GGUF, and safetensors with config.json.

Both return float32 numpy arrays on the host, checked one by one against the module's shapes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from genret.language.decoder import Decoder, DecoderConfig
from genret.types import InputError, PyTree

INSTALL = "pip install 'genret[fanout]'"
_FETCH = "The file is truncated or foreign: fetch it again."

# Module of `Decoder` -> its name in a GGUF and in a hub checkpoint; {} is the layer.
_TENSORS = {
    "embed_tokens": ("token_embd", "model.embed_tokens"),
    "norm": ("output_norm", "model.norm"),
    "lm_head": ("output", "lm_head"),
    "input_layernorm": ("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    "post_attention_layernorm": ("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    "q_proj": ("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    "k_proj": ("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    "v_proj": ("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    "o_proj": ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    "q_norm": ("blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    "k_norm": ("blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
    "gate_proj": ("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    "up_proj": ("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    "down_proj": ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
}


def read_gguf(path: str | Path) -> Any:
    """An open `gguf.GGUFReader` with its `path`; raises InputError when `path` is no whole GGUF file."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("gguf", f"{error.name} is not installed", INSTALL) from error
    if not os.path.isfile(path):
        raise InputError(str(path), "no such file", "Pass the path of a .gguf file.")

    class Bounded(gguf.GGUFReader):
        """Past the end of the file numpy would give it nothing, and it would go on for 2^60 elements."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"{count} elements at {offset} are past the end")
            self.data = np.asarray(self.data)  # slices of a memmap cost twice as much, and there are 250,000
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Bounded(path)
    except Exception as error:  # a cut file fails wherever its end happens to be
        raise InputError(str(path), f"not readable as GGUF ({error})", _FETCH) from error
    reader.path = str(path)
    return reader


def gguf_value(reader: Any, key: str) -> Any:
    """The metadata value of `key`, or None; raises InputError for a text that is none."""
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except ValueError as error:
        raise InputError(reader.path, f"{key} is not readable ({error})", _FETCH) from error


def load_gguf(path: str | Path) -> tuple[DecoderConfig, PyTree]:
    """Sizes and "params" of a GGUF of architecture llama or qwen3, quantised or not.

    Raises InputError for a file that is missing, truncated or foreign, for an architecture or option that
    `Decoder` does not compute, and for a tensor that is missing, unknown or of the wrong shape.
    """
    return decoder_of(read_gguf(path))


def decoder_of(reader: Any) -> tuple[DecoderConfig, PyTree]:
    """`load_gguf` of an open GGUF (`read_gguf`)."""
    path = reader.path
    config = _gguf_config(path, reader)
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    llama = gguf_value(reader, "general.architecture") == "llama"

    def take(module: str, layer: str) -> np.ndarray | None:
        from gguf import quants

        found = tensors.pop(_TENSORS[module][0].format(layer), None)
        if found is None:
            return None
        try:
            tensor = quants.dequantize(found.data, found.tensor_type)
        except NotImplementedError as error:
            problem = f"{found.name} is {found.tensor_type.name}"
            raise InputError(path, problem, "Take a quantisation that gguf reads.") from error
        if llama and module in ("q_proj", "k_proj"):
            return _unpermuted(tensor, config.head_dim)
        return tensor

    return config, _params(config, take, tensors, path)


def _unpermuted(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from llama-architecture GGUF order, where the pairs that rotate together are
    neighbours, to ours, where they are half a head apart."""
    if tensor.shape[0] % head_dim:
        return tensor  # of the wrong shape, which is said below
    return tensor.reshape(-1, head_dim // 2, 2, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)


def _gguf_config(path: str, reader: Any) -> DecoderConfig:
    kind = gguf_value(reader, "general.architecture")
    if kind not in ("llama", "qwen3"):
        raise InputError(str(path), f"architecture {kind!r}", "This decoder computes llama and qwen3 only.")

    def read(key: str, default: Any = None) -> Any:
        value = gguf_value(reader, f"{kind}.{key}")
        if value is None and default is None:
            raise InputError(str(path), f"{kind}.{key} is missing", _FETCH)
        return default if value is None else value

    def number(key: str, default: Any = None) -> Any:
        value = read(key, default)
        if not isinstance(value, (int, float)) or not value > 0:
            raise InputError(str(path), f"{kind}.{key} is {value!r}", _FETCH)
        return value

    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise InputError(str(path), "tensor token_embd.weight is missing", _FETCH)
    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", width // heads or 1)
    expected = {
        "rope.scaling.type": "none",
        "rope.dimension_count": head_dim,
        "attention.value_length": head_dim,
        "expert_count": 0,
    }
    for key, value in expected.items():
        if (found := read(key, value)) != value:
            problem = f"{kind}.{key} is {found!r}"
            raise InputError(str(path), problem, f"This decoder computes {value!r} only.")
    return DecoderConfig(
        vocab_size=int(shapes["token_embd.weight"][-1]),
        hidden_size=width,
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=number("feed_forward_length"),
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        rope_theta=float(number("rope.freq_base", 10_000.0)),
        tie_word_embeddings="output.weight" not in shapes,
        qk_norm=kind == "qwen3",
    )


def load_safetensors(folder: str | Path) -> tuple[DecoderConfig, PyTree]:
    """Sizes and "params" of a hub checkpoint of type llama or qwen3.

    folder: holds config.json, and model.safetensors or model.safetensors.index.json with its shards.
    Raises InputError as `load_gguf` does.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError("safetensors", f"{error.name} is not installed", INSTALL) from error
    folder = Path(folder)
    config = _hub_config(folder)
    files, shards = {}, _shards(folder)
    for shard in shards:
        if not os.path.isfile(shard):  # also where its name can be none
            raise InputError(str(folder), f"{shard.name} is missing", "Pass a whole checkpoint folder.")
        try:
            files[shard] = safe_open(shard, "np")
        except (SafetensorError, OSError) as error:
            raise InputError(str(shard), f"not readable as safetensors ({error})", _FETCH) from error
    where = {name.removesuffix(".weight"): file for file in files.values() for name in file.keys()}
    for name in list(where):
        # Recomputed here, or a second copy of the tied table.
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head" and config.tie_word_embeddings):
            del where[name]

    def take(module: str, layer: str) -> np.ndarray | None:
        name = _TENSORS[module][1].format(layer)
        if name not in where:
            return None
        try:
            return where.pop(name).get_tensor(f"{name}.weight")
        except (SafetensorError, TypeError, AttributeError) as error:  # a dtype numpy has no name for
            raise InputError(str(folder), f"{name} is not readable ({error})", _FETCH) from error

    return config, _params(config, take, where, folder)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return sorted(
            {folder / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(str(index), f"not an index of shards ({error!r})", _FETCH) from error


def _hub_config(folder: Path) -> DecoderConfig:
    """config.json, with everything this decoder does not compute refused."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(str(folder), "config.json is missing", "Pass the folder of a hub checkpoint.")
    try:
        raw = json.loads(path.read_text())
        rope = raw.get("rope_parameters") or {}  # where transformers 5 keeps it
        kind, heads = raw["model_type"], raw["num_attention_heads"]
        config = dict(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            intermediate_size=raw["intermediate_size"],
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            str(path), f"not a decoder's configuration ({error!r})", "Fetch it again."
        ) from error
    if kind not in ("llama", "qwen3"):
        raise InputError(str(path), f"model_type {kind!r}", "This decoder computes llama and qwen3 only.")
    scaling = raw.get("rope_scaling") or rope
    found = {
        "hidden_act": raw.get("hidden_act", "silu"),
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "use_sliding_window": raw.get("use_sliding_window", False),
        "rope_type": scaling.get("rope_type", scaling.get("type", "default")),
        "rope_interleaved": raw.get("rope_interleaved", False),
        "quantization_config": raw.get("quantization_config"),
    }
    expected = {"hidden_act": "silu", "rope_type": "default", "quantization_config": None}
    for name, value in found.items():
        if value != expected.get(name, False):
            problem = f"{name} is {value!r}"
            raise InputError(str(path), problem, f"This decoder computes {expected.get(name, False)!r} only.")
    return DecoderConfig(**config)


def _params(
    config: DecoderConfig,
    take: Callable[[str, str], np.ndarray | None],
    left: dict[str, Any],
    path: str | Path,
) -> PyTree:
    """Every leaf of the module from `take(module, layer)`, which removes what it gives from `left`."""
    if config.num_hidden_layers > len(left):  # before a module of them is made
        problem = f"{config.num_hidden_layers} layers, and {len(left)} tensors"
        raise InputError(str(path), problem, "Take configuration and weights from one checkpoint.")
    tokens, mask = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    init = Decoder(dataclasses.replace(config, num_hidden_layers=1)).init  # all have the same shapes
    shapes = jax.eval_shape(lambda t, m: init(jax.random.key(0), t, m)["params"], tokens, mask)
    wanted = {}
    for key, leaf in traverse_util.flatten_dict(shapes).items():
        layers = range(config.num_hidden_layers) if key[0] == "layers_0" else ()
        wanted |= {(f"layers_{i}", *key[1:]): leaf for i in layers} or {key: leaf}
    params = {}
    for key, leaf in wanted.items():
        module, layer = key[-2], key[0].removeprefix("layers_")
        tensor = take(module, layer)
        name = "/".join(key)
        if tensor is None:
            raise InputError(str(path), f"tensor of {name} is missing", "Take a whole checkpoint.")
        tensor = tensor.T if key[-1] == "kernel" else tensor  # stored [out, in]
        if tensor.shape != leaf.shape:
            problem = f"tensor of {name} is {tensor.shape}, the configuration asks for {leaf.shape}"
            raise InputError(str(path), problem, "Take both from one checkpoint.")
        params[key] = np.ascontiguousarray(tensor, np.float32)
    if left:
        problem = f"unknown tensors, first {min(left)}"
        raise InputError(str(path), problem, "Take a checkpoint of a plain llama or qwen3.")
    return traverse_util.unflatten_dict(params)
