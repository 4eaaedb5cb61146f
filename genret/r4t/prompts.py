"""How a query is put to the fan-out policy, and how its answer is read.

An answer is a JSON list of sub-queries. R4T (arXiv 2603.06397) asks for it inside <queries> tags, after
reasoning inside <think> tags; small models are asked on one line instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from genret.types import InputError

K = 10  # sub-queries of a fan-out, as the paper has it

# Themes for the few-shot prompt, ours; a benchmark that asks one of them should be given others.
EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "stormy night at the harbour",
        (
            "lighthouse", "foghorn", "fishing boat", "thunder", "wet rope", "sea wall", "lantern",
            "gale warning", "seagull", "oilskin coat",
        ),
    ),
    (
        "grandmother's kitchen",
        (
            "rolling pin", "apple pie", "cast iron pan", "recipe box", "apron", "simmering soup",
            "tea kettle", "jam jar", "wooden spoon", "fresh bread",
        ),
    ),
    (
        "first week at university",
        (
            "lecture hall", "dormitory", "student card", "library", "freshman", "campus map", "roommate",
            "syllabus", "cafeteria", "debating club",
        ),
    ),
)  # fmt: skip

TASKS = {
    "themes": (
        "Write up to {k} short search queries for the theme. Vary it: change or add one to three words in "
        "each, so that together they cover different sides of it."
    ),
    "items": (
        "Write up to {k} short search queries for the theme, one for each kind of item that a set on this "
        "theme would hold, so that what they find together makes up the set."
    ),
}


@dataclass(frozen=True)
class Prompt:
    """A way of asking: `before` + space + query + `after`; the model writes `open` + JSON list + `close`.

    `before` is the same for every query, so a model reads it once, and a tokenizer of the GPT-2 kind splits
    before the space. tags: the list is the text inside the last <queries> element; otherwise it is all of
    the answer's first line. begun: the answer's first characters, given with the prompt.
    """

    before: str
    after: str
    open: str
    close: str
    tags: bool = False
    begun: str = ""

    def __call__(self, query: str) -> str:
        """The prompt's text."""
        return self.before + self.ask(query)

    def ask(self, query: str) -> str:
        """The text after `before`. White space in the query becomes single spaces: none ends the line."""
        return f" {_one_line(query)}{self.after}{self.begun}"

    def answer(self, queries: Sequence[str]) -> str:
        """The text a policy should write for these sub-queries; `read` gives them back."""
        text = f"{self.open}{json.dumps(list(queries), ensure_ascii=False)}{self.close}"
        return text.removeprefix(self.begun)

    def read(self, text: str, k: int = K) -> list[str] | None:
        """Up to k sub-queries of an answer, or None where it is malformed; no text raises.

        Malformed: no list where one belongs, something beside it, an entry that is no string, or not one
        entry with a visible character. Of a well-formed list, white space and what cannot be printed
        become single spaces, empty entries are dropped, and the first k of the rest are taken. Repeats
        stay, each a sub-query of its own: the diversity reward prices them and the duplicate rate counts
        them.
        """
        if self.tags:
            blocks = re.findall(r"<queries>(.*?)</queries>", text, re.DOTALL)
            text = blocks[-1] if blocks else ""
        else:
            text = (self.begun + text).lstrip(" ").partition("\n")[0]
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
            return None
        return [entry for entry in map(_one_line, found) if entry][:k] or None


SHORT = Prompt("Theme:", "\nSearches:", " ", "\n")


def few_shot(examples: Iterable[tuple[str, Sequence[str]]] = EXAMPLES) -> Prompt:
    """`SHORT` with examples before it, (theme, its sub-queries) each: what a base model can follow.

    Raises InputError for an example without a sub-query.
    """
    shown = ""
    for theme, queries in examples:
        if not queries:
            raise InputError("examples", f"{theme!r} has no sub-query", "Give each example at least one.")
        shown += SHORT(theme) + SHORT.answer(queries)
    return Prompt(shown + SHORT.before, SHORT.after, SHORT.open, SHORT.close)


def chat(task: str = "themes", k: int = K) -> Prompt:
    """The paper's form, in the ChatML that SmolLM2 and Qwen3 read: reasoning inside <think> tags, then the
    list inside <queries> tags. The wording is ours; the paper's is not reproduced.

    task: 'themes' (its OAR: variations of the query) or 'items' (its WSCR: parts of one set).
    Raises InputError for another task.
    """
    how = "Think first, inside <think> tags. Then give the JSON list of queries inside <queries> tags."
    return Prompt(*_turns(task, k, how), "<think></think>\n<queries>", "</queries><|im_end|>", tags=True)


def line(task: str = "themes", k: int = K) -> Prompt:
    """`chat` for models that cannot keep to its form: a JSON list on one line, its opening given.

    Raises InputError for another task.
    """
    return Prompt(*_turns(task, k, "Give a JSON list of strings on one line."), "", "\n", begun='["')


def _turns(task: str, k: int, how: str) -> tuple[str, str]:
    """What stands before the theme and after it, in ChatML."""
    if task not in TASKS:
        raise InputError("task", f"no task is called {task!r}", f"use one of {', '.join(TASKS)}")
    return (
        f"<|im_start|>system\n{TASKS[task].format(k=k)} {how}<|im_end|>\n<|im_start|>user\nTheme:",
        "<|im_end|>\n<|im_start|>assistant\n",
    )


def stop_tokens(prompt: Prompt, decode: Callable[[Sequence[int]], str], vocabulary: int) -> tuple[int, ...]:
    """Ids of the tokens that end an answer to this prompt, of a vocabulary of that size.

    Untagged: every token whose text begins a new line. Of a chat: those that spell the end-of-turn mark.
    decode: ids -> text, special tokens included. Raises InputError where no token ends an answer.
    """
    ends = ("<|im_end|>",) * prompt.after.startswith("<|im_end|>") + ("\n",) * (not prompt.tags)
    ids = tuple(i for i in range(vocabulary) if decode([i]).startswith(ends))
    if not ids:
        problem = f"no token spells {ends[0]!r}"
        raise InputError("prompt", problem, "Use a prompt of this tokenizer's family.")
    return ids


def _one_line(text: str) -> str:
    """Printable characters only, so no lone surrogate, and single spaces between words."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
