"""The lines of every table: which queries of which trained model, and what validation chooses among."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experiments.recipes import MEMORY, RECIPES, lines
from genret.modit.baselines import STRENGTHS, reach, unit
from genret.modit.protocol import Cell, Contexts, Method, choose, validation_scores
from genret.modit.queries import HEUN_CALLS

if TYPE_CHECKING:
    from experiments.modit import Run

CALLS = {1: "posterior_mean", **dict.fromkeys((2, 4, 8, 16), "euler"), 35: "heun", 256: "euler_maruyama"}
FRONTIER = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0)  # guidance


def all_methods(run: Run) -> Iterator[Method]:
    """Baselines, rivals, our models, ablations, curves, references: nothing is loaded until it is run."""
    yield from run.baselines.methods()
    yield from _rivals(run)
    yield from _ours(run)
    yield from _ablations(run)
    if "kinds" in run.config.ablations:
        yield from _kinds(run)
    if "curves" in run.config.ablations:
        yield from _curves(run)
    yield from run.baselines.references()


def _rivals(run: Run) -> Iterator[Method]:
    e, steps, x = run.config.evaluation, run.config.contrastive.steps, run.catalogue.embeddings
    for source, name in (("labels", "labels"), ("pseudo", "pseudo-labels")):

        def encoded(contexts: Contexts, setting, source=source):
            n, r = setting
            made = run.contrastive(source, n)(run.baselines.mean(contexts), contexts.domain)
            return reach(x, contexts, made[:, None], r)

        grid = [(n, r) for n in steps for r in e.reaches]
        line = Method(f"contrastive encoder, {name}", encoded, grid, calls=1)
        yield line
        yield from _with_memory(run, line)
    regressor = _one_call(run, "sft_mse")
    yield Method("MSE regressor (same DiT)", regressor, [(0.0, r) for r in e.reaches], calls=1)


def _one_call(run: Run, folder: str, step: int | None = None) -> Callable:
    """(contexts, (guidance w, reach r)) -> c_S + r (q_w - c_S); reach is what strength is to steering."""

    def queries(contexts: Contexts, setting: tuple[float, float]):
        w, r = setting
        return reach(run.catalogue.embeddings, contexts, run.model(folder, step).queries(contexts, w), r)

    return queries


def _with_memory(run: Run, line: Method) -> Iterator[Method]:
    """The queries of the longest training + g × what the training cells suggest at temperature t
    (`Memory.lift`), and without: a line of its own where evaluation.memory lists any. Validation Joint
    alone chooses, for ours as for the rivals: no floor under Purity."""

    def queries(contexts: Contexts, setting: tuple):
        *plain, t, g = setting
        made = line.run(contexts, tuple(plain))
        b = run.baselines
        return unit(made + g * b.memory.lift(b.mean(contexts), contexts.domain, t)[:, None]) if g else made

    tried = ((1.0, 0.0), *run.config.evaluation.memory)
    grid = [(*s, *m) for s in line.grid if s[0] == line.grid[-1][0] for m in tried]
    calls = (lambda s: line.calls(s[:-2])) if callable(line.calls) else line.calls
    if run.config.evaluation.memory:
        yield replace(line, name=line.name + MEMORY, run=queries, grid=grid, calls=calls, floor={})


def _calls(setting: tuple) -> int:
    return 2 if setting[-2] else 1


def _ours(run: Run) -> Iterator[Method]:
    e = run.config.evaluation
    settings = [(0.0, r) for r in e.reaches] + [(w, 1.0) for w in e.guidance]

    def staged(contexts: Contexts, setting: tuple[str, float, float]):
        return _one_call(run, setting[0])(contexts, setting[1:])

    def preferred(contexts: Contexts, setting: tuple[int, float, float]):
        return _one_call(run, "hppo", setting[0])(contexts, setting[1:])

    best = Method("MO-DiT", staged, [(s, *rest) for s in ("cpt", "sft") for rest in settings], calls=_calls)

    @functools.cache
    def floor() -> dict[Cell, float]:
        """Validation Purity, per cell, of the setting that validation chose for stages 1-3."""
        contexts = run.contexts("validation")
        chosen = choose(best, run.searcher, contexts)
        scores = {s: validation_scores(best, run.searcher, contexts, s) for s in set(chosen.values())}
        return {cell: scores[setting][1][cell] for cell, setting in chosen.items()}

    rounds = [(s, *rest) for s in run.rounds for rest in settings]
    ours = Method("MO-DiT+HPPO", preferred, rounds, calls=_calls, floor=floor)
    yield ours
    yield from _with_memory(run, ours)
    yield best
    if run.config.retrieval.weight:
        yield Method("MO-DiT, retrieval-aware SFT", _one_call(run, "sft_retrieval"), settings, calls=_calls)

    def pretrained(contexts: Contexts, _: Any):
        return run.model("pretrain").queries(contexts, null=True)

    yield Method("plain pretrained DiT", pretrained, calls=1, uses="nothing")
    for name in ("cpt", "sft", "hppo"):
        yield Method(f"MO-DiT after {name.upper()}", _one_call(run, name), [(0.0, 1.0)], calls=1)


def _kinds(run: Run) -> Iterator[Method]:
    n = run.config.evaluation.samples

    def line(name: str, folder: str, calls: int, probes=1, mean=False, **options: Any) -> Method:
        def queries(contexts: Contexts, _: Any):
            made = run.model(folder).queries(contexts, seed=run.seed, **options)
            return unit(made.mean(1, keepdims=True)) if mean else made

        said = f"{folder.upper()}, {name}"
        return Method(said, queries, calls=calls, probes=probes, table="query kind")

    for folder in ("sft", "hppo"):
        yield line("posterior mean", folder, 1)
        yield line("roll-out of 1", folder, 2, rollout=1)
        yield line("roll-out of 2", folder, 3, rollout=2)
        yield line("one sample", folder, HEUN_CALLS, method="heun")
        yield line(f"mean of {n} samples", folder, n * HEUN_CALLS, mean=True, method="heun", samples=n)
        yield line(f"{n} samples merged", folder, n * HEUN_CALLS, n, method="heun", samples=n)


def _ablations(run: Run) -> Iterator[Method]:
    """One-call queries at reach 1, without anything chosen on validation."""
    reads = {"pretrain": "nothing", "cpt_true": "all labels"}
    for table in run.config.ablations:
        for folder, name in lines(table).items():
            if folder in run.recipes:
                yield Method(
                    f"{table}: {name}", as_trained(run, folder), [(0.0, 1.0)], calls=1, table=table,
                    uses=reads.get(RECIPES[folder].stage if folder != "cpt_true" else folder, "labels"),
                )  # fmt: skip


def as_trained(run: Run, folder: str, step: int | None = None) -> Callable:
    """The one-call query with the seeds in the order that the folder's walks were in, without a domain where
    it knew none. step: of a checkpoint, None for the last."""
    recipe = RECIPES[folder]

    def queries(contexts: Contexts, _: Any):
        model = run.model(folder, step)
        if recipe.stage == "pretrain":
            return model.queries(contexts, null=True)
        order = {"descending": "descending", "shuffled": "shuffled", "noise": "shuffled"}
        return model.queries(contexts, order=order.get(recipe.order, "ascending"))

    return queries


def _curves(run: Run) -> Iterator[Method]:
    """One sample against network calls, and the two frontiers; no setting is chosen."""
    for calls, method in CALLS.items():
        steps = 18 if method == "heun" else calls

        def sampled(contexts: Contexts, _: Any, method=method, steps=steps):
            return run.model("sft").queries(contexts, method=method, steps=steps, seed=run.seed)

        yield Method(f"SFT, {method} in {calls} calls", sampled, calls=calls, table="calls", x=calls)
    for w in FRONTIER:
        calls = 2 if w else 1
        yield Method(
            f"HPPO, guidance {w}", _one_call(run, "hppo"), [(w, 1.0)], calls=calls, table="guidance", x=w
        )
    for s in STRENGTHS:
        yield Method(f"steering, strength {s}", run.baselines.steering, [s], table="steering", x=s)
