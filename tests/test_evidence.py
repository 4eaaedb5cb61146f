"""The verdicts against comparisons worked out by hand, on 20 patterns of one context each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import evidence
from experiments.report_rows import read_results

CELLS = [("item_holdout", "logp"), ("item_holdout", "tpsa"), ("pattern_holdout", "logp")]
CELLS.append(("pattern_holdout", "tpsa"))
K, Q = 10, 20


def rows_of(method: str, joint: list[int], purity: int = 8, attribute: int = 6, **fields) -> list[dict]:
    """joint: hits of K in each of the four cells, the same in all contexts."""
    made = []
    for (split, domain), hits in zip(CELLS, joint, strict=True):
        row = {"method": method, "seed": 0, "split": split, "domain": domain, "k": K, "catalogue": "tiny"}
        row |= {"n_items": 1000, "lookups": 70, "probes": 1, "calls": 1, "uses": "labels", "index": "exact"}
        row |= {"ann_recall": 1.0, "normalised_joint": 0.5, "table": "main", "x": None}
        row |= {"joint": hits / K, "purity": purity / K, "attribute": attribute / K}
        base = {"joint": hits, "purity": purity, "attribute": attribute}
        row["per_context"] = {"pattern": list(range(Q)), **{n: [v] * Q for n, v in base.items()}}
        made.append(row | fields)
    return made


# Joint hits of 10 in the four cells.
RIVALS = {
    "seed mean": [2, 2, 2, 2],
    "linear-probe steering": [4, 5, 3, 3],
    "ridge regressor": [3, 4, 4, 3],
    "contrastive encoder, labels": [6, 6, 6, 6],
    "MO-DiT": [4, 4, 4, 4],
    "MO-DiT after CPT": [5, 3, 3, 4],
    "plain pretrained DiT": [2, 2, 2, 2],
}
OURS = [6, 5, 3, 5]


def results(tmp_path, rows: list[dict]):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_results(path)


@pytest.fixture
def rows():
    found = [row for method, joint in RIVALS.items() for row in rows_of(method, joint)]
    found += rows_of("MO-DiT+HPPO", OURS, purity=7)
    found += rows_of("Rocchio feedback", [9] * 4, probes=2)
    return found + rows_of("reference: true positives of the pattern", [9] * 4, uses="all labels")


def test_a_comparison_by_hand(tmp_path, rows):
    r = results(tmp_path, rows)
    c = evidence.compare(r, "MO-DiT+HPPO", ["MO-DiT"])
    # Per cell +.2 +.1 -.1 +.1 in every context: p = 2 / 10,001 each, times 4 after Holm.
    assert [cell.mean for cell in c.cells["joint"]] == pytest.approx([0.2, 0.1, -0.1, 0.1])
    assert [cell.p for cell in c.cells["joint"]] == pytest.approx([8 / 10_001] * 4)
    assert [cell.verdict for cell in c.cells["joint"]] == ["gain", "gain", "loss", "gain"]
    assert [(cell.split, cell.domain) for cell in c.cells["joint"]] == CELLS
    # Purity .7 against .8 is a loss everywhere; Attribute is the same: p = 1.
    assert c.count("purity", "loss") == 4 and c.count("attribute", "tie") == 4
    assert all(cell.p == 1 and cell.mean == 0 for cell in c.cells["attribute"])
    assert str(c.cells["joint"][0]) == "+.200 [+.200, +.200]" and not c.picked


def test_the_p_values_of_a_metric_are_adjusted_together(tmp_path, rows):
    rng = np.random.default_rng(0)
    for row in rows:
        if row["method"] == "MO-DiT+HPPO":
            base = 4 if row["split"] == "pattern_holdout" else 4 + (row["domain"] == "logp")
            row["per_context"]["joint"] = (base + rng.integers(-2, 3, Q)).tolist()
    r = results(tmp_path, rows)
    cells = evidence.compare(r, "MO-DiT+HPPO", ["MO-DiT"]).cells["joint"]
    raw = []
    for cell in cells:
        difference = r.hits["joint", "MO-DiT+HPPO", cell.split, cell.domain] - 0.4
        raw.append(evidence.paired_test(difference, np.arange(Q)).p)
    assert [cell.p for cell in cells] == pytest.approx(evidence.holm(raw))
    assert all(cell.p >= p for cell, p in zip(cells, raw, strict=True)) and cells[0].mean > 0


def test_the_best_of_a_cell_is_picked_on_test(tmp_path, rows):
    r = results(tmp_path, rows)
    # Not the encoder (compared for itself), ours, two probes, or what reads the answer.
    assert evidence.baselines(r) == [
        "seed mean", "linear-probe steering", "ridge regressor", "plain pretrained DiT"
    ]  # fmt: skip
    best = evidence.best_of(r, evidence.baselines(r))
    ridge, steering = "ridge regressor", "linear-probe steering"  # 3 and 3 in the last cell: the earlier
    assert list(best.values()) == [steering, steering, ridge, steering]
    assert evidence.stage_rows(r) == ["MO-DiT", "MO-DiT after CPT"]
    assert evidence.encoders(r) == ["contrastive encoder, labels"]


def test_verdicts_by_hand(tmp_path, rows):
    r = results(tmp_path, rows)
    said = [(v.figure, v.text) for v in evidence.verdicts(r)]
    assert [figure for figure, _ in said] == [
        "3 of 4",  # against MO-DiT: +2 +1 -1 +1
        "3 of 4",  # its best row per cell is 5 4 4 4: +1 +1 -1 +1
        "2 of 4",  # best baselines 4 5 4 3: +2 0 -1 +2
        "15%",  # ours .475, baselines .4, reference .9: .075 / .5
        "0 of 4",  # encoder: 0 -1 -3 -1
        "4 of 4", "2 of 4", "4 of 4",  # seed mean; steering +2 0 0 +2; plain pretrained
        ".100", "1.0000",
    ]  # fmt: skip
    text = dict(enumerate(t for _, t in said))
    assert "ahead of MO-DiT, the best of stages 1-3 (chosen on validation) in Joint@10; +.075 on" in text[0]
    assert text[0].endswith(
        "significantly ahead in 3, behind in 1; Purity significantly lower in 4, higher in 0"
    )
    assert "best row of stages 1-3 of each cell (picked on test)" in text[1] and "+.050 on average" in text[1]
    assert "significantly ahead in 2, behind in 1" in text[2]  # a cell without a difference is a tie
    assert "significantly ahead in 0, behind in 3" in text[4]
    assert "Purity lost against seed mean in the worst cell" in text[8]


def test_a_line_with_memory_is_compared_with_rivals_that_have_one_too(tmp_path, rows):
    rows += rows_of("MO-DiT+HPPO with memory", [7, 6, 5, 6])
    rows += rows_of("contrastive encoder, labels with memory", [7, 5, 6, 5])
    r = results(tmp_path, rows)
    found = {(c.ours, c.rival): c for c in evidence.comparisons(r)}
    ours, encoder = "MO-DiT+HPPO", "contrastive encoder, labels"
    lifted = [rival for name, rival in found if name == f"{ours} with memory"]
    assert lifted == [evidence.SINGLE, ours, encoder, f"{encoder} with memory"]
    assert (ours, f"{encoder} with memory") not in found and (ours, encoder) in found
    c = found[f"{ours} with memory", f"{encoder} with memory"]
    assert [cell.mean for cell in c.cells["joint"]] == pytest.approx([0, 0.1, -0.1, 0.1])
    assert {f"{ours} with memory", f"{encoder} with memory"} <= evidence.compared(r)
    # Neither is a baseline or a row of stages 1-3.
    assert not [m for m in evidence.baselines(r) + evidence.stage_rows(r) if m.endswith("memory")]


def test_without_hppo_stages_1_to_3_are_ours(tmp_path, rows):
    r = results(tmp_path, [row for row in rows if row["method"] != "MO-DiT+HPPO"])
    assert r.ours == "MO-DiT"
    found = evidence.comparisons(r)
    assert {c.ours for c in found} == {"MO-DiT"}
    assert found[0].rival.startswith("the best single-probe baseline")
    assert evidence.verdicts(r)[0].figure == "1 of 4"  # 4 4 4 4 against 4 5 4 3


def test_a_worst_purity_is_named_where_it_is_rare(tmp_path, rows):
    for row in rows:
        if row["method"] == "MO-DiT+HPPO" and (row["split"], row["domain"]) != CELLS[1]:
            row["purity"], row["per_context"]["purity"] = 0.9, [9] * Q
    verdict = evidence.verdicts(results(tmp_path, rows))[0]
    assert verdict.text.endswith("Purity significantly lower in 1 (item_holdout/tpsa), higher in 3")


def test_pooled_draws_patterns_with_all_their_cells(tmp_path, rows):
    r = results(tmp_path, rows)
    # Mean of +.2 +.1 -.1 +.1; every context of a cell is the same, so no draw changes it.
    assert evidence.pooled(r, "MO-DiT+HPPO", "MO-DiT")[:3] == pytest.approx((0.075, 0.075, 0.075))
    assert evidence.pooled(r, "MO-DiT+HPPO", "MO-DiT", "purity").mean == pytest.approx(-0.1)


def test_the_questions_of_the_side_tables(tmp_path, rows):
    joint = {"descending": 2, "ascending": 5, "shuffled": 4}
    for order, value in joint.items():
        rows += rows_of(f"order: CPT {order}", [value] * 4, table="order")
    for policy, purity in (("deterministic", 6), ("on-policy", 7)):
        rows += rows_of(f"pool: {policy}, Pareto filter on", [5] * 4, purity=8, attribute=5, table="pool")
        rows += rows_of(f"pool: {policy}, Pareto filter off", [5] * 4, purity=purity, table="pool")
    # As a run writes them: the main line's four, then the others.
    for name, value in {
        "pretrain": 2,
        "+CPT": 3,
        "+CPT+SFT": 6,
        "+CPT+SFT+HPPO": 8,
        "+SFT": 5,
        "+CPT+SFT+HPPO, preference loss alone": 7,
        "+CPT+SFT+HPPO, the paper's recipe": 9,
        "+CPT+SFT+HPPO, the paper's, no Pareto filter": 9,
    }.items():
        purity = 4 if "filter" in name else 5
        rows += rows_of(f"stages: {name}", [value] * 4, purity=purity, table="stages")
    rows += rows_of("MO-DiT, w = 1", [3] * 4, table="guidance", x=1)
    r = results(tmp_path, rows)

    def said(table):
        found = [(v.figure, v.text.split(", [")[0]) for v in evidence.table_verdicts(r, table)]
        return [(figure, text.replace(f"{table}: ", "")) for figure, text in found]

    assert said("order") == [
        ("-.200", "Joint@10 of CPT descending minus CPT shuffled"),
        ("+.100", "Joint@10 of CPT ascending minus CPT shuffled"),
    ]
    # The hybrid pool was not evaluated, and what would be held against it is not compared.
    off, on = "deterministic, Pareto filter off", "deterministic, Pareto filter on"
    assert said("pool") == [
        ("+.100", f"Attribute@10 of {off} minus {on}"), ("-.200", f"Purity@10 of {off} minus {on}"),
        ("+.100", f"Attribute@10 of {off} minus {on}".replace("deterministic", "on-policy")),
        ("-.100", f"Purity@10 of {off} minus {on}".replace("deterministic", "on-policy")),
    ]  # fmt: skip
    assert said("stages") == [
        ("+.100", "Joint@10 of +CPT minus pretrain"),
        ("+.300", "Joint@10 of +CPT+SFT minus +CPT"),
        ("+.200", "Joint@10 of +CPT+SFT+HPPO minus +CPT+SFT"),
        ("-.100", "Joint@10 of +SFT minus +CPT+SFT"),
        ("+.100", "Joint@10 of +CPT+SFT+HPPO, preference loss alone minus +CPT+SFT"),
        ("+.300", "Joint@10 of +CPT+SFT+HPPO, the paper's recipe minus +CPT+SFT"),
        ("+.000", "Attribute@10 of +CPT+SFT+HPPO, the paper's, no Pareto filter minus "
                 "+CPT+SFT+HPPO, the paper's recipe"),
        ("-.100", "Purity@10 of +CPT+SFT+HPPO, the paper's, no Pareto filter minus "
                  "+CPT+SFT+HPPO, the paper's recipe"),
    ]  # fmt: skip
    assert said("guidance") == []
    # Two questions of the table: 2 / 10,001 twice is .0004 after Holm.
    assert all(v.text.endswith("p <.001") for v in evidence.table_verdicts(r, "order"))
    order = r.tables["order"]
    assert evidence.natural_rival("order", order, "order: CPT shuffled") is None
    assert evidence.natural_rival("order", order, "order: CPT ascending") == "order: CPT shuffled"
    assert evidence.natural_rival("query kind", ["one", "two"], "two") == "one"
    assert evidence.natural_rival("query kind", ["one", "two"], "one") is None
    # Curves are not compared; the rows of stages 1-3 count among those that HPPO must beat.
    assert "MO-DiT, w = 1" not in evidence.compared(r) and "order: CPT shuffled" in evidence.compared(r)
    staged = ["pretrain", "+CPT", "+CPT+SFT", "+SFT"]
    assert evidence.stage_rows(r) == ["MO-DiT", "MO-DiT after CPT", *(f"stages: {x}" for x in staged)]


def test_p_values_are_short():
    assert [evidence.short_p(p) for p in (0.0002, 0.0016, 0.5, 1.0)] == ["<.001", ".002", ".500", "1.00"]
