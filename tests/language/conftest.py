"""Two tiny checkpoints, one of each family, in exactly the formats that models are published in."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
# Heads wider than hidden_size / heads, as published Qwen3 has them.
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3}

MERGES = [
    "1 2", "Ġ 1", "Ġ Ġ", "t h", "th e", "Ġ the", "Ċ Ċ", "! Ċ", "' s", "' S", "Ġ '", "a b", "Ġ a", "Ġ ab",
    "( a", "( ab", "e r", "Ã ©", "ĠĠ ĠĠ",
]  # fmt: skip
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokens():
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*CONTROL, "<think>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    return words + [f"[unused{i}]" for i in range(LLAMA["vocab_size"] - len(words))]


def hub_tensors(kind, seed=0):
    """Random weights under their hub names, stored [out, in]."""
    c, rng = CONFIGS[kind], np.random.default_rng(seed)
    width, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    shapes = {"model.embed_tokens": (c["vocab_size"], width), "model.norm": (width,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head"] = (c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        shapes |= {
            f"{layer}.input_layernorm": (width,),
            f"{layer}.post_attention_layernorm": (width,),
            f"{layer}.self_attn.q_proj": (q, width),
            f"{layer}.self_attn.k_proj": (kv, width),
            f"{layer}.self_attn.v_proj": (kv, width),
            f"{layer}.self_attn.o_proj": (width, q),
            f"{layer}.mlp.gate_proj": (inner, width),
            f"{layer}.mlp.up_proj": (inner, width),
            f"{layer}.mlp.down_proj": (width, inner),
        }
        if kind == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm": (head,) for name in "qk"}
    return {
        f"{name}.weight": (
            1 + 0.3 * rng.normal(size=shape) if len(shape) == 1 else 0.3 * rng.normal(size=shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_hub(folder, kind, **changes):
    """config.json and model.safetensors in `folder`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    save_file(hub_tensors(kind), folder / "model.safetensors")
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
}  # fmt: skip


def write_gguf(path, kind, *, tensors=None, quantized=False, words=None, **metadata):
    """A GGUF with weights and tokenizer, as converters write it: llama has q and k permuted.

    metadata: further keys, dots written as two underscores, or None to leave one of ours away.
    """
    import gguf

    c, writer = CONFIGS[kind], gguf.GGUFWriter(path, kind)
    facts = {
        f"{kind}.block_count": c["num_hidden_layers"],
        f"{kind}.context_length": 512,
        f"{kind}.embedding_length": c["hidden_size"],
        f"{kind}.feed_forward_length": c["intermediate_size"],
        f"{kind}.attention.head_count": c["num_attention_heads"],
        f"{kind}.attention.head_count_kv": c["num_key_value_heads"],
        f"{kind}.attention.key_length": c["head_dim"],
        f"{kind}.attention.value_length": c["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        f"{kind}.rope.freq_base": c["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words or {"llama": "smollm", "qwen3": "qwen2"}[kind],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in facts.items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key, value)
    vocabulary = tokens()
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(CONTROL) + [4] + [1] * (len(vocabulary) - len(CONTROL) - 1))
    writer.add_token_merges(MERGES)
    for name, tensor in (hub_tensors(kind) if tensors is None else tensors).items():
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = tensor.reshape(-1, 2, c["head_dim"] // 2, tensor.shape[-1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        if quantized and tensor.ndim == 2 and tensor.shape[-1] % 32 == 0:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def checkpoints():
    """The functions above, under one name."""
    return SimpleNamespace(
        configs=CONFIGS, tensors=hub_tensors, write_hub=write_hub, write_gguf=write_gguf, tokens=tokens
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """kind -> (DecoderConfig, "params" on the device) of the tiny checkpoints."""
    from genret.language.weights import load_safetensors

    folder = tmp_path_factory.mktemp("tiny")
    loaded = {kind: load_safetensors(write_hub(folder / kind, kind)) for kind in CONFIGS}
    return {kind: (config, jax.device_put(params)) for kind, (config, params) in loaded.items()}
