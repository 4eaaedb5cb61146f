"""FOLM, the fan-out language model: asked, sampled and read; and the best of N of its answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from genret.language.decoder import Decoder, init_lora
from genret.language.generation import generate, token_log_probs
from genret.r4t.prompts import K, Prompt
from genret.r4t.rewards import Answer, Scores
from genret.training import mesh as meshes
from genret.training import processes
from genret.training.log import Progress
from genret.types import Array, InputError, PyTree

# Prompts and answers are padded to multiples of these, so that few shapes compile.
PROMPT_STEP, ANSWER_STEP = 8, 32

RewardFunction = Callable[[np.ndarray, Sequence[Sequence[Answer]]], Scores]


class Text(NamedTuple):
    """Prompts and answers side by side: tokens i32[B, L], mask bool[B, L] of real ones, own bool[B, L] of the
    answer's. Prompts are padded on the left to `start` columns, answers on the right."""

    tokens: np.ndarray
    mask: np.ndarray
    own: np.ndarray
    start: int


@dataclass(frozen=True)
class LanguagePolicy:
    """A decoder that answers queries with sub-queries.

    What is trained are its LoRA factors, with the base weights frozen beside them, or, for a decoder without
    LoRA, all of its weights.

    encode: text -> token ids. decode: token ids -> text. prompt: how it is asked. stop: ids that end an
    answer (`prompts.stop_tokens`). max_new: most tokens of an answer. k: most sub-queries. temperature and
    top_p: of sampling; training is at the same temperature, and wants a top_p of 1. width: fewest columns of
    a prompt; `usual_width` makes one shape of all.
    """

    decoder: Decoder
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    prompt: Prompt
    stop: tuple[int, ...]
    max_new: int
    k: int = K
    temperature: float = 1.0
    top_p: float = 1.0
    width: int = 0

    @property
    def prefix(self) -> np.ndarray | None:
        """i32[F], the part of the prompt that all queries share; None where there is none."""
        return np.array(self.encode(self.prompt.before), np.int32) if self.prompt.before else None

    def init(self, key: Array) -> PyTree:
        """Fresh parameters of the trained tree: LoRA factors that change nothing yet, or random weights."""
        if self.decoder.lora_rank:
            return init_lora(self.decoder, key)
        tokens = np.zeros((1, 2), np.int32)
        return self.decoder.init(key, tokens, tokens == 0)["params"]

    def variables(self, params: PyTree, base: PyTree) -> PyTree:
        """What the decoder applies: the trained tree, and the base weights where that is LoRA's."""
        return {"params": base, "lora": params} if self.decoder.lora_rank else {"params": params}

    def asked(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens i32[n, P] and mask bool[n, P] of the queries after the prefix, padded on the left to the
        longest, in steps, or to `width`."""
        rows = [self.encode(self.prompt.ask(query)) for query in queries]
        width = max(self.width, _columns(max(map(len, rows))))
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        return tokens, mask

    def lengths(self, queries: Sequence[str]) -> np.ndarray:
        """Tokens i64[n] of each query's prompt after the prefix."""
        return np.array([len(self.encode(self.prompt.ask(query))) for query in queries])

    def usual_width(self, queries: Sequence[str]) -> int:
        """Columns for the prompts of queries: as the longest needs, or, where it needs over twice as many, as
        99 in 100 do. All prompts are padded to it, and one endless query should not make all of them dear."""
        lengths = self.lengths(queries)
        usual = np.quantile(lengths, 0.99, method="lower")
        return _columns(int(usual if lengths.max() > 2 * usual else lengths.max()))

    def written(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> Text:
        """(query, sub-queries) pairs as texts to imitate, end of answer included.

        Raises InputError if there is none, or an answer has more tokens than `max_new`.
        """
        if not len(pairs):
            raise InputError("pairs", "there is none", "collect some first")
        tokens, mask = self.asked([query for query, _ in pairs])
        answers = [self.encode(self.prompt.answer(queries)) for _, queries in pairs]
        longest = max(range(len(pairs)), key=lambda i: len(answers[i]))
        if len(answers[longest]) > self.max_new:
            problem = f"answer {longest} has {len(answers[longest])} tokens, max_new is {self.max_new}"
            raise InputError("pairs", problem, "leave it out, or raise max_new")
        out = np.zeros((len(pairs), len(answers[longest])), np.int32)
        own = np.zeros(out.shape, bool)
        for i, answer in enumerate(answers):
            out[i, : len(answer)], own[i, : len(answer)] = answer, True
        return _side_by_side(tokens, mask, out, own)

    def log_probs(
        self, variables: PyTree, tokens: Array, mask: Array, start: int, temperature: float
    ) -> Array:
        """ln π f32[B, L] of a `Text`'s answers, 0 before and after them."""
        return token_log_probs(
            self.decoder, variables, tokens, mask, temperature, start=start, prefix=self.prefix
        )

    def sample(
        self,
        variables: PyTree,
        tokens: np.ndarray,
        mask: np.ndarray,
        keys: Array,
        of: np.ndarray | None = None,
    ) -> tuple[Text, np.ndarray, list[Answer]]:
        """Answers to prompts i32[B, P], one key each -> (text, ln π f32[B, L], what was read of them).

        of: i32[B], for fewer prompts, the one that each of the B keys' answers is to. Where the variables are
        on a mesh, so are the answers, each on its share of the devices: B must divide.
        """
        whole = (tokens, mask) if of is None else (tokens[of], mask[of])
        if meshes.parts_beside(variables) > 1:  # each device reads the prompts of its own answers
            (tokens, mask), of = whole, None
        asked = meshes.place_beside(variables, (tokens, mask, keys))
        made = generate(
            self.decoder, variables, *asked, max_new=self.max_new, temperature=self.temperature,
            top_p=self.top_p, stop=self.stop, prefix=self.prefix, of=of,
        )  # fmt: skip
        read = meshes.local((made.tokens, made.mask, made.log_probs))
        written, own, log_probs = (np.asarray(x) for x in read)
        used = min(self.max_new, ANSWER_STEP * -(-int(own.sum(1).max()) // ANSWER_STEP))
        written, own, log_probs = written[:, :used], own[:, :used], log_probs[:, :used]
        text = _side_by_side(*map(np.asarray, whole), written, own)
        log_probs = np.concatenate([np.zeros(whole[0].shape, np.float32), log_probs], 1)
        return text, log_probs, self.answers(written, own)

    def answers(self, written: np.ndarray, own: np.ndarray) -> list[Answer]:
        """The sub-queries of answers i32[B, T], own bool[B, T]; None where malformed."""
        stop = np.isin(written, self.stop)
        texts = (self.decode(row[keep].tolist()) for row, keep in zip(written, own & ~stop, strict=True))
        return [self.prompt.read(text, self.k) for text in texts]

    @property
    def card(self) -> dict:
        """What must agree between a checkpoint and the code that reads it."""
        d = self.decoder
        return dataclasses.asdict(d.config) | {
            "lora_rank": d.lora_rank, "lora_layers": d.lora_layers, "lora_alpha": d.lora_alpha,
        }  # fmt: skip


def _columns(tokens: int) -> int:
    return PROMPT_STEP * -(-tokens // PROMPT_STEP)


def _few_sizes(count: int) -> int:
    """A power of two that holds so many: batches of few sizes compile few programs."""
    return 1 << (count - 1).bit_length()


def _side_by_side(tokens: np.ndarray, mask: np.ndarray, written: np.ndarray, own: np.ndarray) -> Text:
    return Text(
        np.concatenate([tokens, written], 1), np.concatenate([mask, own], 1),
        np.concatenate([np.zeros_like(mask), own], 1), tokens.shape[1],
    )  # fmt: skip


def sample_fanouts(
    policy: LanguagePolicy, variables: PyTree, queries: Sequence[str], key: Array, *, batch: int = 64
) -> list[Answer]:
    """One answer to each query, `batch` at a time, or a power of two that holds all; rounded up to what the
    devices that hold the variables can share. A row's draws come from its own of the keys split(key, n). For
    several answers repeat a query: a prompt is read once for all that stand side by side.

    Raises InputError if there is no query, or a batch of none.
    """
    if not len(queries) or batch < 1:
        problem = f"{len(queries)} queries, {batch} at a time"
        raise InputError("queries", problem, "ask for one or more")
    count = len(queries)
    keys = jax.random.split(key, count)
    parts = meshes.parts_beside(variables)
    batch = parts * -(-min(batch, _few_sizes(count)) // parts)
    batches = [np.minimum(np.arange(at, at + batch), count - 1) for at in range(0, count, batch)]  # filled up
    repeat = np.cumsum([0, *(a != b for a, b in itertools.pairwise(queries))])  # one number for equal ones
    prompts = min(batch, _few_sizes(max(len(np.unique(repeat[at])) for at in batches)))
    answers: list[Answer] = []
    progress = Progress("answers", count, apart=10.0) if count > batch else None
    for at in batches:
        _, first, of = np.unique(repeat[at], return_index=True, return_inverse=True)
        asked = [queries[at[i]] for i in np.resize(first, prompts)]
        answers += policy.sample(variables, *policy.asked(asked), keys[at], of)[2]
        if progress:
            progress(min(len(answers), count))
    # Hosts may round a probability apart and then draw another token.
    return processes.agreed("answers", answers[:count])


class Collected(NamedTuple):
    """Best-of-N: pairs of query and sub-queries, best first, with their composite reward f32[n] and query
    rows i32[n]. scores: of all samples [Q, N]; `scores.valid.mean()` is the rate of well-formed answers."""

    pairs: list[tuple[str, list[str]]]
    reward: np.ndarray
    rows: np.ndarray
    scores: Scores


def collect_fanouts(
    policy: LanguagePolicy, variables: PyTree, queries: Sequence[str], rows: np.ndarray, key: Array,
    score: RewardFunction, *, samples: int = 5, keep: int = 1, share: float = 1.0, batch: int = 64,
) -> Collected:  # fmt: skip
    """Of N = `samples` answers to each of queries[rows], the `keep` best well-formed ones by reward; of these
    the best `share` over all queries, by composite. The warm start's data, and the paper's Best-of-N.

    Raises InputError if share is outside (0, 1], or no sample is well-formed.
    """
    if not 0 < share <= 1 or not 1 <= keep <= samples:
        problem = f"share {share}, keep {keep} of {samples}"
        raise InputError("share", problem, "use a share in (0, 1] and keep 1 to all of the samples")
    asked = [queries[row] for row in rows for _ in range(samples)]
    answers = sample_fanouts(policy, variables, asked, key, batch=batch)
    answers = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    scores = score(np.asarray(rows), answers)
    value = np.where(scores.valid, scores.reward, -np.inf)
    best = np.argsort(-value, axis=1, kind="stable")[:, :keep]  # [Q, keep]
    kept = [(q, i) for q, row in enumerate(best) for i in row if scores.valid[q, i]]
    if not kept:
        problem = f"none of {value.size} samples is well-formed"
        raise InputError("prompt", problem, "give more examples, more tokens or a lower temperature")
    kept = sorted(kept, key=lambda at: -scores.composite[at])[: max(1, round(share * len(kept)))]
    pairs = [(queries[rows[q]], answers[q][i]) for q, i in kept]
    reward = np.float32([scores.composite[at] for at in kept])
    return Collected(pairs, reward, np.asarray(rows)[[q for q, _ in kept]], scores)
