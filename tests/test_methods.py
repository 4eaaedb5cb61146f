"""Every line of every table: what it asks of which model, at what cost, and what validation may choose."""

import functools
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.configs import modit
from experiments.methods import FRONTIER, all_methods
from experiments.modit import Run, open_run
from experiments.recipes import RECIPES, TABLES, TRAINED
from genret.modit import protocol as pr
from genret.modit.baselines import STRENGTHS, seed_mean, unit
from genret.modit.memory import Memory
from genret.modit.queries import HEUN_CALLS, HEUN_STEPS

PAIRS = [(0.0, 1.0), (0.0, 0.5), (2.0, 1.0)]  # (guidance, reach) that validation tries


class Toy:
    """A model whose answers tell folder, step and question apart: the seed mean, and noise of their own."""

    def __init__(self, run, folder, step):
        self.run, self.folder, self.step = run, folder, step

    def queries(self, contexts, guidance=0.0, *, samples=1, **asked):
        asked = dict(sorted(asked.items()))
        self.run.asked.append((self.folder, self.step, guidance, samples, asked))
        x, said = self.run.catalogue.embeddings, repr(self.run.asked[-1])
        noise = np.random.default_rng(zlib.crc32(said.encode())).normal(size=(samples, x.shape[1]))
        return unit(seed_mean(x, contexts)[:, None] + 0.03 * noise).astype(np.float32)


class Untrained(Run):
    """A run whose models, rivals and baselines are toys that count what is asked of them."""

    @functools.cached_property
    def asked(self):
        return []

    @functools.cached_property
    def loaded(self):
        return []

    @functools.cached_property
    def memory(self):
        rng, size = np.random.default_rng(2), self.catalogue.width
        return Memory(*(unit(rng.normal(size=(*n, 3, size))).astype(np.float32) for n in ((), (4,))))

    @functools.cached_property
    def baselines(self):
        x = self.catalogue.embeddings

        def steering(contexts, strength):
            return unit(seed_mean(x, contexts) + strength * np.eye(x.shape[1])[0])[:, None]

        def line(name, uses):
            return pr.Method(name, lambda c, _: seed_mean(x, c)[:, None], uses=uses)

        return SimpleNamespace(
            mean=lambda contexts: seed_mean(x, contexts), steering=steering,
            methods=lambda: iter([line("seed mean", "nothing")]), memory=self.memory,
            references=lambda: iter([line("reference", "pattern")]),
        )  # fmt: skip

    def model(self, folder, step=None):
        assert folder in self.recipes, f"{folder} is not trained by this run"
        self.loaded.append((folder, step))
        return Toy(self, folder, step)

    def contrastive(self, source, steps):
        self.loaded.append((source, steps))
        return lambda mean, domain: unit(mean + steps * np.eye(mean.shape[1])[domain] / 10)


@pytest.fixture
def run_of(molecules, tmp_path):
    """(ablation tables, weight of the retrieval-aware term) -> an untrained run of small grids."""

    def make(tables="", weight=1.0):
        config = modit.get_config("size=test" + (tables and f",ablations={tables}"))
        config.evaluation.update(index="exact", reaches=(1.0, 0.5), guidance=(2.0,), samples=3)
        config.contrastive.steps, config.retrieval.weight = (4, 6), weight
        run = open_run(config, tmp_path, 5, molecules)
        return Untrained(run.config, run.catalogue, run.splits, run.folder, 5)

    return make


def by_name(run):
    lines = list(all_methods(run))
    found = {line.name: line for line in lines}
    assert len(found) == len(lines)  # results are read by name
    return found


def some(run):
    contexts = run.contexts("test")
    return contexts.take(np.arange(0, len(contexts), len(contexts) // 7))


def reached(run, contexts, answer, r):
    mean = seed_mean(run.catalogue.embeddings, contexts)[:, None]
    return unit(mean + r * (answer - mean))


OURS = [
    "seed mean", "contrastive encoder, labels", "contrastive encoder, labels with memory",
    "contrastive encoder, pseudo-labels", "contrastive encoder, pseudo-labels with memory",
    "MSE regressor (same DiT)", "MO-DiT+HPPO", "MO-DiT+HPPO with memory", "MO-DiT",
    "MO-DiT, retrieval-aware SFT",
    "plain pretrained DiT", "MO-DiT after CPT", "MO-DiT after SFT", "MO-DiT after HPPO", "reference",
]  # fmt: skip


def test_the_lines_of_the_table(run_of):
    run = run_of()
    lines, contexts = by_name(run), some(run)
    assert [n for n, line in lines.items() if line.table == "main"] == OURS
    # Validation chooses among trained stages (never pretraining), or among HPPO's rounds.
    staged, ours = lines["MO-DiT"], lines["MO-DiT+HPPO"]
    assert list(staged.grid) == [(s, *pair) for s in ("cpt", "sft") for pair in PAIRS]
    assert list(ours.grid) == [(step, *pair) for step in (4, 8) for pair in PAIRS]
    assert lines["MO-DiT, retrieval-aware SFT"].grid == PAIRS
    assert lines["MSE regressor (same DiT)"].grid == PAIRS[:2]  # without diffusion there is no guidance
    encoders = ("contrastive encoder, labels", "contrastive encoder, pseudo-labels")
    for name in encoders:
        assert lines[name].grid == [(n, r) for n in (4, 6) for r in (1.0, 0.5)]
    # One call, but for guidance, whatever else is in the setting.
    assert [staged.calls(s) for s in (("sft", 0.0, 0.5), ("sft", 2.0, 1.0))] == [1, 2]
    assert [ours.calls(s) for s in ((8, 0.0, 0.5), (4, 2.0, 1.0))] == [1, 2]
    assert [lines["MO-DiT, retrieval-aware SFT"].calls(s) for s in PAIRS] == [1, 1, 2]
    for name in ("MSE regressor (same DiT)", *encoders, *OURS[10:14]):
        assert lines[name].calls == 1
    # Each setting is the query that it says.
    for line, folder in (
        (staged, None),
        (ours, "hppo"),
        (lines["MO-DiT, retrieval-aware SFT"], "sft_retrieval"),
    ):
        for setting in line.grid:
            found = line.run(contexts, setting)
            *which, w, r = setting
            model = (
                Toy(run, which[0], None) if folder is None else Toy(run, folder, which[0] if which else None)
            )
            np.testing.assert_array_equal(found, reached(run, contexts, model.queries(contexts, w), r))
    for r in (1.0, 0.5):
        found = lines["MSE regressor (same DiT)"].run(contexts, (0.0, r))
        answer = Toy(run, "sft_mse", None).queries(contexts, 0.0)
        np.testing.assert_array_equal(found, reached(run, contexts, answer, r))
    for name, source in zip(encoders, ("labels", "pseudo"), strict=True):
        answer = run.contrastive(source, 6)(run.baselines.mean(contexts), contexts.domain)
        found = lines[name].run(contexts, (6, 0.5))
        np.testing.assert_array_equal(found, reached(run, contexts, answer[:, None], 0.5))
        assert run.loaded[-1] == (source, 6)
    # What has seen no attribute is asked for none, and says so.
    lines["plain pretrained DiT"].run(contexts, None)
    assert run.asked[-1] == ("pretrain", None, 0.0, 1, {"null": True})
    assert {n for n in OURS if lines[n].uses == "nothing"} == {"seed mean", "plain pretrained DiT"}
    for name, folder in zip(OURS[11:14], ("cpt", "sft", "hppo"), strict=True):
        lines[name].run(contexts, lines[name].grid[0])
        assert lines[name].grid == [(0.0, 1.0)] and run.asked[-1] == (folder, None, 0.0, 1, {})


def test_a_line_with_memory_is_the_line_and_what_the_cells_suggest(run_of):
    run = run_of()
    lines, contexts = by_name(run), some(run)
    for name in ("MO-DiT+HPPO", "contrastive encoder, labels"):
        line, plain = lines[name + " with memory"], lines[name]
        last = [s for s in plain.grid if s[0] == max(s[0] for s in plain.grid)]  # the longest training
        tried = [(1.0, 0.0), (0.03, 0.5), (0.03, 1.0), (0.1, 0.5)]
        assert list(line.grid) == [(*s, *m) for s in last for m in tried]
        assert not line.floor and line.uses == plain.uses and line.table == "main"
        for s in last:
            answer = plain.run(contexts, s)
            np.testing.assert_array_equal(line.run(contexts, (*s, 1.0, 0.0)), answer)
            lift = run.memory.lift(run.baselines.mean(contexts), contexts.domain, 0.1)
            np.testing.assert_array_equal(
                line.run(contexts, (*s, 0.1, 0.5)), unit(answer + 0.5 * lift[:, None])
            )
    calls = lines["MO-DiT+HPPO with memory"].calls
    assert [calls((8, w, 1.0, 0.1, 0.5)) for w in (0.0, 2.0)] == [1, 2]
    run.config.evaluation.memory = ()
    assert not [n for n in by_name(run) if n.endswith("memory")]


def test_every_kind_of_query_and_its_calls(run_of):
    run = run_of("kinds")
    lines, contexts = by_name(run), some(run)
    kinds = {n: line for n, line in lines.items() if line.table == "query kind"}
    heun = {"method": "heun", "seed": 5}
    asked = {  # network calls, probes, samples, what else
        "posterior mean": (1, 1, 1, {"seed": 5}),
        "roll-out of 1": (2, 1, 1, {"rollout": 1, "seed": 5}),
        "roll-out of 2": (3, 1, 1, {"rollout": 2, "seed": 5}),
        # Heun's 18 steps are 35 evaluations (two each, one for the last), for each of the samples.
        "one sample": (35, 1, 1, heun),
        "mean of 3 samples": (105, 1, 3, heun),
        "3 samples merged": (105, 3, 3, heun),
    }
    assert list(kinds) == [f"{stage}, {kind}" for stage in ("SFT", "HPPO") for kind in asked]
    for name, line in kinds.items():
        folder, kind = name.split(", ")
        calls, probes, samples, more = asked[kind]
        assert (line.calls, line.probes, len(line.grid), line.x) == (calls, probes, 1, None)
        found = line.run(contexts, line.grid[0])
        assert run.asked[-1] == (folder.lower(), None, 0.0, samples, more)
        made = Toy(run, folder.lower(), None).queries(contexts, samples=samples, **more)
        expected = unit(made.mean(1, keepdims=True)) if "mean of" in kind else made
        assert found.shape == (len(contexts), probes, 128)
        np.testing.assert_array_equal(found, expected)
    assert (HEUN_STEPS, HEUN_CALLS) == (18, 35)


def test_curves_stand_at_their_x(run_of):
    run = run_of("curves")
    lines, contexts = by_name(run), some(run)
    assert {line.table for line in lines.values()} == {"main", "calls", "guidance", "steering"}
    assert {n for n, line in lines.items() if line.x is not None} == {
        n for n, line in lines.items() if line.table in ("calls", "guidance", "steering")
    }

    def curve(table):
        found = {line.x: line for line in lines.values() if line.table == table}
        assert len(found) == sum(line.table == table for line in lines.values())
        for line in found.values():
            assert len(line.grid) == 1 and line.probes == 1  # nothing is chosen
        return found

    samplers = {1: ("posterior_mean", 1), 2: ("euler", 2), 4: ("euler", 4), 8: ("euler", 8)}
    samplers |= {16: ("euler", 16), 35: ("heun", 18), 256: ("euler_maruyama", 256)}
    calls = curve("calls")
    assert list(calls) == list(samplers)
    for x, (method, steps) in samplers.items():
        assert calls[x].calls == x
        calls[x].run(contexts, calls[x].grid[0])
        assert run.asked[-1] == ("sft", None, 0.0, 1, {"method": method, "steps": steps, "seed": 5})
    guided = curve("guidance")
    assert tuple(guided) == FRONTIER and -0.5 in guided
    for w, line in guided.items():
        assert line.calls == (2 if w else 1) and line.grid == [(w, 1.0)]
        line.run(contexts, line.grid[0])
        assert run.asked[-1] == ("hppo", None, w, 1, {})
    steered = curve("steering")
    assert tuple(steered) == STRENGTHS
    for s, line in steered.items():
        assert (line.calls, line.grid) == (0, [s])
        expected = run.baselines.steering(contexts, s)
        np.testing.assert_array_equal(line.run(contexts, line.grid[0]), expected)


def test_the_floor_of_hppo_is_the_purity_that_stages_one_to_three_chose(run_of):
    run = run_of()
    lines, contexts = by_name(run), run.contexts("validation")
    staged, ours = lines["MO-DiT"], lines["MO-DiT+HPPO"]
    assert not run.asked and callable(ours.floor) and not staged.floor
    assert {n for n, line in lines.items() if line.floor} == {"MO-DiT+HPPO"}
    floor = ours.floor()

    def exact(share):  # of K items, without float32's rounding
        return np.rint(share.astype(np.float64) * run.searcher.k) / run.searcher.k

    # By hand: of every setting, Joint and Purity per cell, macro over patterns.
    best = dict.fromkeys(floor, (-1.0, -1.0))
    assert set(floor) == {(s, m) for s in range(2) for m in range(4)}
    for folder, w, r in staged.grid:
        query = reached(run, contexts, Toy(run, folder, None).queries(contexts, w), r)
        found = run.searcher.judge(run.searcher.rank(query, contexts), contexts)
        for s, m in floor:
            here = (contexts.split == s) & (contexts.domain == m)
            pattern = contexts.pattern[here]
            joint, purity = (
                np.mean([x[here][pattern == p].mean() for p in np.unique(pattern)])
                for x in (exact(found.joint), exact(found.purity))
            )
            if joint > best[s, m][0] + 1e-9:  # ties go to the earlier setting
                best[s, m] = joint, purity
    assert floor == pytest.approx({cell: purity for cell, (_, purity) in best.items()})
    assert len({round(v, 3) for v in floor.values()}) > 1
    # It is worked out once, and the choice among the rounds keeps to it where any setting does.
    before = len(run.asked)
    assert ours.floor() is floor and len(run.asked) == before
    scores = {s: pr.validation_scores(ours, run.searcher, contexts, s) for s in ours.grid}
    for cell, setting in pr.choose(ours, run.searcher, contexts).items():
        kept = [s for s in ours.grid if scores[s][1][cell] >= floor[cell]] or list(ours.grid)
        assert setting in kept and scores[setting][0][cell] == max(scores[s][0][cell] for s in kept)
    assert not any(folder == "hppo" for folder, *_ in run.asked[:before])


ABLATIONS = {
    "stages": {
        "pretrain": "pretrain", "cpt": "+CPT", "sft": "+CPT+SFT", "hppo": "+CPT+SFT+HPPO",
        "sft_direct": "+SFT", "hppo_dpo": "+CPT+SFT+HPPO, preference loss alone",
        "hppo_paper": "+CPT+SFT+HPPO, the paper's recipe",
        "hppo_paper_off": "+CPT+SFT+HPPO, the paper's, no Pareto filter",
    },
    "order": {
        "cpt": "CPT ascending", "cpt_shuffled": "CPT shuffled", "cpt_descending": "CPT descending",
        "cpt_true": "CPT ascending, true density", "cpt_noise": "CPT ascending, noise for density",
    },
    "pool": {
        "hppo": "hybrid, Pareto filter on", "hppo_hybrid_off": "hybrid, Pareto filter off",
        "hppo_deterministic": "deterministic, Pareto filter on",
        "hppo_deterministic_off": "deterministic, Pareto filter off",
        "hppo_on_policy": "on-policy, Pareto filter on", "hppo_on_policy_off": "on-policy, Pareto filter off",
    },
    "preconditioning": {
        "pretrain": "centred pretrain", "cpt": "centred +CPT", "sft": "centred +CPT+SFT",
        "cpt_mean": "centred on the seeds +CPT", "sft_mean": "centred on the seeds +CPT+SFT",
        "pretrain_plain": "plain pretrain", "cpt_plain": "plain +CPT", "sft_plain": "plain +CPT+SFT",
    },
}  # fmt: skip


def test_ablations_appear_where_they_are_asked_for(run_of):
    plain = list(by_name(run_of()))
    for tables in (["stages"], ["pool", "order"], list(TRAINED)):
        run = run_of("+".join(tables))
        lines = by_name(run)
        added = {n: line for n, line in lines.items() if line.table in TRAINED}
        assert [n for n in lines if n not in added] == plain  # the other tables stay as they are
        wanted = {f"{t}: {line}": f for t in tables for f, line in ABLATIONS[t].items()}
        assert list(added) == list(wanted)
        contexts = some(run)
        for name, folder in wanted.items():
            line = added[name]
            assert (line.calls, line.probes, line.x) == (1, 1, None) and f"{line.table}: " in name
            assert line.grid == [(0.0, 1.0)]  # nothing is chosen on validation
            found = line.run(contexts, line.grid[0])
            got, step, w, samples, asked = run.asked[-1]
            assert (got, step, w, samples) == (folder, None, 0.0, 1)
            if folder.startswith("pretrain"):
                assert asked == {"null": True}
            else:  # in the order that it was trained on; noise orders seeds at random
                order = RECIPES[folder].order
                assert asked == {"order": {"true": "ascending", "noise": "shuffled"}.get(order, order)}
            np.testing.assert_array_equal(found, Toy(run, folder, None).queries(contexts, **asked))
        # The true density takes more labels than the budget: nothing that may stand among rivals.
        reads = {n: line.uses for n, line in added.items() if line.uses != "labels"}
        assert reads == {
            n: "all labels" if f == "cpt_true" else "nothing"
            for n, f in wanted.items() if f == "cpt_true" or f.startswith("pretrain")
        }  # fmt: skip


def test_without_the_retrieval_term_no_line_names_it(run_of):
    every, without = by_name(run_of("+".join(TABLES))), by_name(run_of("+".join(TABLES), 0.0))
    assert set(every) - set(without) == {
        "MO-DiT, retrieval-aware SFT", "stages: +CPT+SFT+HPPO, preference loss alone"
    }  # fmt: skip
    assert not set(without) - set(every)


def test_nothing_is_loaded_until_a_method_runs(run_of, monkeypatch):
    run = run_of("+".join(TABLES))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "contexts", lambda *_: pytest.fail("contexts were drawn"))
        patch.setattr(pr.Searcher, "rank", lambda *_: pytest.fail("something was ranked"))
        lines = by_name(run)
    assert len(lines) > 60 and not run.loaded and not run.asked
    contexts = some(run)
    loaded = set()
    for line in lines.values():  # and then the one that it needs, alone
        run.loaded.clear()
        found = line.run(contexts, line.grid[0])
        assert len(run.loaded) == (
            line.uses != "pattern" and line.table != "steering" and line.name != "seed mean"
        )
        loaded |= set(run.loaded)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    assert {folder for folder, _ in loaded} == {*RECIPES, "labels", "pseudo"}  # every folder has a line
