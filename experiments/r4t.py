"""From a config to the objects of one R4T run; training and evaluation share it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.r4t_checks import check, check_fits
from experiments.workdir import same_run, write_text
from genret.catalogue import facets, own, playlists, polyvore, words
from genret.catalogue.fanout import FanoutData, FanoutTexts, embed
from genret.diffusion import edm
from genret.diffusion.retriever import Retriever
from genret.language.decoder import Decoder, init_lora
from genret.language.encoder import TextEncoder, load_encoder
from genret.language.pretrained import LanguageModel, load_language_model
from genret.r4t import policy as policies
from genret.r4t import prompts, stages
from genret.r4t.baselines import mmr_reranking
from genret.r4t.fanout import SetRetriever
from genret.r4t.folm import LanguagePolicy, collect_fanouts, sample_fanouts
from genret.r4t.grpo import SoftGRPO
from genret.r4t.rewards import OAR, WSCR, CachedEncoder, Rewards
from genret.r4t.synthesis import SynthesisOptions, SyntheticSets, synthesize
from genret.retrieval.index import Index, build_index
from genret.training import processes
from genret.training.checkpoint import restore_params
from genret.training.loop import FitOptions, TrainState, fit
from genret.training.mesh import make_mesh, whole
from genret.training.stage import Stage
from genret.types import Array, InputError, PyTree, reading

REWARDS = {  # the collapse study: components rewarded, the others only logged
    "folm_grounded": ("groundedness",),
    "folm_aligned": ("groundedness", "alignment"),
}


def options(section: ConfigDict, seed: int, **changes: Any) -> FitOptions:
    """FitOptions of a config section."""
    return FitOptions(**{**section.to_dict(), **changes}, seed=seed)


def open_fanout(config: ConfigDict, encoder: TextEncoder) -> FanoutData:
    """The data set that a config names, embedded on first use. Raises InputError for a missing `raw`."""

    def make() -> FanoutData:
        texts = fanout_texts(config)
        return embed(texts, functools.partial(encoder.encode, batch_size=128), cache=config.fanout.folder)

    return processes.first("fan-out data", make)


def fanout_texts(config: ConfigDict) -> FanoutTexts:
    """The same before it is embedded."""
    texts = _given_texts(config)
    return dataclasses.replace(texts, references=None) if config.fanout.regime == "oar" else texts


def _given_texts(config: ConfigDict) -> FanoutTexts:
    f = config.fanout
    if f.data == "words":
        return words.themed(size=f.contents, count=f.queries, seed=f.seed)
    read: dict[str, Callable] = {
        "playlists": lambda: playlists.read(f.raw, seed=f.seed),
        "fashion": lambda: facets.read(f.raw, seed=f.seed),
        "polyvore": lambda: polyvore.read(f.raw),
    }
    if f.data not in read:
        return own.read(f.data, seed=f.seed)
    if not (f.raw and os.path.exists(f.raw)):
        raise InputError("raw", f"{f.raw or 'nothing'} given for {f.data}", "pass raw=PATH")
    return read[f.data]()


@dataclass(frozen=True, eq=False)
class FanoutRun:
    """One seed of one configuration, in `folder`."""

    config: ConfigDict
    data: FanoutData
    encoder: TextEncoder
    folder: Path
    seed: int

    @functools.cached_property
    def mesh(self) -> Mesh:
        return make_mesh(**self.config.mesh)

    @functools.cached_property
    def index(self) -> Index:
        e = self.config.evaluation
        depth = min(max(e.pool, e.depth), len(self.data.embeddings))
        return build_index(e.index, self.data.embeddings, depth, self.mesh)

    @functools.cached_property
    def language(self) -> LanguageModel:
        """The pretrained model, on every device of the mesh."""
        found = load_language_model(self.config.language.model)
        return dataclasses.replace(found, params=whole(found.params, self.mesh))

    @functools.cache  # noqa: B019 - it checks the norms of all contents, and answers are timed
    def rewards(self, components: tuple[str, ...] = ()) -> Rewards:
        """The training reward; components: those that count, '' for all, the rest at weight 0."""
        r = self.config.reward
        names = OAR if self.data.references is None else WSCR
        weights = {n: r[n] if not components or n in components else 0.0 for n in names}
        return Rewards(
            self.data, self.index, self.texts, weights=weights, k=self.config.k, depth=r.depth,
            normalise=r.normalise, context=self.context,
        )  # fmt: skip

    @property
    def context(self) -> float:
        """The query's weight in its sub-queries' embeddings; open-ended contents are found by themselves."""
        return 0.0 if self.data.references is None else self.config.reward.context

    @functools.cached_property
    def texts(self) -> CachedEncoder:
        """Sub-queries -> unit-norm f32[n, D] in the contents' space, each encoded once."""
        return CachedEncoder(functools.partial(self.encoder.encode, max_tokens=32))

    def asked(self, prompt: prompts.Prompt, lora: bool = False, **changes: Any) -> LanguagePolicy:
        """The language model under a prompt; lora: with factors to train."""
        c, m = self.config.language, self.language
        decoder = Decoder(
            m.config, lora_rank=c.lora_rank * lora, lora_layers=c.lora_layers * bool(c.lora_rank * lora),
            remat=c.remat, dtype=jnp.dtype(c.dtype), lora_alpha=c.lora_alpha,
        )  # fmt: skip
        tokenizer = m.tokenizer
        stop = _stop(tokenizer, prompt)
        made = LanguagePolicy(
            decoder, tokenizer.encode, tokenizer.decode, prompt, stop, c.max_new, self.config.k, c.temperature
        )
        return dataclasses.replace(made, width=made.usual_width(self.data.queries), **changes)

    @functools.cached_property
    def few_shot(self) -> LanguagePolicy:
        shown = [(theme, queries[: self.config.k]) for theme, queries in prompts.EXAMPLES]
        return self.asked(prompts.few_shot(shown), max_new=self._untuned)

    @functools.cached_property
    def zero_shot(self) -> LanguagePolicy:
        ask = prompts.chat if self.config.language.reason else prompts.line
        return self.asked(ask(self._task, self.config.k), max_new=self._untuned)

    @functools.cached_property
    def policy(self) -> LanguagePolicy:
        """What is trained, LoRA factors or all weights: the short prompt, or the paper's, with reasoning."""
        c, k = self.config.language, self.config.k
        asked = prompts.chat(self._task, k) if c.reason else prompts.SHORT
        return self.asked(asked, lora=bool(c.lora_rank))

    @property
    def _task(self) -> str:
        return "themes" if self.data.references is None else "items"

    @property
    def _untuned(self) -> int:
        c = self.config.language
        return max(c.max_new, c.max_untuned)

    @functools.cached_property
    def training_rows(self) -> np.ndarray:
        """Training queries i32[n], but those whose prompt is far longer than others' (`usual_width`)."""
        rows = self.data.rows("train")
        long = self.policy.lengths([self.data.queries[row] for row in rows]) > self.policy.width
        if long.any():
            print(f"{long.sum()} training queries of over {self.policy.width} tokens left out", flush=True)
        return rows[~long]

    @property
    def start(self) -> PyTree:
        """What the warm start begins from."""
        if self.policy.decoder.lora_rank:
            return init_lora(self.policy.decoder, jax.random.key(self.seed))
        return self.language.params

    def trained(self, folder: str, step: int | None = None) -> PyTree:
        """Variables of the policy trained in `folder`, of its last step or another; raises InputError where
        there is none."""
        shapes = jax.eval_shape(lambda: self.start)
        params = restore_params(
            self.folder / folder / "checkpoints",
            shapes,
            card=self.policy.card,
            step=step or self.options(folder).steps,
        )
        return self.policy.variables(whole(params, self.mesh), self.language.params)

    @property
    def base(self) -> PyTree:
        return {"params": self.language.params}

    def _samples(self) -> list[tuple[str, list[str]]]:
        """Best-of-N few-shot fan-outs of some training queries."""
        w, rows, key = self.config.warm, self._warm_rows(), jax.random.key(1000 + self.seed)
        found = collect_fanouts(
            self.few_shot, self.base, self.data.queries, rows, key, self.rewards(),
            samples=w.samples, share=w.share, batch=self.config.language.batch,
        )  # fmt: skip
        valid = f"few-shot samples: {found.scores.valid.mean():.0%} well-formed"
        print(f"{valid}; the best {len(found.pairs)} are imitated", flush=True)
        return found.pairs

    def _retrieved(self) -> list[tuple[str, list[str]]]:
        """Contents that retrieval finds for training queries: diverse neighbours, or reference sets."""
        data, k, rows = self.data, self.config.k, self._warm_rows()
        if data.references is None:
            ids = mmr_reranking(self.index, data.embeddings)(data.query_embeddings[rows], k, self.seed)
        else:
            # Few queries, large sets: as many different parts of them as there would be queries.
            rng, most = np.random.default_rng([self.seed, 94]), self.config.warm.queries
            rows = np.repeat(rows, max(1, most // len(rows)))
            ids = [rng.permutation(data.references[row])[:k] for row in rows]
        return [
            (data.queries[row], [data.contents[i] for i in own]) for row, own in zip(rows, ids, strict=True)
        ]

    def _warm_rows(self) -> np.ndarray:
        rows, most = self.training_rows, self.config.warm.queries
        return np.random.default_rng([self.seed, 91]).choice(rows, min(most, len(rows)), replace=False)

    def _pairs(self) -> list[tuple[str, list[str]]]:
        """The warm start's data, made once and kept beside it."""
        path, teachers = (
            self.folder / "warm_pairs.json",
            {"samples": self._samples, "retrieval": self._retrieved},
        )
        if self.config.warm.teacher not in teachers:
            problem = f"unknown teacher {self.config.warm.teacher!r}"
            raise InputError("warm.teacher", problem, f"use one of {', '.join(teachers)}")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(teachers[self.config.warm.teacher]()))
        with reading(path):
            kept = [(query, queries) for query, queries in json.loads(path.read_text())]
        limit = self.config.language.max_new
        fits = [p for p in kept if len(self.policy.encode(self.policy.prompt.answer(p[1]))) <= limit]
        if not fits:
            raise InputError("language.max_new", f"no answer fits into {limit} tokens", "raise it")
        if len(fits) < len(kept):
            long = f"{len(kept) - len(fits)} of {len(kept)} answers"
            print(f"warm start: {long} of over {limit} tokens left out", flush=True)
        return fits

    def warm_stage(self) -> Stage:
        """The warm start, ready to fit from `start`."""
        return policies.make_warm_start_stage(
            "warm", self.policy, self.language.params, self._pairs(), batch=self.config.warm.batch,
            seed=self.seed,
        )  # fmt: skip

    def policy_stage(self, folder: str, warm: PyTree) -> Stage:
        """Soft-GRPO under the rewards of `folder`, ready to fit from the warm start's parameters."""
        c = self.config
        grpo = SoftGRPO(c.rl.clip, c.rl.new_old, c.rl.old_new, c.rl.reference)
        return policies.make_policy_stage(
            folder, self.policy, self.language.params, self.data.queries, self.training_rows,
            self.rewards(REWARDS.get(folder, ())), count=c.rl.count, group=c.rl.group, reuse=c.rl.reuse,
            options=grpo, reference=warm if c.rl.reference else None, seed=self.seed,
            workdir=self.folder / folder,
        )  # fmt: skip

    @property
    def recipes(self) -> list[str]:
        """Every folder that is trained."""
        return ["warm", *self.tuned, "diffusion", "regressor"]

    @property
    def tuned(self) -> list[str]:
        """The folders of Soft-GRPO: the main one, and those of the collapse study."""
        return ["folm", *(REWARDS if "rewards" in self.config.ablations else ())]

    def train_policy(self) -> None:
        """The warm start, then Soft-GRPO from it, then the rewards of the collapse study."""
        warm = self._fit("warm", self.warm_stage(), self.start).ema  # the one that is evaluated
        for folder in self.tuned:
            self._fit(folder, self.policy_stage(folder, warm), warm)

    def _fit(self, folder: str, stage: Stage, init_from: PyTree | None = None) -> TrainState:
        return fit(stage, self.folder / folder, self.options(folder), mesh=self.mesh, init_from=init_from)

    def options(self, folder: str) -> FitOptions:
        """How long and how fast `folder` is trained."""
        c = self.config
        found = {"warm": c.warm.fit, "diffusion": c.diffusion.fit, "regressor": c.regressor}
        return options(found.get(folder, c.rl.fit), self.seed)

    @functools.cached_property
    def sets(self) -> SyntheticSets:
        """T_syn: the trained policy's fan-outs of training queries, as rows of embeddings."""
        s, rows = self.config.synthesis, self.training_rows
        if s.queries and s.queries < len(rows):
            rows = np.sort(np.random.default_rng([self.seed, 92]).choice(rows, s.queries, replace=False))
        variables, reward = None, self.rewards()

        def drawn(queries: list[str], key: Array):
            nonlocal variables
            variables = self.trained("folm") if variables is None else variables
            return sample_fanouts(self.policy, variables, queries, key, batch=self.config.language.batch)

        regime = "oar" if self.data.references is None else "wscr"
        made = SynthesisOptions(
            regime, s.fanouts, self.config.k, distinct=s.distinct, context=self.context,
            shard=s.shard, seed=self.seed,
        )  # fmt: skip
        about = {"policy": "folm", "steps": self.config.rl.fit.steps, "temperature": self.policy.temperature}
        return synthesize(
            self.folder / "synthesis", self.data, rows, drawn, made, encode=self.texts, index=self.index,
            reward=lambda at, answers: reward(at, answers).reward, about=about,
        )  # fmt: skip

    def rows(self, regression: bool = False) -> int:
        """L, what a set model is trained on; each place of the regressor is one of the k that are wanted."""
        return (0 if regression else self.config.diffusion.rows) or self.config.k

    def retriever(self, regression: bool = False) -> Retriever:
        d = self.config.diffusion
        block = "adaln" if regression else d.block
        model = stages.set_dit(
            d.size, embedding=self.data.width, rows=self.rows(regression), block=block,
            positions=regression or None, dims=d.dims, dtype=jnp.dtype(d.dtype),
        )  # fmt: skip
        return Retriever(model, d.noise, d.drop)

    @functools.cached_property
    def space(self) -> edm.Space:
        d, queries = self.config.diffusion, self.data.query_embeddings
        return stages.fit_space(self.sets, queries, centred=d.centred, dims=d.dims, seed=self.seed)

    def set_stage(self, folder: str) -> Stage:
        """The diffusion retriever or the regressor, on the same synthetic sets."""
        c, regression = self.config, folder == "regressor"
        return stages.make_stage(
            folder, self.retriever(regression), self.space, self.sets, self.data.query_embeddings,
            batch=c.diffusion.batch, rows=self.rows(regression), keep_top=c.synthesis.keep_top,
            regression=regression, seed=self.seed,
        )  # fmt: skip

    def train_sets(self) -> None:
        """The diffusion retriever, then the regressor."""
        for folder in ("diffusion", "regressor"):
            self._fit(folder, self.set_stage(folder))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run lives as long as its process
    def model(self, folder: str, step: int | None = None) -> SetRetriever:
        """The set model of `folder`, of its last step or another: regressor, or diffusion, which draws
        `spare` rows more where it can."""
        regression = folder == "regressor"
        positions = regression or self.config.diffusion.block == "paper"
        spare = 0 if positions else self.config.evaluation.spare[self.data.references is not None]
        retriever = self.retriever(regression)
        params = restore_params(
            self.folder / folder / "checkpoints", jax.eval_shape(retriever.init, jax.random.key(0)),
            card=stages.model_card(retriever.model, self.space, self.rows(regression)),
            step=step or self.options(folder).steps,
        )  # fmt: skip
        placed = whole((params, self.space), self.mesh)
        return SetRetriever(retriever, *placed, self.rows(regression) + spare)

    def train(self) -> None:
        """Policy, synthesis, set models; what is finished is not done again."""
        done = self.folder / "trained"
        wanted = json.dumps(sorted(self.config.ablations))
        if done.exists() and done.read_text() == wanted:
            return
        self.train_policy()
        found = self.sets
        print(f"synthesis: {len(found)} sets of {found.counts['asked']} fan-outs", flush=True)
        self.train_sets()
        write_text(done, wanted)


def open_runs(config: ConfigDict, workdir: Path) -> Iterator[FanoutRun]:
    """The run of every seed; `workdir`/seed_N holds what it writes."""
    check(config)
    encoder = load_encoder()
    data = open_fanout(config, encoder)
    same_run(config, data.arrays, workdir)
    print(
        f"{data.name}: {len(data.contents)} contents x {data.width}, {len(data.queries)} queries; "
        f"{jax.device_count()} {jax.default_backend()} device(s)",
        flush=True,
    )
    check_fits(config, data)
    for seed in config.seeds:
        yield FanoutRun(config, data, encoder, workdir / f"seed_{seed}", seed)


@functools.lru_cache(maxsize=8)
def _stop(tokenizer: Any, prompt: prompts.Prompt) -> tuple[int, ...]:
    return prompts.stop_tokens(prompt, functools.partial(tokenizer.decode, special=True), tokenizer.size)
