"""Runs whose arrays have sizes and no values: what `compile` takes stages, batches and states from.

Embeddings, labels and densities are one row seen N times, so a catalogue of any size takes no memory, and
models are shapes. Batches are drawn by the stages themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.catalogues import catalogue_path
from experiments.modit import Run
from experiments.r4t import FanoutRun, fanout_texts
from genret.catalogue import moses
from genret.catalogue.fanout import FanoutData
from genret.catalogue.format import Catalogue
from genret.catalogue.splits import Splits
from genret.catalogue.validate import ATTRIBUTE
from genret.diffusion import edm
from genret.language.encoder import load_encoder
from genret.language.pretrained import LanguageModel, load_language_model
from genret.modit import density as dn
from genret.modit import hppo, stages
from genret.modit import trajectories as tr
from genret.modit.fitting import Fitted
from genret.modit.queries import MoDiT
from genret.r4t.policy import RolloutBatch
from genret.r4t.rewards import OAR, WSCR, Scores
from genret.r4t.synthesis import SyntheticSets
from genret.training.stage import Stage
from genret.types import InputError, PyTree

CELL = 5  # times its mean size: the largest latent cell (measured: 2 to 3.4 on MOSES, 4 to 6.6 on fashion)


class Sizes(NamedTuple):
    """Of a catalogue and what is fitted on it: items N, width D, attributes M, training items, and the most
    items of a latent cell with one attribute, which the retrieval-aware term reads: those of the largest, if
    it is not known."""

    items: int
    width: int
    attributes: int
    train: int
    cell: int


def sizes_of(config: ConfigDict) -> Sizes:
    """What the catalogue's Parquet footer says, or for MOSES what is published; the rest from the config.

    Raises InputError for a catalogue that is neither.
    """
    c = config.catalogue
    path = catalogue_path(c)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if files:
        schema = pq.read_schema(files[0])
        attributes = sum(name.startswith(ATTRIBUTE) for name in schema.names)
        width = getattr(schema.field("embedding").type, "list_size", 0)
        items = sum(pq.read_metadata(file).num_rows for file in files)
        if not width:
            fix = "write a fixed_size_list"
            raise InputError("embedding", f"{path.name} does not say how wide its lists are", fix)
    elif c.data == "moses":
        items, width, attributes = c.num_items or sum(moses.ROWS.values()), moses.WIDTH, 4
    else:
        raise InputError("data", f"{path} is not built yet", "train on it first, or name one that is there")
    train = round(items * (1 - c.pattern_fraction) * (1 - c.item_fraction))
    return Sizes(items, width, attributes, train, min(CELL * max(config.latent.sizes), train))


def _same(value: float, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """An array of one value that takes the memory of one."""
    return np.broadcast_to(np.asarray(value, dtype), shape)


@dataclass(frozen=True, eq=False)
class AbstractRun(Run):
    """An MO-DiT run of a catalogue that has sizes and no values. devices: the mesh compiled for, where the
    config's own will not do."""

    sizes: Sizes
    devices: Mesh | None = None

    @property
    def mesh(self) -> Mesh:
        return self.devices or super().mesh

    @functools.cached_property
    def fitted(self) -> Fitted:
        n, d, m, train, cell = self.sizes
        members = np.arange(cell, dtype=np.int32)[None]
        cells = tr.Cells(members, _same(0, 1, n, dtype=np.int32), np.zeros(1, np.int32))
        density, seen = _same(0, m, n), _same(1, m, n, dtype=np.int8)  # as many positives as there can be
        data = stages.TrainingSet(
            _same(d**-0.5, n, d), np.arange(train), density, seen == 1, cells,
            _same(0, n, 1, dtype=np.int32), tr.fit_tails(cells, density, seen),
        )  # fmt: skip
        none = np.zeros((m, 0), np.int64)
        labels = dn.Labels(np.zeros(0, np.int64), none, none, seen)
        return Fitted(data, labels, density, _same(0, m, d), _same(0, m), lambda queries, domain: queries)

    def space(self, folder: str) -> edm.Space:
        return edm.plain_space(self.sizes.width, self.sizes.attributes).replace(
            centred=self.config.model.centred and not folder.endswith("_plain")
        )

    def model(self, folder: str, step: int | None = None) -> MoDiT:
        params = jax.eval_shape(self.retriever.init, jax.random.key(0))
        data = self.fitted.data
        return MoDiT(self.retriever, params, self.space(folder), data.embeddings, data.density)

    @functools.cached_property
    def labeller(self) -> hppo.Labeller:
        return hppo.Labeller(self.fitted, scorer=None, place=np.zeros(0, np.int32))

    def refresh(self, folder: str) -> hppo.Refresh:
        made = super().refresh(folder)
        side = _same(0, 1, self.sizes.width)
        items = np.zeros((1, self.config.evaluation.seeds), np.int32)
        # A round of one pair, so that none is sought.
        made._held = 0, {"items": items, "domain": items[:, 0], "winner": side, "loser": side}
        return made

    def stages(self) -> Iterator[Stage]:
        """Every stage that a run of this configuration trains."""
        return map(self.stage, self.recipes)


def abstract_run(config: ConfigDict, sizes: Sizes | None = None, mesh: Mesh | None = None) -> AbstractRun:
    """The first seed of an MO-DiT configuration. sizes: `sizes_of` it, or better known. mesh: its devices."""
    n, d, m, train, _ = sizes = sizes or sizes_of(config)
    rows = _same(0, n, dtype=np.int32)
    names = tuple(f"attribute {i}" for i in range(m))
    labels = _same(-1, m, n, dtype=np.int8)
    catalogue = Catalogue(
        "abstract", Path(), None, _same(d**-0.5, n, d), rows, (), names, labels, rows, rows, None, "", 0
    )
    splits = Splits(np.arange(n) < train, 0, {})
    return AbstractRun(config, catalogue, splits, Path(), config.seeds[0], sizes, mesh)


@dataclass(frozen=True, eq=False)
class AbstractFanoutRun(FanoutRun):
    """An R4T run of texts that are not embedded, and a language model whose weights are shapes."""

    @functools.cached_property
    def language(self) -> LanguageModel:
        found = load_language_model(self.config.language.model)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found.params)
        return LanguageModel(found.config, params, found.tokenizer)

    def rewards(self, components: tuple[str, ...] = ()) -> None:
        """None: no answer is scored."""

    def _pairs(self) -> list[tuple[str, list[str]]]:
        """The longest query, and an answer as long as may be."""
        encode, limit = self.policy.encode, self.config.language.max_new
        query = max((self.data.queries[row] for row in self.training_rows), key=lambda q: len(encode(q)))
        answer = [""]
        while len(encode(self.policy.prompt.answer([answer[0] + " a"]))) <= limit:
            answer[0] += " a"
        return [(query, answer)]

    def policy_stage(self, folder: str, warm: PyTree) -> Stage:
        stage = super().policy_stage(folder, warm)
        rollouts, rl = stage.batch, self.config.rl
        size, shape = rl.count * rl.group, (rl.count, rl.group)
        length = rollouts.tokens.shape[1] + self.config.language.max_new
        zeros, none = np.zeros((size, length), np.int32), np.zeros(shape, np.float32)
        names = OAR if self.data.references is None else WSCR
        stats = {*Scores(none, none > 0, none, dict.fromkeys(names, none)).summary(), "kept", "answer_tokens"}
        row = np.ones(size, np.float32)
        # A rollout of the longest answers, so that none is drawn.
        rollouts._held = (
            0,
            RolloutBatch(
                zeros, zeros == 0, zeros == 0, np.float32(zeros), row, row, dict.fromkeys(stats, row)
            ),
        )
        return stage

    @functools.cached_property
    def sets(self) -> SyntheticSets:
        shape = (2, self.config.k)
        present = np.arange(self.config.k) < np.array([[self.config.k], [1]])  # some answers are shorter
        targets = (np.ones((*shape, self.data.width), np.float16),)
        query, reward = np.zeros(2, np.int32), np.zeros(2, np.float32)
        return SyntheticSets(targets, present, query, reward, np.zeros(shape, np.int32), {}, {})

    @functools.cached_property
    def space(self) -> edm.Space:
        d, width = self.config.diffusion, self.data.width
        whole = edm.plain_space(width, 0).replace(centred=d.centred)
        return whole.replace(scale=jnp.ones(d.dims), basis=jnp.zeros((width, d.dims))) if d.dims else whole

    def stages(self) -> Iterator[Stage]:
        """Every stage that a run of this configuration trains."""
        yield self.warm_stage()
        warm = jax.eval_shape(self.policy.init, jax.random.key(0))
        yield from (self.policy_stage(folder, warm) for folder in self.tuned)
        yield from map(self.set_stage, ("diffusion", "regressor"))


def abstract_fanout_run(config: ConfigDict) -> AbstractFanoutRun:
    """The first seed of an R4T configuration: its texts are read, and not embedded."""
    texts, encoder = fanout_texts(config), load_encoder()
    rows = [_same(encoder.width**-0.5, len(x), encoder.width) for x in (texts.contents, texts.queries)]
    data = FanoutData(
        texts.name, texts.contents, rows[0], texts.queries, rows[1], texts.split, texts.references
    )
    return AbstractFanoutRun(config, data, encoder, Path(), config.seeds[0])
