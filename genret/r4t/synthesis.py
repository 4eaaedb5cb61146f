"""Supervision for the set retriever: fan-outs of a policy, kept on disk as sets of embeddings.

R4T (arXiv 2603.06397), stage 2: the tuned policy is frozen, 128 fan-outs per training query are drawn at
temperature .9, and a row of a set is the embedding

    oar    of the content retrieved by a sub-query        (open-ended retrieval)
    wscr   of the sub-query itself, in its context        (weakly supervised compositional retrieval)

A folder holds `card.json` and one folder per shard of queries, each with the arrays, n its kept fan-outs:

    targets.npy  float16 or float32 [n, K, D]  zero where a fan-out has fewer than K sub-queries
    present.npy  bool[n, K]     query.npy  i32[n], row of the data set     reward.npy  f32[n], NaN unasked
    items.npy    i32[n, K]      contents retrieved, -1 elsewhere           counts.json

A shard is written beside its place and renamed: after a kill it is there whole or not at all. Its random
keys are its own, so a run killed and resumed writes what an undisturbed one writes. One writer at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from genret.catalogue.fanout import FanoutData
from genret.r4t.items import distinct_items
from genret.r4t.prompts import K
from genret.r4t.rewards import Answer, Encode, in_context
from genret.retrieval.index import Index
from genret.training import preemption, processes
from genret.training.log import Progress
from genret.types import Array, InputError, reading

Policy = Callable[[list[str], Array], Sequence[Answer]]
"""(queries, key) -> one answer each: sub-queries, or None for a malformed answer. A query that is asked for
several comes so many times. A pure function."""

Reward = Callable[[np.ndarray, list[list[Answer]]], np.ndarray]
"""(query rows i32[q], answers [q][N]) -> f32[q, N]."""


@dataclass(frozen=True)
class SynthesisOptions:
    """fanouts: N, drawn per query. rows: K of the arrays; longer fan-outs are cut, shorter ones padded.
    distinct: a repeated row becomes the next nearest content of its sub-query (oar) or padding (wscr), and a
    fan-out that repeats an earlier one of its query, in any order, is dropped; the paper keeps both.
    context: the query's weight in its sub-queries' embeddings (`rewards.in_context`). dtype: on disk; float16
    is good to 5e-4. shard: queries per shard and per call of the policy."""

    regime: Literal["oar", "wscr"]
    fanouts: int = 128
    rows: int = K
    distinct: bool = False
    context: float = 0.0
    dtype: Literal["float16", "float32"] = "float16"
    shard: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.regime not in ("oar", "wscr") or self.dtype not in ("float16", "float32"):
            problem = f"regime {self.regime!r}, dtype {self.dtype!r}"
            raise InputError("synthesis", problem, "use oar or wscr, and float16 or float32")
        if min(self.fanouts, self.rows, self.shard) < 1:
            problem = f"fanouts {self.fanouts}, rows {self.rows}, shard {self.shard}"
            raise InputError("synthesis", problem, "use at least one of each")


@dataclass(frozen=True)
class SyntheticSets:
    """n sets of K rows, each the answer to one query; `targets` are memory maps, one per shard.

    present: bool[n, K]. query: i32[n]. reward: f32[n]. items: i32[n, K]. card: what made them. counts: sums
    over shards of `asked`, `malformed` and `repeated` fan-outs.
    """

    targets: tuple[np.ndarray, ...]
    present: np.ndarray
    query: np.ndarray
    reward: np.ndarray
    items: np.ndarray
    card: dict[str, Any]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.query)

    @property
    def width(self) -> int:
        return self.targets[0].shape[2]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Sets f32[b, K, D] by number i64[b]; rows are unit-norm, or zero where not `present`."""
        ends = np.cumsum([len(t) for t in self.targets])
        shard = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), *self.targets[0].shape[1:]), np.float32)
        for s in np.unique(shard):
            here = shard == s
            out[here] = self.targets[s][rows[here] - (ends[s] - len(self.targets[s]))]
        norm = np.linalg.norm(out, axis=-1, keepdims=True)
        return out / np.where(norm > 0, norm, 1)  # what float16 took

    def best(self, fraction: float) -> np.ndarray:
        """The share `fraction` of each query's sets with the highest reward, at least one: i64[m], ascending.

        Ties go to the earlier set. The paper says that it filters and not how; 1 keeps all.
        Raises InputError for a fraction outside (0, 1], or below 1 for sets made without a reward.
        """
        if not 0 < fraction <= 1:
            raise InputError("keep_top", f"{fraction} is not in (0, 1]", "1 keeps all")
        if fraction == 1:
            return np.arange(len(self))
        if np.isnan(self.reward).any():
            raise InputError("keep_top", "the sets have no reward", "synthesise with one, or keep all")
        order = np.lexsort((-self.reward, self.query))  # stable: earlier first among equals
        _, first, count = np.unique(self.query[order], return_index=True, return_counts=True)
        place = np.arange(len(self)) - np.repeat(first, count)
        return np.sort(order[place < np.repeat(np.ceil(fraction * count), count)])


def synthesize(
    folder: Path | str, data: FanoutData, rows: np.ndarray, policy: Policy, options: SynthesisOptions, *,
    encode: Encode, index: Index, reward: Reward | None = None, about: dict[str, Any] | None = None,
) -> SyntheticSets:  # fmt: skip
    """Draw what is missing in `folder` and open it; a folder that is complete is only opened.

    rows: i32[Q], the (training) queries of `data`. encode: texts to unit-norm f32[n, D] in the contents'
    space. index: over `data.embeddings`. about: JSON-able, what the callables are (checkpoint, temperature,
    weights): it goes into the card with the options and checksums of queries and contents.

    Raises InputError where the folder was made with another card, for an index that is not over the
    contents, for too few contents for distinct rows, and where not one fan-out was well-formed.
    """
    folder, rows = Path(folder), np.asarray(rows, np.int32)
    if index.num_items != len(data.embeddings):
        problem = f"{index.num_items} items for {len(data.embeddings)} contents"
        raise InputError("index", problem, "index the contents of the data set")
    if options.distinct and options.regime == "oar" and options.rows > index.num_items:
        problem = f"{options.rows} distinct rows of {index.num_items} contents"
        raise InputError("rows", problem, "ask for fewer, or keep repeats")
    if not len(rows):
        raise InputError("rows", "there is no query", "pass the training queries")
    card = make_card(data, rows, options, about)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, card)
    # What a run that was killed left.
    processes.once("old shards", lambda: [shutil.rmtree(left) for left in folder.glob("*.tmp")])
    progress = Progress("synthesis", card["shards"], apart=10.0)
    for s in range(card["shards"]):
        if not (folder / _name(s)).exists():
            some = rows[s * options.shard : (s + 1) * options.shard]
            key = jax.random.fold_in(jax.random.key(options.seed), s)
            answers = _draw(policy, [data.queries[r] for r in some], key, options.fanouts)
            rewards = None if reward is None else np.asarray(reward(some, answers), np.float32)
            arrays, counts = _shard(some, answers, rewards, data, encode, index, options)
            processes.once(f"shard {s}", functools.partial(_write, folder, s, arrays, counts))
            preemption.leave_if_due()
            progress(s + 1, ", ".join(f"{n} {name}" for name, n in counts.items()))
    return load_sets(folder, card)


def make_card(
    data: FanoutData, rows: np.ndarray, options: SynthesisOptions, about: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the sets of a folder were made with; any difference makes other sets."""
    texts = "\n".join(f"{r}\t{data.queries[r]}" for r in rows)
    contents = np.ascontiguousarray(data.embeddings, np.float32)
    card = dataclasses.asdict(options) | {
        "queries": hashlib.sha256(texts.encode("utf-8", "replace")).hexdigest(),
        "contents": [*contents.shape, zlib.crc32(contents)],
        "shards": -(-len(rows) // options.shard),
        "about": about or {},
    }
    return json.loads(json.dumps(card))  # as it will be read


def load_sets(folder: Path | str, card: dict[str, Any] | None = None) -> SyntheticSets:
    """The finished sets of a folder. Raises InputError where it is not finished, or has another card."""
    folder = Path(folder)
    if not (folder / "card.json").exists():
        raise InputError("sets", f"{folder} holds none", "synthesise them first")
    found = _card(folder)
    _same(card or found, found, folder)
    shards = [folder / _name(s) for s in range(found["shards"])]
    missing = sum(not s.exists() for s in shards)
    if missing:
        problem = f"{missing} of {len(shards)} shards of {folder} are missing"
        raise InputError("sets", problem, "run the synthesis again; it goes on where it stopped")
    with reading(folder):
        small = {
            n: np.concatenate([np.load(s / f"{n}.npy") for s in shards])
            for n in ("present", "query", "reward", "items")
        }
        counts = [json.loads((s / "counts.json").read_text()) for s in shards]
    total = {name: sum(c[name] for c in counts) for name in counts[0]}
    if not len(small["query"]):
        problem = f"none of {total['asked']} fan-outs was well-formed"
        raise InputError("policy", problem, "look at its answers; warm it up first")
    # An empty array cannot be mapped.
    with reading(folder):
        targets = tuple(
            np.load(s / "targets.npy", mmap_mode="r" if len(np.load(s / "query.npy")) else None)
            for s in shards
        )
    return SyntheticSets(targets, **small, card=found, counts=total)


def _claim(folder: Path, card: dict[str, Any]) -> None:
    if (folder / "card.json").exists():
        _same(card, _card(folder), folder)
        return

    def write() -> None:
        temporary = folder / "card.json.new"
        temporary.write_text(json.dumps(card, indent=1, sort_keys=True))
        os.replace(temporary, folder / "card.json")

    processes.once("card of the sets", write)


def _card(folder: Path) -> dict[str, Any]:
    with reading(folder):
        found = json.loads((folder / "card.json").read_text())
        if not isinstance(found, dict) or type(found.get("shards")) is not int:
            raise ValueError("card.json counts no shards")
    return found


def _same(wanted: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if names:
        what = ", ".join(f"{n} {found.get(n)!r}, not {wanted.get(n)!r}" for n in names)
        raise InputError("sets", f"{folder} was made with {what}", "use another folder, or remove this one")


def _name(shard: int) -> str:
    return f"shard_{shard:05d}"


def _draw(policy: Policy, queries: list[str], key: Array, fanouts: int) -> list[list[Answer]]:
    """answers [q][N]; an answer without a sub-query is malformed."""
    answers = policy([query for query in queries for _ in range(fanouts)], key)
    if len(answers) != len(queries) * fanouts:
        problem = f"{len(answers)} answers to {len(queries) * fanouts} questions"
        raise InputError("policy", problem, "return one answer each, None where malformed")
    made = [list(answer) if answer else None for answer in answers]
    return [made[i : i + fanouts] for i in range(0, len(made), fanouts)]


def _shard(
    rows: np.ndarray, answers: list[list[Answer]], rewards: np.ndarray | None, data: FanoutData,
    encode: Encode, index: Index, options: SynthesisOptions,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:  # fmt: skip
    """The arrays of one shard, and its counts."""
    flat = [(q, n, a[: options.rows]) for q, group in enumerate(answers) for n, a in enumerate(group) if a]
    contents = data.embeddings
    asked = list(dict.fromkeys((q, text) for q, _, answer in flat for text in answer))
    number = {of: i for i, of in enumerate(asked)}
    shape = (len(flat), options.rows)
    text = np.full(shape, -1, np.int32)  # [n, K], row of `asked`
    for i, (q, _, answer) in enumerate(flat):
        text[i, : len(answer)] = [number[q, t] for t in answer]
    vectors = np.zeros((0, contents.shape[1]), np.float32)
    items, identity = np.full(shape, -1, np.int32), text
    if asked:
        vectors = np.asarray(encode([text for _, text in asked]), np.float32)
        vectors = in_context(vectors, data.query_embeddings[rows[[q for q, _ in asked]]], options.context)
        if options.regime == "oar":
            depth = options.rows if options.distinct else 1
            found = index.search(vectors, depth)[0][text]  # [n, K, depth]
            real = text >= 0
            items = distinct_items(found, real) if options.distinct else np.where(real, found[..., 0], -1)
            identity = items
        elif options.distinct:
            text = identity = _without_repeats(text)
    kept = np.arange(len(flat))
    if options.distinct and len(flat):
        query = np.array([q for q, *_ in flat], np.int32)
        kept = np.sort(
            np.unique(np.column_stack([query, np.sort(identity, 1)]), axis=0, return_index=True)[1]
        )
    source, at = (contents, items) if options.regime == "oar" else (vectors, text)
    present = at[kept] >= 0
    targets = np.zeros((len(kept), options.rows, contents.shape[1]), options.dtype)
    targets[present] = source[at[kept][present]]
    where = [flat[i][:2] for i in kept]
    arrays = {
        "targets": targets,
        "present": present,
        "query": np.array([rows[q] for q, _ in where], np.int32),
        "reward": np.array([np.nan if rewards is None else rewards[w] for w in where], np.float32),
        "items": items[kept],
    }
    drawn = len(rows) * options.fanouts
    return arrays, {"asked": drawn, "malformed": drawn - len(flat), "repeated": len(flat) - len(kept)}


def _without_repeats(rows: np.ndarray) -> np.ndarray:
    """Ids i32[n, K] with every repeat of an earlier entry of its row set to -1."""
    earlier = np.tril(np.ones((rows.shape[1],) * 2, bool), -1)
    return np.where(((rows[:, :, None] == rows[:, None]) & earlier).any(-1), -1, rows)


def _write(folder: Path, shard: int, arrays: dict[str, np.ndarray], counts: dict[str, int]) -> None:
    temporary = folder / f"{_name(shard)}.tmp"
    temporary.mkdir()
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array)
    (temporary / "counts.json").write_text(json.dumps(counts))
    os.replace(temporary, folder / _name(shard))
