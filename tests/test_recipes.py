"""Recipes: what each folder starts from, who asks for it, and what it changes of a stage."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import modit as runs
from experiments.configs import modit
from experiments.recipes import AGAINST, RECIPES, TABLES, TRAINED, Recipe, asked, lines, rivals
from genret.diffusion.preference import Preference
from genret.modit import hppo, stages
from genret.modit.candidates import POLICIES
from genret.modit.pairs import FILTERS, PairRule
from genret.types import Batch, InputError

BEFORE = {"pretrain": {None}, "cpt": {"pretrain"}, "sft": {"cpt", "pretrain"}, "hppo": {"sft"}}
MAIN = ["pretrain", "cpt", "sft", "hppo", "sft_mse", "sft_retrieval"]


def test_every_recipe_starts_from_a_folder_before_it():
    before = {None: None}
    for folder, recipe in RECIPES.items():
        assert recipe.start in before, f"{folder} is trained before {recipe.start}"
        assert before[recipe.start] in BEFORE[recipe.stage]  # of the stage that precedes this one
        assert folder.partition("_")[0] == recipe.stage  # as make_stage reads it
        before[folder] = recipe.stage
    for tables in itertools.chain.from_iterable(itertools.combinations(TRAINED, n) for n in range(5)):
        for retrieval in (True, False):
            found = list(asked(tables, retrieval))
            assert found == [f for f in RECIPES if f in found]  # the order of training
            for i, folder in enumerate(found):  # what it starts from is trained by the same run
                assert RECIPES[folder].start in (None, *found[:i])


def test_every_recipe_is_one_that_can_be_trained():
    for folder, recipe in RECIPES.items():
        assert recipe.table in ("", *TRAINED) and bool(recipe.table) == bool(recipe.line), folder
        assert recipe.order in stages.ORDERS and recipe.policy in ("", *POLICIES)
        assert recipe.filter in ("", *FILTERS)
    lines = [(r.table, r.line) for r in RECIPES.values() if r.table]
    assert len(set(lines)) == len(lines) and {table for table, _ in lines} == set(TRAINED)
    assert {r.order for r in RECIPES.values()} == set(stages.ORDERS)  # none is forgotten
    assert {r.policy or "hybrid" for r in RECIPES.values()} == set(POLICIES)


def test_a_table_changes_one_thing_at_a_time():
    """Against the main line's folder of its stage, but for what the table is about."""
    about = {
        "stages": {"start", "retrieval", "paper", "filter"}, "order": {"order"}, "pool": {"policy", "filter"},
        "preconditioning": {"centred", "steered", "start"},
    }  # fmt: skip
    for folder, recipe in RECIPES.items():
        main = dataclasses.asdict(RECIPES[recipe.stage])
        changed = {n for n, v in dataclasses.asdict(recipe).items() if v != main[n]} - {"table", "line"}
        if recipe.table:
            assert changed and changed <= about[recipe.table], folder
    plain = {f: r for f, r in RECIPES.items() if not r.centred}
    assert [r.start for r in plain.values()] == [None, *list(plain)[:-1]]  # never from a centred one
    pairs = {(r.policy or "hybrid", r.filter or "pair") for r in RECIPES.values() if r.stage == "hppo"}
    assert pairs == set(itertools.product(POLICIES, ("pair", "off")))  # the whole cross


def test_what_a_line_is_held_against_is_in_its_table_and_differs_by_what_it_asks():
    for table, pairs in AGAINST.items():
        assert {*pairs, *pairs.values()} == lines(table).keys()  # none is forgotten
        assert list(rivals(table)) == [lines(table)[folder] for folder in pairs]
    for folder, other in (AGAINST["pool"] | AGAINST["preconditioning"]).items():
        one, two = dataclasses.asdict(RECIPES[folder]), dataclasses.asdict(RECIPES[other])
        named = {"table", "line", "start"} | ({"policy"} if folder == "hppo_hybrid_off" else set())
        assert len({n for n, v in one.items() if v != two[n]} - named) == 1 or not two["centred"], folder
    assert lines("curves") == rivals("curves") == {}


def test_folders_are_trained_where_they_are_asked_for():
    assert list(asked((), True)) == MAIN
    counts = {"stages": 4, "order": 4, "pool": 5, "preconditioning": 5}
    for table, count in counts.items():
        found = asked((table,), True)
        assert set(MAIN) <= set(found) and len(found) == len(MAIN) + count
        assert {r.table for f, r in found.items() if f not in MAIN} == {table}
    assert asked(TABLES, True) == asked(TRAINED, True) == RECIPES
    # Without the retrieval-aware term two folders would repeat others.
    assert list(asked((), False)) == MAIN[:-1]
    assert RECIPES.keys() - asked(TABLES, False).keys() == {"sft_retrieval", "hppo_dpo"}
    with pytest.raises(InputError, match="ablations: unknown table 'orders'. use stages[+]order[+]pool[+]"):
        asked(("stages", "orders"), True)


def test_the_config_asks(molecules, tmp_path):
    def recipes(argument, weight=1.0):
        config = modit.get_config(argument)
        config.retrieval.weight = weight
        return runs.open_run(config, tmp_path, 0, molecules).recipes

    assert list(recipes("size=test")) == MAIN
    assert recipes("size=test,ablations=pool+order") == asked(("pool", "order"), True)
    assert recipes("size=test,ablations=stages", 0.0) == asked(("stages",), False)
    with pytest.raises(InputError, match="unknown table 'poll'"):
        recipes("size=test,ablations=poll")


class Unfitted(runs.Run):
    """A run whose fitted parts are stand-ins."""

    fitted = SimpleNamespace(data="fitted data", predicted=None)
    labeller = "labeller"
    retriever = "retriever"

    def space(self, folder):
        return f"space of {folder}"

    def model(self, folder, step=None):
        return SimpleNamespace(params=f"parameters of {folder}")


@pytest.fixture
def made(molecules, tmp_path, monkeypatch):
    """(folder, config changes) -> what the folder's stage is made of."""
    monkeypatch.setattr(stages, "with_order", lambda data, order, seen, seed: (data, order, seed))
    for module, name in ((stages, "make_stage"), (hppo, "make_hppo_stage")):
        monkeypatch.setattr(module, name, lambda *a, **kw: SimpleNamespace(args=a, **kw))

    def make(folder, **changes):
        config = modit.get_config("size=test")
        config.update_from_flattened_dict(changes)
        run = runs.open_run(config, tmp_path, 3, molecules)
        return Unfitted(run.config, run.catalogue, run.splits, run.folder, 3).stage(folder)

    return make


def test_the_anchor_is_steered_where_the_recipe_says(molecules, tmp_path, monkeypatch):
    steered = {}
    monkeypatch.setattr(runs.edm, "fit_space", lambda c, t, directions, **_: directions)
    monkeypatch.setattr(runs.edm, "plain_space", lambda *_: None)
    drawn = Batch(np.ones((2, 1)), np.ones((2, 1)), np.ones(2))
    monkeypatch.setattr(stages, "draw_batch", lambda *_: drawn)
    run = runs.open_run(modit.get_config("size=test"), tmp_path, 3, molecules)

    class Steered(Unfitted):
        directions = np.ones((5, 128))
        space = runs.Run.space

    run = Steered(run.config, run.catalogue, run.splits, run.folder, 3)
    for folder in RECIPES:
        steered[folder] = run.space(folder)
    plain = {f for f, space in steered.items() if space is None}
    mean = {f for f, space in steered.items() if space is not None and not space.any()}
    assert plain == {"pretrain_plain", "cpt_plain", "sft_plain"}
    assert mean == {"pretrain", "cpt_mean", "sft_mean"}


def test_a_stage_is_what_its_recipe_says(made):
    term = stages.RetrievalTerm(1.0, 0.035, 32_768)
    for folder, recipe in RECIPES.items():
        if recipe.stage == "hppo":
            continue
        stage = made(folder)
        data = ("fitted data", recipe.order, 3)
        assert stage.args == (folder, "retriever", f"space of {folder}", data)
        assert stage.retrieval == (term if folder == "sft_retrieval" else None)
        assert stage.regression == (folder == "sft_mse") and stage.order == recipe.order
        assert stage.replay == (0.15 if recipe.stage == "cpt" else 0.0)
        assert stage.length == (8 if recipe.stage == "sft" else 16) and stage.seed == 3
    assert made("sft_retrieval", **{"retrieval.weight": 0.0}).retrieval is None


def test_hppo_is_what_its_recipe_says(made):
    rule = PairRule(3, "pair", 5, 0.7, 0.1, False, 0.6)
    pairs = {f"hppo.pairs.{name}": value for name, value in dataclasses.asdict(rule).items()}
    preference = {"beta": 0.2, "safe": 0.8, "guard": 0.5, "anchor": 0.1, "draws": 3}
    others = {f"hppo.preference.{name}": value for name, value in preference.items()} | {"hppo.batch": 24}
    for folder, recipe in RECIPES.items():
        if recipe.stage != "hppo":
            continue
        stage = made(folder, **pairs, **others)
        assert stage.args[:4] == (folder, "retriever", f"space of {folder}", "parameters of sft")
        refresh = stage.args[4]
        policy = recipe.policy or "hybrid"
        share = 0.0 if policy == "deterministic" else 0.7  # it has no winner of the model's own
        expected = dataclasses.replace(rule, filter=recipe.filter or "pair", on_policy_share=share)
        if recipe.paper:  # whatever is configured
            expected = PairRule(2, recipe.filter or "pair", 4, 0.5, 0.2, False, np.pi)
        assert refresh.rounds == hppo.Rounds(4, 128, policy, 2, expected, not recipe.paper)
        assert refresh.folder.parts[-3:] == ("seed_3", folder, "rounds")
        assert (refresh.seeds, refresh.seed, refresh.labeller) == (8, 3, "labeller")
        assert bool(stage.retrieval) == (folder not in ("hppo_dpo", "hppo_paper", "hppo_paper_off"))
        assert (stage.batch, stage.seed) == (24, 3)
        assert stage.preference == Preference(**preference)
    assert made("hppo", **{"retrieval.weight": 0.0}).retrieval is None
    offline = made("hppo", **{"hppo.policy": "deterministic", "hppo.pairs.filter": "both"}).args[4].rounds
    assert (offline.policy, offline.rule.filter, offline.rule.on_policy_share) == ("deterministic", "both", 0)


def test_every_folder_has_its_steps_and_hppo_keeps_its_rounds(molecules, tmp_path):
    run = runs.open_run(modit.get_config("size=test"), tmp_path, 3, molecules)
    assert run.rounds == (4, 8)
    for folder, recipe in RECIPES.items():
        options = run.options(folder)
        kept = (8, 4, 2) if recipe.stage == "hppo" else (6, 500, 2)
        assert (options.steps, options.save_every, options.keep, options.seed) == (*kept, 3)


def test_the_true_order_reads_training_labels_and_no_others(molecules, tmp_path):
    run = runs.open_run(modit.get_config("size=test"), tmp_path, 0, molecules)
    seen, train = run._training_labels, run.splits.train
    np.testing.assert_array_equal(seen[:, train], molecules.labels[:, train])
    assert (seen[:, ~train] == -1).all() and 0 < train.sum() < len(train)
    assert Recipe("cpt", "pretrain").order == "ascending"  # and none reads them unasked
    assert [f for f, r in RECIPES.items() if r.order == "true"] == ["cpt_true"]
