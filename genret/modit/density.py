"""Attribute density: online labels bought on training items, and the predictor that spreads them.

The density of item i in domain m is what a user of the index would get with i as the query,
ρ_m(i) = Attribute@K(e_i) (papers' A.2, our reconstruction). One label costs one probe and K look-ups,
so a few per cent of the training items are probed and a light predictor fills in the rest (A.3).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from genret.catalogue.format import Catalogue
from genret.diffusion.edm import unit
from genret.retrieval.index import ExactIndex, Index
from genret.training.log import Progress
from genret.training.loop import FitOptions, fit
from genret.training.mesh import local
from genret.training.stage import Stage
from genret.types import Array, InputError, PyTree, Terms


@dataclass(frozen=True)
class Labels:
    """What was bought: `probes` i32[P] are catalogue rows; positives, trials i32[M, P] count the known
    labels among each probe's K training neighbours; seen i8[M, N] holds every label that was looked up
    on the way (1, 0, and -1 for never looked up or unknown)."""

    probes: np.ndarray
    positives: np.ndarray
    trials: np.ndarray
    seen: np.ndarray

    @property
    def lookups(self) -> int:
        """Distinct (item, domain) labels read: the budget that every label-using method shares."""
        return int((self.seen >= 0).sum())


def buy_labels(catalogue: Catalogue, train: np.ndarray, *, budget: float, k: int, seed: int) -> Labels:
    """Probe a share `budget` of the training items against an index of training items only.

    train: bool[N]. No held-out row is retrieved or looked up. Raises InputError for a budget that is
    not in (0, 1] or buys no probe.
    """
    rows = np.flatnonzero(train)
    count = round(budget * len(rows)) if 0 < budget <= 1 else 0
    if count < 1:
        raise InputError("budget", f"{budget} of {len(rows)} items", "use a share in (0, 1]")
    rng = np.random.default_rng([seed, 11])
    chosen = np.sort(rng.choice(len(rows), count, replace=False))
    index = ExactIndex(catalogue.embeddings[rows])
    queries = np.asarray(catalogue.embeddings[rows[chosen]])
    ids = search_in_parts(index, queries, min(k + 1, len(rows)), "probes")
    # The probe itself is not its own neighbour; drop it, or the last if duplicates pushed it out.
    itself = ids == chosen[:, None]
    itself[:, -1] |= ~itself.any(1)
    neighbours = rows[ids[~itself].reshape(count, -1)]  # [P, K]
    found = catalogue.labels[:, neighbours]  # [M, P, K]
    seen = np.full_like(catalogue.labels, -1)
    read = np.unique(neighbours)
    seen[:, read] = catalogue.labels[:, read]
    return Labels(rows[chosen], (found == 1).sum(-1), (found >= 0).sum(-1), seen)


def search_in_parts(index: Index, queries: np.ndarray, k: int, name: str, part: int = 16_384) -> np.ndarray:
    """ids i32[Q, k] of `index.search`, `part` queries at a time: of millions, people see how far it is, and
    ScaNN, which holds the candidates of all queries of a call, needs no gigabytes for them."""
    if len(queries) <= part:
        return index.search(queries, k)[0]
    progress, found = Progress(name, len(queries), apart=10.0), []
    for start in range(0, len(queries), part):
        found.append(index.search(queries[start : start + part], k)[0])
        progress(min(start + part, len(queries)))
    return np.concatenate(found)


class DensityMLP(nn.Module):
    """Two GELU layers and one logit per domain: f32[B, D] -> f32[B, M]."""

    domains: int
    width: int = 256

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x * np.sqrt(x.shape[-1])
        for i in range(2):
            x = nn.gelu(nn.Dense(self.width, name=f"hidden_{i}")(x))
        return nn.Dense(self.domains, name="logits")(x)


def binomial_loss(logits: Array, positives: Array, trials: Array) -> Array:
    """-[k₊ log f + (K - k₊) log(1 - f)] / K averaged over domains, f = sigmoid(logit): f32[B].

    positives, trials: [B, M]; a domain without a known neighbour (trials 0) contributes nothing.
    """
    nll = trials * jax.nn.softplus(logits) - positives * logits
    return jnp.mean(nll / jnp.maximum(trials, 1), axis=-1)


@dataclass(frozen=True)
class Predictor:
    """The metric predictor f of every domain at once, read as ρ̂ = sigmoid(logit)."""

    model: DensityMLP
    params: PyTree

    def density(self, embeddings: np.ndarray, block: int = 8192) -> np.ndarray:
        """ρ̂ f32[M, n] of embeddings f32[n, D], in blocks of one compiled shape."""
        logits = jax.jit(lambda e: self.model.apply({"params": self.params}, e))
        out = np.empty((self.model.domains, len(embeddings)), np.float32)
        for start in range(0, len(embeddings), block):
            part = np.asarray(embeddings[start : start + block])
            padded = np.pad(part, ((0, block - len(part)), (0, 0)))
            out[:, start : start + len(part)] = np.asarray(logits(padded)).T[:, : len(part)]
        return 1 / (1 + np.exp(-out))

    def gradient(self, embeddings: np.ndarray, domain: np.ndarray) -> np.ndarray:
        """Unit gradient f32[Q, D] of the log-odds of each row's domain."""
        return np.asarray(unit(_ascent(self.model, self.params, embeddings, domain)))


# Compiled once for each Q: HPPO's pools and a baseline's settings ask again and again.
@functools.partial(jax.jit, static_argnums=0)
def _ascent(model: DensityMLP, params: PyTree, embeddings: Array, domain: Array) -> Array:
    def logit(e, m):
        return model.apply({"params": params}, e[None])[0, m]

    return jax.vmap(jax.grad(logit))(embeddings, domain)


def predictor_card(catalogue: Catalogue, labels: Labels) -> dict:
    """What a predictor's checkpoint was trained on."""
    bought = {"probes": len(labels.probes), "lookups": labels.lookups}
    return {"domains": list(catalogue.attribute_names), "embedding": catalogue.width, **bought}


def fit_predictor(
    catalogue: Catalogue,
    labels: Labels,
    workdir: Path,
    options: FitOptions,
    *,
    batch: int = 256,
    mesh: Mesh | None = None,
) -> Predictor:
    """Train the metric predictor on the probes; a finished run is read back."""
    x = np.asarray(catalogue.embeddings[labels.probes])
    card = predictor_card(catalogue, labels)
    stage = predictor_stage(x, labels, card=card, batch=batch, seed=options.seed)
    params = local(fit(stage, workdir, options, mesh=mesh).ema)
    return Predictor(DensityMLP(catalogue.num_domains), params)


def predictor_stage(
    x: np.ndarray, labels: Labels, *, card: dict | None = None, batch: int = 256, seed: int = 0
) -> Stage:
    """The stage that trains a `DensityMLP` on probes x f32[P, D] and what `labels` counts of them."""
    model = DensityMLP(len(labels.positives))
    positives, trials = (a.T.astype(np.float32) for a in (labels.positives, labels.trials))

    def loss(params, _, rows, draw):
        # Noise of a tenth of a coordinate's spread keeps 1,000 probes from being memorised.
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(draw.key)
        logits = model.apply({"params": params}, rows["x"] + 0.3 * x.shape[1] ** -0.5 * noise)
        value = binomial_loss(logits, rows["positives"], rows["trials"])
        return Terms(value, jnp.ones_like(value))

    def batches(step, _):
        rows = np.random.default_rng([seed, 12, step]).integers(0, len(x), batch)
        return {"x": x[rows], "positives": positives[rows], "trials": trials[rows]}

    return Stage(
        name="predictor",
        init=lambda key: model.init(key, jnp.zeros((1, x.shape[1])))["params"],
        loss=loss,
        batch=batches,
        rules=((r"", P()),),
        card=card or {},
    )


def linear_probes(catalogue: Catalogue, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on the labels that were looked up: unit normals f32[M, D], intercepts f32[M].

    Scale: the decision function is (w·e + b) with ‖w‖ = 1, so only its order is meaningful.
    """
    from sklearn.linear_model import LogisticRegression

    normals = np.zeros((catalogue.num_domains, catalogue.width), np.float32)
    intercepts = np.zeros(catalogue.num_domains, np.float32)
    for m, name in enumerate(catalogue.attribute_names):
        rows = np.flatnonzero(labels.seen[m] >= 0)
        if len(np.unique(labels.seen[m, rows])) < 2:
            raise InputError(
                f"attribute/{name}",
                f"{len(rows)} look-ups found one class only",
                "raise the label budget",
            )
        probe = LogisticRegression(C=10.0, max_iter=300)
        probe.fit(catalogue.embeddings[rows], labels.seen[m, rows])
        norm = np.linalg.norm(probe.coef_[0])
        normals[m], intercepts[m] = probe.coef_[0] / norm, probe.intercept_[0] / norm
    return normals, intercepts


def knn_density(catalogue: Catalogue, labels: Labels, embeddings: np.ndarray, k: int = 10) -> np.ndarray:
    """Predictor baseline: share of positives among the known labels of the k nearest
    probes, f32[M, n]."""
    index = ExactIndex(catalogue.embeddings[labels.probes])
    ids, _ = index.search(np.asarray(embeddings), min(k, len(labels.probes)))
    positives, trials = labels.positives[:, ids].sum(-1), labels.trials[:, ids].sum(-1)
    return positives / np.maximum(trials, 1)
