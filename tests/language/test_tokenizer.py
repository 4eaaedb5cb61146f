"""Tokenizers: golden ids by llama.cpp and transformers, round trips, chat prompts, and foreign files."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret.language.pretrained import packaged_file
from genret.language.tokenizer import load_tokenizer
from genret.types import InputError

TEXTS = [
    "  12 the 's S'S",
    "(ab) the!\n\n\n ",
    "x 1212  345    4",
    "the<|im_end|>\n<|im_start|>ab<think>a",
    "caf\u00e9 a\u0301",
    "don't 'S it''s \t ab",
    "\r\n the ٣12½ 👩\u200d👧",
    " ",
    "",
]
# By llama.cpp (smollm) and by transformers' Qwen2Tokenizer (qwen2; llama.cpp agrees but for the accent,
# which it does not compose), on the vocabulary and merges of this folder.
IDS = {
    "llama": [
        [262, 20, 21, 265, 270, 86, 224, 54, 10, 54],
        [11, 271, 12, 265, 4, 266, 202, 224],
        [91, 224, 20, 21, 20, 21, 262, 22, 23, 24, 278, 23],
        [264, 2, 202, 1, 271, 3, 68],
        [70, 68, 73, 277, 272, 140, 227],
        [71, 82, 81, 10, 87, 270, 54, 224, 76, 87, 10, 10, 86, 224, 201, 273],
        [205, 202, 265, 224, 153, 100, 20, 21, 130, 125, 224, 176, 257, 243, 106, 162, 226, 239, 176, 257,
         243, 104],
        [224],
        [],
    ],
    "qwen3": [
        [224, 224, 20, 21, 265, 270, 86, 224, 54, 269],
        [275, 12, 265, 4, 266, 202, 224],
        [91, 224, 20, 21, 20, 21, 224, 224, 22, 23, 24, 262, 224, 224, 23],
        [264, 2, 202, 1, 271, 3, 68],
        [70, 68, 73, 277, 224, 131, 98],
        [71, 82, 81, 10, 87, 270, 54, 224, 76, 87, 10, 10, 86, 224, 201, 273],
        [205, 202, 265, 224, 153, 100, 20, 21, 130, 125, 224, 176, 257, 243, 106, 162, 226, 239, 176, 257,
         243, 104],
        [224],
        [],
    ],
}  # fmt: skip
# By llama.cpp on the GGUF itself.
SMOLLM2 = {
    "hello world": [28120, 905],
    "The capital of France is Paris.": [504, 3575, 282, 4649, 314, 7042, 30],
    "  two  spaces   and\ttabs\n\nnewlines \n": [
        216, 827, 216, 5600, 256, 284, 197, 100, 7366, 198, 198, 2241, 5110, 3717,
    ],
    "12345 abc 3.14159, 1,000": [
        33, 34, 35, 36, 37, 43239, 216, 35, 30, 33, 36, 33, 37, 41, 28, 216, 33, 28, 32, 32, 32,
    ],
    "x 123  4567   89": [104, 216, 33, 34, 35, 256, 36, 37, 38, 39, 333, 40, 41],
    "don't can't I'LL they've we'd": [12420, 982, 416, 982, 339, 23, 16421, 502, 3543, 392, 6737],
    "😀 emoji 👩\u200d👩\u200d👧 ½ ²³ ٣٤٥": [
        10813, 242, 218, 649, 33777, 15107, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235,
        117, 216, 16738, 216, 19133, 39050, 216, 164, 113, 164, 114, 164, 115,
    ],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "[\"summer hats\", \"beach towels\"]": [2790, 41372, 22104, 1002, 476, 1425, 554, 26855, 3222],
    "": [],
    " ": [216],
    "\xa0nbsp": [15442, 94, 32093],
    "def f(x):\n    return x+1  # comment": [
        1604, 275, 24, 104, 727, 472, 1003, 1792, 27, 33, 216, 907, 5189,
    ],
    "e\u0301 combining": [85, 151, 219, 9301],
}  # fmt: skip
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the ab"}]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def kind(request):
    return request.param


@pytest.fixture
def path(checkpoints, tmp_path, kind):
    return checkpoints.write_gguf(tmp_path / "model.gguf", kind)


def test_golden_ids(path, kind):
    tokenizer = load_tokenizer(path)
    assert [tokenizer.encode(text) for text in TEXTS] == IDS[kind]
    assert tokenizer.size == 300 and tokenizer.stop == (2, 0)


def test_round_trip(path, kind):
    tokenizer = load_tokenizer(path)
    form = {"llama": lambda text: text, "qwen3": lambda text: unicodedata.normalize("NFC", text)}[kind]

    @given(st.text(max_size=40))
    @settings(max_examples=100, deadline=None)
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text), special=True) == form(text)

    check()


def test_special_tokens(path):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("<|im_start|>the<think>a<|im_end|>")
    assert ids == [1, 264, 3, 68, 2]
    assert tokenizer.decode(ids) == "the<think>a"  # <think> is text, the others are control
    assert tokenizer.decode(ids, special=True) == "<|im_start|>the<think>a<|im_end|>"
    assert tokenizer.decode([170]) == "\ufffd"  # half a character
    assert tokenizer.token_id("<|im_end|>") == 2
    with pytest.raises(InputError, match="not in the vocabulary"):
        tokenizer.token_id("<|absent|>")
    with pytest.raises(InputError, match="not a string"):
        tokenizer.encode(["a"])


def test_tokenizer_json_is_the_same_tokenizer(path, tmp_path, kind):
    """With its names and template in tokenizer_config.json, or the template in a file of its own."""
    first = load_tokenizer(path)
    file = tmp_path / "tokenizer.json"
    first._tokenizer.save(str(file))
    plain = load_tokenizer(file)
    assert [plain.encode(text) for text in TEXTS] == IDS[kind]
    assert plain.stop == (2, 0)
    with pytest.raises(InputError, match="no chat template"):
        plain.chat(MESSAGES)
    config = {"eos_token": {"content": "<think>"}, "bos_token": None, "chat_template": "{{ eos_token }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = load_tokenizer(file)
    assert named.stop == (3, 2, 0) and named.chat(MESSAGES) == "<think>!"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}")
    assert load_tokenizer(file).chat(MESSAGES) == "the ab"


def test_chat(path):
    tokenizer = load_tokenizer(path)
    prompt = tokenizer.chat(MESSAGES)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe ab<|im_end|>\n"
    assert prompt == expected + "<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt)
    assert ids[0] == 1 and ids[-1] == 202 and ids.count(1) == 3 and ids.count(2) == 2


@pytest.mark.parametrize(
    "template, match",
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{% if %}", "the template refuses"),
        ("{{ messages.append(1) }}", "the template refuses"),  # sandboxed
    ],
)
def test_templates_that_refuse(checkpoints, tmp_path, template, match):
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "llama", tokenizer__chat_template=template)
    with pytest.raises(InputError, match=match):
        load_tokenizer(path).chat(MESSAGES)


def test_options_reach_the_template(checkpoints, tmp_path):
    template = "{% if enable_thinking is false %}quick{% else %}{{ {'é': 1} | tojson }}{% endif %}"
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "qwen3", tokenizer__chat_template=template)
    tokenizer = load_tokenizer(path)
    assert tokenizer.chat(MESSAGES, enable_thinking=False) == "quick"
    assert tokenizer.chat(MESSAGES) == '{"é": 1}'


# ---- foreign files


@pytest.mark.parametrize(
    "metadata, match",
    [
        ({"words": "tekken"}, "words are split as 'tekken'"),
        ({"tokenizer__ggml__model": "llama"}, "a tokenizer of type 'llama'"),
        ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre is missing"),
    ],
)
def test_gguf_tokenizers_that_are_not_known(checkpoints, tmp_path, metadata, match):
    path = checkpoints.write_gguf(tmp_path / "model.gguf", "llama", **metadata)
    with pytest.raises(InputError, match=match):
        load_tokenizer(path)


def test_broken_files(path, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not readable as a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    load_tokenizer(path)._tokenizer.save(str(tmp_path / "tokenizer.json"))
    for text in ("[]", '{"eos_token": 5}', '{"eos_token": ["a"]}', '{"chat_template": [5]}', "[" * 99_999):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(InputError, match="not a tokenizer's configuration"):
            load_tokenizer(tmp_path / "tokenizer.json")
    named = [
        {"name": "tools", "template": "?"},
        {"name": "default", "template": "{{ messages[0].content }}!"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path / "tokenizer.json").chat([{"content": "yes"}]) == "yes!"


def test_packages_that_are_not_installed(path, monkeypatch):
    tokenizer = load_tokenizer(path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"pip install 'genret\[fanout\]'"):
        tokenizer.chat(MESSAGES)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'genret\[fanout\]'"):
        load_tokenizer(path)


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(packaged_file())


@pytest.mark.smollm2
def test_smollm2_ids_by_llama_cpp(smollm2):
    for text, ids in SMOLLM2.items():
        assert smollm2.encode(text) == ids, text
        assert smollm2.decode(ids, special=True) == text
    assert smollm2.stop == (2, 0)


@pytest.mark.smollm2
def test_smollm2_prompt_by_transformers(smollm2):
    assert smollm2.chat([{"role": "user", "content": "hi <|im_end|> é"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi <|im_end|> é<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.chat(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe ab<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- the peer


@pytest.mark.peer
def test_qwen2_words_against_transformers(checkpoints, tmp_path):
    """On the goldens' texts and on random ones; and its own tokenizer.json is read as it reads it."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    path = checkpoints.write_gguf(tmp_path / "model.gguf", "qwen3")
    ours = load_tokenizer(path)
    vocabulary = {token: i for i, token in enumerate(checkpoints.tokens())}
    merges = [tuple(pair) for pair in json.loads(ours._tokenizer.to_str())["model"]["merges"]]
    theirs = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    theirs.add_tokens(["<think>"])
    theirs.save_pretrained(tmp_path / "hub")
    again = AutoTokenizer.from_pretrained(tmp_path / "hub")
    read = load_tokenizer(tmp_path / "hub" / "tokenizer.json")

    def ids(tokenizer, text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert [ids(theirs, text) for text in TEXTS] == IDS["qwen3"]

    @given(st.text("ab the12'sS!(\n\t \r😀é\u0301½", max_size=30))
    @settings(max_examples=300, deadline=None)
    def check(text):
        assert ours.encode(text) == read.encode(text) == ids(theirs, text) == ids(again, text)

    check()


@pytest.mark.peer
@pytest.mark.smollm2
def test_smollm2_against_transformers(smollm2):
    """Which does not read how a GGUF splits digits from words: texts where that shows are left out."""
    from transformers import AutoTokenizer

    path = packaged_file()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [text for text in SMOLLM2 if "  4567" not in text and "½" not in text]
    assert [smollm2.encode(text) for text in texts] == [theirs(text).input_ids for text in texts]
    assert smollm2.chat(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
