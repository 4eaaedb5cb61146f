"""From a config to the objects of one MO-DiT run; training and evaluation share it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits, make_splits
from genret.diffusion import edm
from genret.diffusion.dit import make_dit
from genret.diffusion.retriever import Retriever
from genret.modit import baselines, contrastive, fitting, protocol, stages
from genret.modit.queries import MoDiT, model_methods
from genret.retrieval.index import build_index
from genret.training.checkpoint import restore_params
from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh
from genret.training.stage import Stage

STAGES = ("pretrain", "cpt", "sft")
# Other endings of the same run, from the same CPT checkpoint with the same batches and steps.
PLAIN, REGRESSION = "sft_plain", "sft_mse"


def options(section: ConfigDict, seed: int, **changes: Any) -> FitOptions:
    """FitOptions of a config section; a leaf that FitOptions does not know is an error."""
    return FitOptions(**{**section.to_dict(), **changes}, seed=seed)


@dataclass(frozen=True)
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

    def contexts(self, stage: str) -> protocol.Contexts:
        """Validation or test contexts; the same for every seed."""
        e = self.config.evaluation
        return protocol.draw_contexts(
            self.catalogue, self.splits, stage, seeds=e.seeds, least_seeds=e.least_seeds,
            least_positives=e.least_positives, per_pattern=e.per_pattern, seed=e.seed,
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

    @functools.cached_property
    def baselines(self) -> baselines.Baselines:
        f = self.fitted
        return baselines.Baselines(
            self.searcher, f.data, f.labels, f.predicted, f.normals, f.gradient,
            baselines.fit_ridge(f.data, seeds=self.config.evaluation.seeds, seed=self.seed),
        )  # fmt: skip

    @functools.cached_property
    def purity_floor(self) -> dict[protocol.Cell, float]:
        """Validation Purity of the seed mean, less what MO-DiT may lose of it."""
        seed_mean = next(self.baselines.methods())
        _, purity = protocol.validation_scores(seed_mean, self.searcher, self.contexts("validation"), None)
        return {cell: p - self.config.evaluation.purity_slack for cell, p in purity.items()}

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

    def space(self, name: str) -> edm.Space:
        """The coordinates of stage `name`, measured on 2,048 of its own targets."""
        c = self.config.model
        if not c.centred:
            return edm.plain_space(self.catalogue.width, self.catalogue.num_domains)
        rng = np.random.default_rng([self.seed, 41])
        # Pretraining knows no attribute, so its anchor is the seed mean alone.
        directions = self.directions * (name != "pretrain")
        batch = stages.DRAWS[name](rng, self.fitted.data, 2048, self.length(name))
        rows = np.flatnonzero(batch.weight)
        return edm.fit_space(
            jax.tree.map(lambda x: x[rows], batch.condition),
            batch.target[rows],
            directions,
            per_coordinate=c.per_coordinate,
        )

    def length(self, name: str) -> int:
        """Items per walk, or seeds per context in SFT."""
        return self.config.evaluation.seeds if name == "sft" else self.config.length

    def stage(self, folder: str) -> Stage:
        """The training stage of `folder`, ready to fit."""
        c, name = self.config, folder.partition("_")[0]
        term = stages.RetrievalTerm(**c.retrieval) if folder == "sft" and c.retrieval.weight else None
        return stages.make_stage(
            folder, self.retriever, self.space(name), self.fitted.data, batch=c.batch,
            length=self.length(name), replay=c.replay if name == "cpt" else 0.0, seed=self.seed,
            retrieval=term, regression=folder == REGRESSION,
        )  # fmt: skip

    @property
    def _trained(self) -> Path:
        return self.folder / "trained"

    def train(self) -> None:
        """Fit every stage that is not finished, each from the one before; then the trained rivals."""
        if self._trained.exists():
            return
        before = None
        for name in STAGES:
            endings = [name, PLAIN, REGRESSION] if name == "sft" else [name]
            states = [
                fit(
                    self.stage(folder), self.folder / folder,
                    options(self.config.stages[name], self.seed), mesh=self.mesh, init_from=before,
                )
                for folder in endings
            ]  # fmt: skip
            before = states[0].ema
        for source in ("labels", "pseudo"):
            for steps in self.config.contrastive.steps:
                self.contrastive(source, steps)
        self._trained.touch()  # a finished run is not even opened again

    def model(self, folder: str) -> MoDiT:
        """The trained model in `folder`; raises InputError for one that has not been trained to the end."""
        shapes = jax.eval_shape(self.retriever.init, jax.random.key(0))
        name = folder.partition("_")[0]
        space = self.space(name)
        params = restore_params(
            self.folder / folder / "checkpoints", shapes,
            card=stages.model_card(self.retriever.model, space), step=self.config.stages[name].steps,
        )  # fmt: skip
        params = jax.device_put(params)
        return MoDiT(self.retriever, params, space, self.catalogue.embeddings, self.fitted.predicted)

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
            batch=self.config.batch, corpus=self.config.retrieval.corpus,
            temperature=self.config.retrieval.temperature, mesh=self.mesh,
        )  # fmt: skip

    def methods(self) -> list[protocol.Method]:
        """Every line of the table, baselines first."""
        e, c = self.config.evaluation, self.config.contrastive
        base, x = self.baselines, self.catalogue.embeddings
        out = list(base.methods())
        for source, name in (("labels", "labels"), ("pseudo", "pseudo-labels")):
            encoders = {s: self.contrastive(source, s) for s in c.steps}

            def encoded(contexts, setting, encoders=encoders):
                steps, r = setting
                made = encoders[steps](base.mean(contexts), contexts.domain)
                return baselines.reach(x, contexts, made[:, None], r)

            grid = [(s, r) for s in c.steps for r in e.reaches]
            out.append(protocol.Method(f"contrastive encoder, {name}", encoded, grid, calls=1))
        regressor = self.model(REGRESSION)

        def regressed(contexts, r):
            return baselines.reach(x, contexts, regressor.queries(contexts), r)

        out.append(protocol.Method("MSE regressor (same DiT)", regressed, tuple(e.reaches), calls=1))
        out += model_methods(
            {name: self.model(name) for name in STAGES}, self.model(PLAIN), samples=e.samples,
            reaches=e.reaches, guidance=e.guidance, floor=self.purity_floor, seed=self.seed,
        )  # fmt: skip
        return out + list(base.references())


def open_run(config: ConfigDict, workdir: Path, seed: int, catalogue: Catalogue) -> Run:
    """The run of one seed; `workdir`/seed_N holds everything it writes."""
    c = config.catalogue
    splits = make_splits(
        catalogue, seed=c.seed, pattern_fraction=c.pattern_fraction, item_fraction=c.item_fraction
    )
    return Run(config, catalogue, splits, workdir / f"seed_{seed}", seed)
