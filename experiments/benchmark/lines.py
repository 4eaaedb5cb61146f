"""The lines of MO-DiT and of retrieval: training steps, samplers, scoring and search."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.benchmark import flops as fl
from experiments.benchmark.measure import Work, threads, traced_flops
from experiments.benchmark.world import DOMAINS, SEEDS, WALK, World
from genret.diffusion.preference import Preference
from genret.diffusion.retriever import Retriever
from genret.modit import contrastive, hppo, stages
from genret.modit import density as dn
from genret.modit.pairs import PairRule
from genret.modit.queries import HEUN_STEPS, MoDiT
from genret.modit.softmax import most_positives
from genret.r4t import stages as sets
from genret.r4t.fanout import SDE_STEPS, network_calls
from genret.r4t.synthesis import SyntheticSets
from genret.retrieval.index import QUERIES, ExactIndex, Index, recall_by_score, scann_index, search_rows
from genret.retrieval.scoring import Scorer
from genret.training import memory
from genret.training import mesh as meshes
from genret.training.log import counted_flops
from genret.training.loop import FitOptions, begin, compiled_step
from genret.training.stage import Stage
from genret.types import PyTree

OPTIONS = FitOptions(steps=1_000_000)


class Trainer:
    """One stage, stepped by the train step of `fit`, with the memory that `fit` keeps after four steps:
    `batch` stays on the device, the state is donated."""

    def __init__(
        self, stage: Stage, mesh: Mesh, init_from: PyTree | None = None, options: FitOptions = OPTIONS
    ):
        self.stage = stage
        params = jax.jit(stage.init)(jax.random.key(0)) if init_from is None else init_from
        params = jax.tree.map(np.array, params)  # a copy: the state is donated
        start = functools.partial(begin, options)
        placed = meshes.shardings(jax.eval_shape(start, params), mesh, stage.rules)
        self.state = jax.jit(start, out_shardings=placed)(params)
        host = stage.batch(0, self.state.params)
        self.step, on_frozen, self.on_batch = compiled_step(stage, options, mesh, placed, host)
        self.frozen = meshes.place(stage.frozen, on_frozen)
        self.batch = meshes.place(host, self.on_batch)
        self.flops = counted_flops(self.step.trace(self.state, self.frozen, self.batch))
        self.memory = contextlib.ExitStack()
        self.look = self.memory.enter_context(memory.kept())

    def __call__(self) -> dict[str, Any]:
        self.state, metrics = self.step(self.state, self.frozen, self.batch)
        self.look(metrics)
        return metrics

    def host_seconds(self) -> dict[str, float]:
        """Median seconds that the host takes to draw a batch and to place it, beside the step; steps end."""
        self.memory.close()
        drawn, placed = [], []
        for step in range(1, 6):
            began = time.perf_counter()
            host = self.stage.batch(step, self.state.params)
            drawn.append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(meshes.place(host, self.on_batch))
            placed.append(time.perf_counter() - began)
        return {"host_batch_s": float(np.median(drawn)), "host_place_s": float(np.median(placed))}


def trained(
    world: World, stage: Stage, about: str, flops: float, formula: str, items: int, unit: str = "examples",
    init_from: PyTree | None = None,
) -> Work:  # fmt: skip
    """A train step of `stage`. flops: of all `items`."""
    trainer = Trainer(stage, world.mesh, init_from)
    return Work(
        trainer, f"{about}, batch {items}, AdamW, EMA", items, unit, flops, formula, trainer.flops,
        after=trainer.host_seconds, warm=4,
    )  # fmt: skip


def _network(world: World) -> str:
    m = world.retriever.model
    return f"DiT {m.width} x {m.depth}, {np.dtype(m.dtype).name}, D {world.width}"


def _softmax(world: World) -> tuple[int, float]:
    """Items in the corpus of the retrieval-aware term, and its FLOPs for one query."""
    data, width = world.fitted.data, world.width
    corpus = min(world.scale.corpus, len(data.train))
    return corpus, fl.softmax_term(corpus, most_positives(data.cells.members, data.has), width)


def train_stage(world: World, name: str, retrieval: bool = False) -> Work:
    """A step of pretrain, cpt or sft."""
    batch, length = world.scale.batch, SEEDS if name == "sft" else WALK
    stage = stages.make_stage(
        name, world.retriever, world.space, world.fitted.data, batch=batch, length=length,
        replay=0.15 if name == "cpt" else 0.0, retrieval=_term(world) if retrieval else None,
    )  # fmt: skip
    context = SEEDS if name == "sft" else WALK - 1
    one = fl.dit(world.retriever.model, rows=1, context=context).train
    about, formula = f"{_network(world)}, S {context}, K 1", fl.TRAIN
    if retrieval:
        corpus, softmax = _softmax(world)
        one = 2 * one + softmax
        about += f", softmax over {corpus}"
        formula = f"2 x train (the loss, the one-call query) + 4 D (corpus + positives); {fl.TRAIN}"
    return trained(world, stage, about, batch * one, formula, batch)


def _term(world: World) -> stages.RetrievalTerm:
    return stages.RetrievalTerm(1.0, 0.035, world.scale.corpus)


def train_hppo(world: World, retrieval: bool) -> Work:
    """A step on preference pairs of one real round: pools, scoring and selection come before the clock."""
    s, fitted, params = world.scale, world.fitted, world.params
    term = _term(world) if retrieval else None
    # Any pair will do here: an untrained model has no winner by the real rule.
    rule = PairRule(1, "off", on_policy_share=0.0, improve=False, apart=np.pi)
    rounds = hppo.Rounds(OPTIONS.steps, s.contexts, samples=2, rule=rule)
    folder = world.folder / ("hppo_retrieval" if retrieval else "hppo")
    refresh = hppo.Refresh(
        lambda p: MoDiT(world.retriever, p, world.space, fitted.data.embeddings, fitted.predicted),
        hppo.make_labeller(fitted, min(20, s.depth), mesh=world.mesh), rounds, folder, SEEDS, 0, lambda _: {},
    )  # fmt: skip
    preference = Preference(beta=0.1, draws=2)
    stage = hppo.make_hppo_stage(
        "hppo", world.retriever, world.space, params, refresh, preference=preference, batch=s.pairs,
        fresh=s.fresh, retrieval=term,
    )  # fmt: skip
    one = fl.dit(world.retriever.model, rows=1, context=SEEDS)
    flops = s.pairs * 2 * preference.draws * (one.train + one.total)
    formula = "2 sides x draws x (train of the model + forward of the reference)"
    about = f"{_network(world)}, S {SEEDS}, {preference.draws} draws"
    if term:
        corpus, softmax = _softmax(world)
        flops += s.pairs * s.fresh * (one.train + softmax)
        formula += " + fresh x (train of the one-call query + 4 D (corpus + positives))"
        about += f", {s.fresh} fresh contexts a pair, softmax over {corpus}"
    return trained(world, stage, about, flops, formula, s.pairs, "pairs", init_from=params)


def train_predictor(world: World) -> Work:
    """A step of the metric predictor."""
    labels, batch = world.fitted.labels, world.scale.batch
    stage = dn.predictor_stage(world.fitted.data.embeddings[labels.probes], labels, batch=batch)
    w, d = dn.DensityMLP(DOMAINS).width, world.width
    flops = batch * (2 * 2 * d * w + 3 * 2 * (w * w + w * DOMAINS))
    formula = "4DW + 6W(W + M)"
    return trained(world, stage, f"MLP {d}-{w}-{w}-{DOMAINS}", flops, formula, batch)


def train_contrastive(world: World) -> Work:
    """A step of the discriminative rival."""
    s, data, d = world.scale, world.fitted.data, world.width
    corpus, softmax = _softmax(world)
    stage = contrastive.contrastive_stage(
        "contrastive", data, data.has, seeds=SEEDS, batch=s.batch, corpus=corpus, temperature=0.035
    )
    flops = s.batch * (4.0 * DOMAINS * d * d + softmax)
    formula = "4 M D^2 + 4 D (corpus + positives)"
    return trained(world, stage, f"D {d}, softmax over {corpus}", flops, formula, s.batch)


def train_sets(world: World, regression: bool = False) -> Work:
    """A step of R4T's set diffusion, or of the regressor that it is compared with."""
    s, rng = world.scale, np.random.default_rng(5)
    x, rows = world.fitted.data.embeddings, s.rows
    count = 4 * s.batch
    query = rng.integers(0, len(x), count).astype(np.int32)
    items = world.fitted.data.neighbours[query][:, :rows]
    made = SyntheticSets(
        (x[items].astype(np.float16),), np.ones((count, rows), bool), query,
        np.zeros(count, np.float32), items, {}, {},
    )  # fmt: skip
    model = sets.set_dit(
        s.dit, embedding=world.width, rows=rows, dtype=world.retriever.model.dtype,
        positions=regression or None,
    )  # fmt: skip
    retriever = Retriever(model, "log_normal")
    space = sets.fit_space(made, x)
    stage = sets.make_stage(
        "regressor" if regression else "diffusion", retriever, space, made, x, batch=s.batch,
        regression=regression,
    )  # fmt: skip
    one = fl.dit(model, rows=rows)
    about = f"DiT {model.width} x {model.depth} with cross-attention, D {world.width}, K {rows}"
    about += ", rows matched to targets" if regression else ""
    return trained(world, stage, about, s.batch * one.train, fl.TRAIN, s.batch, "sets")


def sample(world: World, method: str, steps: int) -> Work:
    """Queries of one sampler, from noise to unit rows."""
    size, params = world.scale.batch, world.params
    given, keys = world.contexts(size), jax.random.split(jax.random.key(0), size)
    args = (world.retriever, params, jax.device_put(world.space), given, keys, None)
    calls = network_calls(method, steps)
    one = fl.dit(world.retriever.model, rows=1, context=SEEDS)
    call = functools.partial(Retriever.generate, *args, method=method, steps=steps)
    return Work(
        call,
        f"{_network(world)}, S {SEEDS}, K 1, batch {size}, {calls} network calls", size, "queries",
        size * calls * one.total, f"calls x forward; forward: {fl.DIT}",
        traced_flops(call),
    )  # fmt: skip


def score(world: World) -> Work:
    """Joint, Attribute and Purity of candidates by real retrieval."""
    data, rng, s = world.fitted.data, np.random.default_rng(6), world.scale
    scorer = Scorer(
        data.embeddings, world.fitted.labels.seen, data.cells.membership, min(20, s.depth), mesh=world.mesh
    )
    contexts = s.candidates // 16
    items = rng.integers(0, len(data.embeddings), (contexts, 16))
    candidates = data.embeddings[items] + 0.3 * synthetic_noise(rng, (contexts, 16, world.width))
    asked = dict(
        domain=rng.integers(0, DOMAINS, contexts), partition=np.zeros(contexts, np.int32),
        pattern=rng.integers(0, len(data.cells.members), contexts),
        exclude=rng.integers(0, len(data.embeddings), (contexts, SEEDS)),
    )  # fmt: skip
    count, index = contexts * 16, scorer.index
    return Work(
        lambda: scorer(candidates, **asked),
        f"{count} candidates against {len(data.embeddings)} x {world.width}, K {scorer.k}", count,
        "candidates",
        float(count * scorer.flops), "2 n D per candidate", _search_flops(index, count, scorer.k + SEEDS),
        4.0 * index.rows.size * -(-count // QUERIES), SEARCHED,
    )  # fmt: skip


def synthetic_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian f32 of about unit norm along the last axis."""
    return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)


SEARCHED = f"the corpus once per {QUERIES} queries"


def _search_flops(index: ExactIndex, count: int, k: int) -> float:
    queries = jax.ShapeDtypeStruct((count, index.width), np.float32)
    rows = jax.ShapeDtypeStruct(index.rows.shape, np.float32)
    return traced_flops(
        search_rows, queries, rows, k=k, num_items=index.num_items, block=index.block, mesh=index.mesh
    )


def _search(world: World, index: Index, built: float, **fields: Any) -> Work:
    q, k = world.queries, world.scale.depth
    n, d = world.vectors.shape
    return Work(
        lambda: index.search(q, k), f"{len(q)} queries, K {k}, {n} x {d} {world.source}", len(q), "queries",
        more={"build_s": built, "threads": threads()}, **fields,
    )  # fmt: skip


def search_exact(world: World) -> Work:
    """Exhaustive search on the device."""
    began = time.perf_counter()
    index = ExactIndex(world.vectors, mesh=world.mesh)
    jax.block_until_ready(index.rows)
    built, q = time.perf_counter() - began, len(world.queries)
    return _search(
        world, index, built, flops=2.0 * q * world.vectors.size, formula="2 n D per query",
        counted=_search_flops(index, q, world.scale.depth),
        bytes=4.0 * index.rows.size * -(-q // QUERIES), traffic=SEARCHED,
    )  # fmt: skip


@functools.cache
def exact_scores(world: World) -> np.ndarray:
    """What recall is measured against, f32[Q, K]."""
    return ExactIndex(world.vectors, mesh=world.mesh).search(world.queries, world.scale.depth)[1]


def search_scann(world: World) -> Work:
    """ScaNN as `build_index` makes it, with its measured recall."""
    began = time.perf_counter()
    index = scann_index(world.vectors, k=world.scale.depth)
    built = time.perf_counter() - began
    found = index.search(world.queries, world.scale.depth)[1]
    recall = recall_by_score(found, exact_scores(world))
    return _search(world, index, built, after=lambda: {"recall": recall})


LINES: dict[str, Callable[[World], Work]] = {
    **{f"train {n}": functools.partial(train_stage, name=n) for n in ("pretrain", "cpt", "sft")},
    "train sft retrieval": functools.partial(train_stage, name="sft", retrieval=True),
    "train hppo": functools.partial(train_hppo, retrieval=False),
    "train hppo retrieval": functools.partial(train_hppo, retrieval=True),
    "train predictor": train_predictor,
    "train contrastive": train_contrastive,
    "train sets": train_sets,
    "train regressor": functools.partial(train_sets, regression=True),
    "sample posterior_mean": functools.partial(sample, method="posterior_mean", steps=1),
    f"sample heun {HEUN_STEPS}": functools.partial(sample, method="heun", steps=HEUN_STEPS),
    f"sample euler_maruyama {SDE_STEPS}": functools.partial(sample, method="euler_maruyama", steps=SDE_STEPS),
    "score candidates": score,
    "search exact": search_exact,
    "search scann": search_scann,
}
