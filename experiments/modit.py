"""From a config to the objects of one MO-DiT run; training and evaluation share it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.methods import all_methods
from experiments.recipes import RECIPES, Recipe, asked
from experiments.workdir import write_text
from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits, make_splits
from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.preference import Preference
from genret.diffusion.retriever import Retriever
from genret.modit import baselines, contrastive, fitting, hppo, protocol, stages
from genret.modit import density as dn
from genret.modit.memory import make_memory
from genret.modit.pairs import PAPER, PairRule
from genret.modit.queries import MoDiT
from genret.modit.validation import Spread
from genret.retrieval.index import build_index
from genret.retrieval.metrics import macro
from genret.training.checkpoint import restore_params
from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh, whole
from genret.training.rows import read_all
from genret.training.stage import Stage
from genret.types import PyTree


def options(section: ConfigDict, seed: int, **changes: Any) -> FitOptions:
    """FitOptions of a config section; a leaf that FitOptions does not know is an error."""
    return FitOptions(**{**section.to_dict(), **changes}, seed=seed)


@dataclass(frozen=True, eq=False)
class Run:
    """One seed of one configuration, in `folder`."""

    config: ConfigDict
    catalogue: Catalogue
    splits: Splits
    folder: Path
    seed: int

    @functools.cached_property
    def mesh(self) -> Mesh:
        return make_mesh(**self.config.mesh)

    @functools.cached_property
    def searcher(self) -> protocol.Searcher:
        e = self.config.evaluation
        depth = e.k + e.seeds
        return protocol.Searcher(
            self.catalogue, build_index(e.index, self.catalogue.embeddings, depth, self.mesh), e.k
        )

    @functools.cache  # noqa: B019
    def contexts(self, stage: str) -> protocol.Contexts:
        """Validation or test contexts; the same for every seed."""
        e = self.config.evaluation
        most = e.patterns if stage == "test" else e.validation_patterns
        return protocol.draw_contexts(
            self.catalogue, self.splits, stage, seeds=e.seeds, least_seeds=e.least_seeds,
            least_positives=e.least_positives, per_pattern=e.per_pattern, patterns=most, seed=e.seed,
        )  # fmt: skip

    @functools.cached_property
    def fitted(self) -> fitting.Fitted:
        c = self.config
        return fitting.prepare(
            self.catalogue, self.splits, self.folder, budget=c.labels.budget, k=c.evaluation.k,
            predictor=options(c.labels.predictor, self.seed),
            cells={n: c.latent[n] for n in ("sizes", "seeds", "smallest")},
            neighbours=c.latent.neighbours, tail_share=c.latent.tail_share,
            tail_least=c.latent.tail_least, seed=self.seed, index=c.evaluation.index, mesh=self.mesh,
        )  # fmt: skip

    def spreads(self) -> Iterator[Spread]:
        """The run's own label budget, then those of labels.sweep, each with a predictor of its own."""
        c, f = self.config, self.fitted
        yield Spread(c.labels.budget, f.labels, f.predicted, f.normals, f.intercepts)
        for budget in c.labels.sweep:
            labels = dn.buy_labels(
                self.catalogue, self.splits.train, budget=budget, k=c.evaluation.k, seed=self.seed
            )
            folder = self.folder / f"predictor_{budget}"
            predictor = dn.fit_predictor(
                self.catalogue, labels, folder, options(c.labels.predictor, self.seed), mesh=self.mesh
            )
            probes = dn.linear_probes(self.catalogue, labels)
            yield Spread(budget, labels, predictor.density(self.catalogue.embeddings), *probes)

    @functools.cached_property
    def baselines(self) -> baselines.Baselines:
        f = self.fitted
        return baselines.Baselines(
            self.searcher, f.data, f.labels, f.predicted, f.normals, f.gradient,
            baselines.fit_ridge(f.data, seeds=self.config.evaluation.seeds, seed=self.seed),
            make_memory(f.data),
        )  # fmt: skip

    @functools.cached_property
    def directions(self) -> np.ndarray:
        """What the anchor adds to the seed mean, f32[M+1, D]: the linear-probe normals at a fixed strength,
        nothing for the null domain."""
        null = np.zeros((1, self.catalogue.width), np.float32)
        return np.concatenate([self.config.model.anchor_steering * self.fitted.normals, null])

    @functools.cached_property
    def retriever(self) -> Retriever:
        c = self.config
        model = make_dit(
            c.model.size, embedding=self.catalogue.width, domains=self.catalogue.num_domains,
            max_context=max(c.length - 1, c.evaluation.seeds + 2), dtype=jnp.dtype(c.model.dtype),
            attention=c.model.attention or None,
        )  # fmt: skip
        return Retriever(model, c.model.noise, c.model.drop_domain)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Folder -> how it is trained."""
        return asked(tuple(self.config.ablations), bool(self.config.retrieval.weight))

    @property
    def rounds(self) -> tuple[int, ...]:
        """The steps that HPPO's rounds end at."""
        h = self.config.hppo
        return tuple(h.steps * (n + 1) for n in range(h.rounds))

    @functools.cache  # noqa: B019 - a run lives as long as its process
    def space(self, folder: str) -> edm.Space:
        """The coordinates of a folder, measured on 2,048 of its stage's own targets; HPPO keeps SFT's."""
        c, recipe = self.config.model, RECIPES[folder]
        if not (c.centred and recipe.centred):
            return edm.plain_space(self.catalogue.width, self.catalogue.num_domains)
        name = "sft" if recipe.stage == "hppo" else recipe.stage
        rng = np.random.default_rng([self.seed, 41])
        # Pretraining knows no attribute, so its anchor is the seed mean alone.
        directions = self.directions * (name != "pretrain" and recipe.steered)
        batch = read_all(stages.draw_batch(name, rng, self.fitted.data, 2048, self.length(name)))
        rows = np.flatnonzero(batch.weight)
        return edm.fit_space(
            jax.tree.map(lambda x: x[rows], batch.condition),
            batch.target[rows],
            directions,
            per_coordinate=c.per_coordinate,
        )

    def length(self, name: str) -> int:
        """Items per walk, or seeds per context from SFT on."""
        return self.config.length if name in ("pretrain", "cpt") else self.config.evaluation.seeds

    def stage(self, folder: str) -> Stage:
        """The training stage of `folder`, ready to fit."""
        c, recipe = self.config, RECIPES[folder]
        term = stages.RetrievalTerm(**c.retrieval) if recipe.retrieval and c.retrieval.weight else None
        if recipe.stage == "hppo":
            return self._hppo(folder, recipe, term)
        data = stages.with_order(self.fitted.data, recipe.order, self._training_labels, self.seed)
        return stages.make_stage(
            folder, self.retriever, self.space(folder), data, batch=c.batch,
            length=self.length(recipe.stage), replay=c.replay if recipe.stage == "cpt" else 0.0,
            seed=self.seed, retrieval=term, regression=recipe.regression, order=recipe.order,
        )  # fmt: skip

    @functools.cached_property
    def _training_labels(self) -> np.ndarray:
        """i8[M, N], -1 outside training: what the true-density ablation reads, and nothing else."""
        return np.where(self.splits.train, self.catalogue.labels, -1).astype(np.int8)

    @functools.cached_property
    def labeller(self) -> hppo.Labeller:
        name, k = self.config.hppo.index, self.config.evaluation.k
        # Seeds and items without a label are passed over, so it is tuned for rankings longer than k.
        index = None if name == "exact" else functools.partial(build_index, name, k=3 * k, mesh=self.mesh)
        return hppo.make_labeller(self.fitted, k, mesh=self.mesh, index=index)

    def _hppo(self, folder: str, recipe: Recipe, term: stages.RetrievalTerm | None) -> Stage:
        h = self.config.hppo
        return hppo.make_hppo_stage(
            folder, self.retriever, self.space(folder), self.model(recipe.start).params,
            self.refresh(folder), preference=Preference(**h.preference), batch=h.batch, fresh=h.fresh,
            retrieval=term, mesh=self.mesh, seed=self.seed,
        )  # fmt: skip

    def refresh(self, folder: str) -> hppo.Refresh:
        """Where the pairs of HPPO's rounds in `folder` come from."""
        h, recipe = self.config.hppo, RECIPES[folder]
        rule, policy = PAPER if recipe.paper else PairRule(**h.pairs), recipe.policy or h.policy
        share = 0.0 if policy == "deterministic" else rule.on_policy_share  # it has no such winner
        rule = dataclasses.replace(rule, filter=recipe.filter or rule.filter, on_policy_share=share)
        feedback = h.feedback and not recipe.paper
        rounds = hppo.Rounds(h.steps, h.contexts, policy, h.samples, rule, feedback)
        return hppo.Refresh(
            functools.partial(self._bound, self.space(folder)), self.labeller, rounds,
            self.folder / folder / "rounds", self.config.evaluation.seeds, self.seed, self._validated,
        )  # fmt: skip

    def _bound(self, space: edm.Space, params: PyTree) -> MoDiT:
        embeddings, density = self.catalogue.embeddings, self.fitted.predicted
        return MoDiT(self.retriever, *whole((params, space), self.mesh), embeddings, density)

    def _validated(self, model: MoDiT) -> dict[str, float]:
        """Macro Joint, Attribute and Purity of the one-call query on the validation contexts."""
        contexts = self.contexts("validation")
        scores = self.searcher.judge(self.searcher.rank(model.queries(contexts), contexts), contexts)
        names = ("joint", "attribute", "purity")
        return {n: macro(getattr(scores, n), contexts.pattern) for n in names}

    def options(self, folder: str) -> FitOptions:
        """How long and how fast `folder` is trained; HPPO keeps a checkpoint of every round."""
        stage = RECIPES[folder].stage
        if stage != "hppo":
            return options(self.config.stages[stage], self.seed)
        h = self.config.hppo
        return options(h.fit, self.seed, steps=h.steps * h.rounds, save_every=h.steps, keep=h.rounds)

    @property
    def _trained(self) -> Path:
        return self.folder / "trained"

    def train(self) -> None:
        """Fit every recipe that is not finished, each from the one before; then the trained rivals."""
        wanted = json.dumps(sorted(self.recipes))
        if self._trained.exists() and self._trained.read_text() == wanted:
            return  # a finished run is not even opened again
        for folder, recipe in self.recipes.items():
            init = self.model(recipe.start).params if recipe.start else None
            state = fit(
                self.stage(folder), self.folder / folder, self.options(folder), mesh=self.mesh, init_from=init
            )
            if recipe.stage == "hppo":
                scores = self._validated(self._bound(self.space(folder), state.params))
                print(f"{folder}: validation " + ", ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        for source in ("labels", "pseudo"):
            for steps in self.config.contrastive.steps:
                self.contrastive(source, steps)
        write_text(self._trained, wanted)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a sweep over checkpoints must not keep them all
    def model(self, folder: str, step: int | None = None) -> MoDiT:
        """The model of `folder` at its last step, or another; raises InputError where there is none."""
        shapes = jax.eval_shape(self.retriever.init, jax.random.key(0))
        space = self.space(folder)
        params = restore_params(
            self.folder / folder / "checkpoints", shapes,
            card=stages.model_card(self.retriever.model, space), step=step or self.options(folder).steps,
        )  # fmt: skip
        return self._bound(space, params)

    @functools.cache  # noqa: B019
    def contrastive(self, source: str, steps: int) -> Callable:
        """The discriminative rival; trained on the first call, read back later."""
        f, c = self.fitted, self.config.contrastive
        if source == "labels":
            positive = f.data.has
        else:  # as many pseudo-positives as the labels' own rate, by predicted density
            rates = [(s == 1).sum() / max((s >= 0).sum(), 1) for s in f.labels.seen]
            cut = [np.quantile(p[f.data.train], 1 - r) for p, r in zip(f.predicted, rates, strict=True)]
            positive = f.predicted >= np.asarray(cut)[:, None]
        return contrastive.fit_contrastive(
            f.data, positive, self.folder / f"contrastive_{source}_{steps}",
            options(c.fit, self.seed, steps=steps), seeds=self.config.evaluation.seeds,
            batch=self.config.contrastive.batch, corpus=self.config.retrieval.corpus,
            temperature=self.config.retrieval.temperature, mesh=self.mesh,
        )  # fmt: skip

    def methods(self) -> list[protocol.Method]:
        """Every line of every table."""
        return list(all_methods(self))


def open_run(config: ConfigDict, workdir: Path, seed: int, catalogue: Catalogue) -> Run:
    """The run of one seed; `workdir`/seed_N holds everything it writes."""
    c = config.catalogue
    splits = make_splits(
        catalogue, seed=c.seed, pattern_fraction=c.pattern_fraction, item_fraction=c.item_fraction
    )
    return Run(config, catalogue, splits, workdir / f"seed_{seed}", seed)
