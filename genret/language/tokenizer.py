"""Tokenizers of language models, from a tokenizer.json or rebuilt from what a GGUF stores of it.

Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) as the `tokenizers` package runs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genret.language.weights import INSTALL, gguf_value, read_gguf
from genret.types import InputError

# Token types of a GGUF that are read whole from a text.
_CONTROL, _USER_DEFINED = 3, 4

# Tokens that end an answer or a text, beside the checkpoint's own.
_ENDS = ("<|im_end|>", "<|endoftext|>")

# Words of Qwen2 and Qwen3: contractions, letters with one mark before them, single digits, marks, line ends.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text <-> token ids. Made by `load_tokenizer`.

    size: how many ids there are. stop: ids that end an answer, for `generate`.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, special: dict[str, str]):
        self._tokenizer, self._template, self._special = tokenizer, chat_template, special
        self.size = tokenizer.get_vocab_size()
        ids = (tokenizer.token_to_id(special.get("eos_token", "")), *map(tokenizer.token_to_id, _ENDS))
        self.stop = tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens are read where the text spells them, and none are added."""
        if not isinstance(text, str):
            raise InputError("text", f"{type(text).__name__} is not a string", "Pass a str.")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are spelled out or left away. Ids of half a character give U+FFFD."""
        return self._tokenizer.decode(np.asarray(ids, int).tolist(), skip_special_tokens=not special)

    def token_id(self, token: str) -> int:
        """Id of a token as the vocabulary spells it; raises InputError when there is none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise InputError("token", f"{token!r} is not in the vocabulary", "Use a token of this model.")
        return found

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        """The prompt for an answer to `messages` [{"role": ..., "content": ...}], by the model's template.

        options: further names that the template reads (Qwen3: enable_thinking).
        Raises InputError when the model has no template, or its template refuses the messages.
        """
        if self._template is None:
            raise InputError("chat", "this model has no chat template", "Write the prompt as plain text.")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise InputError("chat", f"{error.name} is not installed", INSTALL) from error

        def refuse(message: str) -> None:
            raise TemplateError(message)

        rules = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        rules.globals["raise_exception"] = refuse
        rules.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        names = {"messages": list(messages), "add_generation_prompt": True, **self._special, **options}
        try:
            return rules.from_string(self._template).render(names)
        except TemplateError as error:
            raise InputError("chat", f"the template refuses: {error}", "Change the messages.") from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a GGUF, or from a tokenizer.json with the tokenizer_config.json beside it.

    Raises InputError for a file that is missing or foreign, and for a GGUF whose way of splitting words is
    not known here.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return tokenizer_of(read_gguf(path))
    tokenizers = _tokenizers()
    if not path.is_file():
        raise InputError(str(path), "no such file", "Pass a tokenizer.json or a .gguf file.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(str(path), f"not readable as a tokenizer ({error})", "Fetch it again.") from error
    beside = path.with_name("tokenizer_config.json")
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
        named = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        special = {
            f"{name}_token": token["content"] if isinstance(token, dict) else token
            for name, token in named.items()
            if token is not None
        }
        template = path.with_name("chat_template.jinja")
        template = template.read_text() if template.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several by name, as some hubs have them
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not all(isinstance(text, str) for text in (*special.values(), template or "")):
            raise ValueError("a token or a template that is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"not a tokenizer's configuration ({error!r})"
        raise InputError(str(beside), problem, "Fetch it again.") from error
    return Tokenizer(tokenizer, template, special)


def tokenizer_of(reader: Any) -> Tokenizer:
    """The tokenizer in an open GGUF (`read_gguf`); raises as `load_tokenizer`."""
    tokenizers = _tokenizers()
    path = reader.path

    def read(key: str) -> Any:
        value = gguf_value(reader, f"tokenizer.ggml.{key}")
        if value is None:
            raise InputError(path, f"tokenizer.ggml.{key} is missing", "Take a GGUF with its tokenizer.")
        return value

    if read("model") != "gpt2":
        problem = f"a tokenizer of type {read('model')!r}"
        raise InputError(path, problem, "Byte-level BPE only: pass the model's tokenizer.json.")
    tokens, types, merges = read("tokens"), read("token_type"), read("merges")
    try:
        pairs = [tuple(pair.split(" ")) for pair in merges]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
        kinds = list(zip(tokens, types, strict=True))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(path, f"not a vocabulary with merges ({error})", "Fetch it again.") from error
    split, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    words = read("pre")
    if words == "smollm":
        rules = [split.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    elif words == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        regex = split.Split(tokenizers.Regex(_QWEN2), "isolated")
        rules = [regex, byte_level(add_prefix_space=False, use_regex=False)]
    else:
        problem = f"words are split as {words!r}"
        raise InputError(path, problem, "smollm and qwen2 are known: pass the model's tokenizer.json.")
    tokenizer.pre_tokenizer = split.Sequence(rules)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, its_kind in kinds
                if its_kind == kind
            ]
        )
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: gguf_value(reader, f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    for name, i in ids.items():
        if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise InputError(path, f"the {name} token is {i!r} of {len(tokens)}", "Fetch it again.")
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    return Tokenizer(tokenizer, gguf_value(reader, "tokenizer.chat_template"), special)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("tokenizer", f"{error.name} is not installed", INSTALL) from error
    return tokenizers
