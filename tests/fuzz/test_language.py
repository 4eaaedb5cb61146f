"""Damaged checkpoints: GGUF and its metadata, safetensors, its configuration and tokenizer, text encoders."""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from genret.language.encoder import load_encoder
from genret.language.pretrained import load_language_model
from genret.language.tokenizer import load_tokenizer
from genret.language.weights import load_gguf, load_safetensors
from genret.types import InputError


def written(tree) -> bytes:
    return json.dumps(tree).encode()


def _checkpoints(name="conftest"):
    spec = importlib.util.spec_from_file_location(
        "checkpoints", Path(__file__).parent.parent / "language" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gguf_files():
    with tempfile.TemporaryDirectory() as folder:
        return [{"model.gguf": _checkpoints().write_gguf(Path(folder) / "model.gguf", "llama").read_bytes()}]


def other_metadata(draw, _):
    """A whole GGUF with a few facts changed, or taken away."""
    keys = "block_count embedding_length feed_forward_length attention.head_count attention.head_count_kv "
    keys += "attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base "
    keys += "rope.dimension_count expert_count"
    keys = [f"llama.{key}" for key in keys.split()]
    keys += [f"tokenizer.{k}" for k in ("ggml.model", "ggml.pre", "ggml.bos_token_id", "ggml.eos_token_id")]
    odd = [
        None,
        0,
        1,
        7,
        2**31,
        2**32 - 1,
        "",
        "none",
        "x",
        0.0,
        -1.5,
        float("nan"),
        float("inf"),
        True,
        False,
    ]
    facts = draw(st.dictionaries(st.sampled_from(keys), st.sampled_from(odd), min_size=1, max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        return {"model.gguf": _checkpoints().write_gguf(path, "llama", **facts).read_bytes()}


def hub_files():
    made = _checkpoints()
    with tempfile.TemporaryDirectory() as folder:
        made.write_hub(Path(folder), "qwen3")
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    index = {"metadata": {}, "weight_map": dict.fromkeys(made.hub_tensors("qwen3"), "model.safetensors")}
    return [files | {"model.safetensors.index.json": written(index)}]


def with_tokenizer():
    """The checkpoint as `load_language_model` reads it, with what says how its tokenizer is asked."""
    with tempfile.TemporaryDirectory() as folder:
        path = _checkpoints().write_gguf(Path(folder) / "model.gguf", "qwen3")
        load_tokenizer(path)._tokenizer.save(str(Path(folder) / "tokenizer.json"))
        words = (Path(folder) / "tokenizer.json").read_bytes()
    about = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages[0].content }}"}
    return [hub_files()[0] | {"tokenizer.json": words, "tokenizer_config.json": written(about)}]


def encoder_files():
    with tempfile.TemporaryDirectory() as folder:
        _checkpoints("test_encoder").write_bert(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return [files | {"1_Pooling/config.json": written({"pooling_mode_mean_tokens": True})}]


def ask(folder):
    load_language_model(folder).tokenizer.chat([{"role": "user", "content": "x"}])


LOADERS = {
    "gguf": lambda damage: (gguf_files, damage, lambda f: load_language_model(f / "model.gguf")),
    "metadata": lambda _: (lambda: [{}], other_metadata, lambda f: load_gguf(f / "model.gguf")),
    "safetensors": lambda damage: (hub_files, damage, load_safetensors),
    "hub": lambda damage: (with_tokenizer, damage, ask),
    "encoder": lambda damage: (encoder_files, damage, load_encoder),
}


@pytest.mark.parametrize("size", [1, 4, 8])  # of an element; past the end numpy gives none, and no error
def test_a_count_of_2_to_60_is_held_against_the_size_of_the_file(tmp_path, size):
    content, key = gguf_files()[0]["model.gguf"], b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 4  # an array: the type of its elements, their count
    kind = {1: 0, 4: 5, 8: 11}[size].to_bytes(4, "little")
    (tmp_path / "model.gguf").write_bytes(
        content[:at] + kind + (1 << 60).to_bytes(8, "little") + content[at + 12 :]
    )
    with pytest.raises(InputError, match="not readable as GGUF .*past the end"):
        load_gguf(tmp_path / "model.gguf")


def test_layers_are_held_against_the_tensors(tmp_path):
    _checkpoints().write_gguf(tmp_path / "model.gguf", "llama", llama__block_count=2**30)
    with pytest.raises(InputError, match="1073741824 layers, and 21 tensors"):
        load_gguf(tmp_path / "model.gguf")


def test_damage_is_said_in_one_error(survives):
    survives()
