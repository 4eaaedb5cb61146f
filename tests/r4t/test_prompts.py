"""Prompts and answers: nothing that a model writes may raise, and what is well-formed comes back."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genret.r4t.prompts import EXAMPLES, SHORT, TASKS, chat, few_shot, line, stop_tokens
from genret.types import InputError

FORMS = [SHORT, few_shot(), chat("themes"), chat("items"), line()]

json_like = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
anything = st.text() | json_like.map(json.dumps) | st.lists(st.text()).map(json.dumps)
pieces = st.sampled_from(
    ["<queries>", "</queries>", "<think>", '["a"]', '["', "\n", "[", "\\ud800", "[" * 50]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(anything | pieces).map("".join), st.integers(1, 12), st.sampled_from(FORMS))
@example("[" * 200_000, 10, SHORT)  # deeper than the parser goes
@example("9" * 5_000, 10, SHORT)  # longer than an integer may be
@example('["\\ud800"]', 10, SHORT)  # a lone surrogate: no UTF-8
@example('["a\\u0000b", "\\u200b", " "]', 10, SHORT)
@example(f"<queries>{'[' * 200_000}</queries>", 10, FORMS[2])
def test_any_text_reads_as_a_list_or_as_malformed(text, k, prompt):
    found = prompt.read(text, k)
    if found is not None:
        assert 1 <= len(found) <= k
        for query in found:
            assert query and query == " ".join(query.split()) and query.isprintable()
            query.encode()  # UTF-8, for a tokenizer


words = st.text(st.characters(exclude_characters="<>")).map(
    lambda s: " ".join("".join(c if c.isprintable() else " " for c in s).split())
)


@settings(max_examples=200, deadline=None)
@given(st.lists(words.filter(bool), min_size=1, max_size=10), st.sampled_from(FORMS))
def test_what_an_answer_holds_is_read_back(queries, prompt):
    assert prompt.read(prompt.answer(queries), 10) == queries
    # What comes after an answer, were generation not stopped, is no part of it.
    assert prompt.read(prompt.answer(queries) + "Theme: more", 10) == queries
    assert prompt.read(prompt.answer(queries), 3) == queries[:3]


def test_reading_by_hand():
    assert SHORT.read(' ["red  shoe ", "", "\\t", "blue hat"]') == ["red shoe", "blue hat"]
    assert SHORT.read('["a", "a", "A"]') == ["a", "a", "A"]  # repeats stay
    assert SHORT.read('["a"]\n["b"]') == ["a"]
    for malformed in (
        "", "[]", '[""]', '["a"', '["a", 1]', '["a", null]', '[["a"]]', '{"a": 1}', '"a"', "a, b",
        '["a"] and more', "['a']", '["a",]', '\n["a"]',
    ):  # fmt: skip
        assert SHORT.read(malformed) is None, malformed


def test_reading_tags_by_hand():
    form = chat()
    assert form.read('<think>["no"]</think>\n<queries>\n["a", "b"]\n</queries>') == ["a", "b"]
    assert form.read('<queries>["a"]</queries> or rather <queries>["b"]</queries>') == ["b"]
    for malformed in ('["a"]', '<queries>["a"]', "<queries></queries>", "<queries>a</queries>"):
        assert form.read(malformed) is None, malformed


def test_prompts_are_as_described():
    assert SHORT("rainy \n day") == "Theme: rainy day\nSearches:"
    assert SHORT.answer(["a", "ü"]) == ' ["a", "ü"]\n'
    shown = few_shot()
    text = shown("rainy day")
    assert text.count("Theme:") == 1 + len(EXAMPLES) and text.endswith(SHORT("rainy day"))
    assert text == shown.before + shown.ask("rainy day") and shown.before.endswith("Theme:")
    lines = text.splitlines()
    for i, (theme, queries) in enumerate(EXAMPLES):  # the examples are answers that would be read
        assert lines[2 * i] == f"Theme: {theme}"
        assert SHORT.read(lines[2 * i + 1].removeprefix("Searches:")) == list(queries)
        assert len(set(queries)) == 10
    for task in TASKS:
        assert "up to 7" in chat(task, 7)("x") and chat(task)("x").endswith("<|im_start|>assistant\n")
        assert "up to 7" in line(task, 7)("x") and line(task)("x").endswith('assistant\n["')
    assert line().read('a", "b"]') == ["a", "b"] and line().answer(["a", "b"]) == 'a", "b"]\n'
    assert line().read('["a"]') is None  # the opening is there already
    with pytest.raises(InputError, match="task"):
        chat("essays")
    with pytest.raises(InputError, match="no sub-query"):
        few_shot([("theme", ())])


def test_stop_tokens_are_those_that_end_an_answer():
    vocabulary = ["a", "\n", "\n\n", " \n", "<|im_end|>", "]"]
    decode = lambda ids: "".join(vocabulary[i] for i in ids)  # noqa: E731
    assert stop_tokens(SHORT, decode, 6) == (1, 2)
    assert stop_tokens(chat(), decode, 6) == (4,)
    assert stop_tokens(line(), decode, 6) == (1, 2, 4)
    with pytest.raises(InputError, match="no token spells"):
        stop_tokens(chat(), decode, 4)


@pytest.mark.smollm2
def test_smollm2_reads_the_shared_part_and_the_query_as_it_reads_the_whole():
    from genret.language.pretrained import packaged_file
    from genret.language.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(packaged_file())
    encode, decode = tokenizer.encode, lambda ids: tokenizer.decode(ids, special=True)
    for prompt in FORMS:
        stop = stop_tokens(prompt, decode, tokenizer.size)
        for query in ("rainy day", "jazz 1960s", "90's rave", "élan vital", "(old) ships", "   "):
            parts = encode(prompt.before), encode(prompt.ask(query)), encode(prompt.answer(["a", "red shoe"]))
            assert sum(parts, []) == encode(prompt(query) + prompt.answer(["a", "red shoe"]))
            assert [i for i, token in enumerate(parts[2]) if token in stop] == [len(parts[2]) - 1]
    assert encode("\n")[0] in stop_tokens(SHORT, decode, tokenizer.size)
    assert stop_tokens(chat(), decode, tokenizer.size) == (2,)
