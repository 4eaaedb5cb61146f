"""The report's numbers against a run of four methods worked out by hand, and its page."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from genret.types import InputError

# Joint of (item logp, item tpsa, pattern logp, pattern tpsa), seeds 0 and 1; K = 4, patterns 5 5 7.
# Means over seeds, by hand:
#   seed mean              .25 .25 .25 .50     item .25, pattern .375
#   linear-probe steering  .50 .25 .25 .25     item .375, pattern .25
#   MO-DiT                 .50 .50 .50 .375    item .40 .60 by seed: .50 sd .1414, pattern .4375
#   reference              .75 .75 .75 .75
JOINT = {
    "seed mean": [(0.25, 0.25, 0.25, 0.5)] * 2,
    "linear-probe steering": [(0.5, 0.25, 0.25, 0.25)] * 2,
    "reference: true positives of the pattern": [(0.75, 0.75, 0.75, 0.75)] * 2,
    "MO-DiT": [(0.4, 0.4, 0.5, 0.25), (0.6, 0.6, 0.5, 0.5)],
}
PURITY = {"seed mean": 0.75, "MO-DiT": 0.7}
USES = {"seed mean": "nothing", "reference: true positives of the pattern": "all labels"}
CELLS = [(s, d) for s in ("item_holdout", "pattern_holdout") for d in ("logp", "tpsa")]
# Hits of three contexts; the macro average is over patterns, {5: first two, 7: the last}.
HITS = {"MO-DiT": [[2, 4, 3], [4, 2, 1]]}


def rows_by_hand() -> list[dict]:
    return [
        {
            "method": method, "seed": seed, "split": split, "domain": domain, "k": 4,
            "catalogue": "<b>tiny</b> & co", "n_items": 1000, "lookups": 70 + seed, "contexts": 3,
            "joint": joint, "attribute": 0.5, "purity": PURITY.get(method, 0.6),
            "normalised_joint": 0.8, "probes": 1, "calls": 2 if domain == "tpsa" else 1,
            "uses": USES.get(method, "labels"), "index": "exact", "ann_recall": 1 - joint / 100,
            "per_context": {"pattern": [5, 5, 7], "joint": HITS.get(method, [[1, 1, 1]] * 2)[seed]},
        }
        for method, by_seed in JOINT.items()
        for seed, joints in enumerate(by_seed)
        for (split, domain), joint in zip(CELLS, joints, strict=True)
    ]  # fmt: skip


def save(folder: Path, rows: list[dict]) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def workdir(tmp_path):
    """A run folder with everything a report reads."""
    save(tmp_path, rows_by_hand())
    (tmp_path / "config.json").write_text('{"seeds": [0, 1], "model": {"anchor": "</pre><i>"}}')
    for seed in range(2):
        folder = tmp_path / f"seed_{seed}" / "sft"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            "".join(f'{{"step": {s}, "loss": {1 / s}}}\n' for s in (1, 2, 4))
        )
        found = dict(domain="logp", split="item_holdout", kendall=0.3, ndcg=0.9, calibration=0.01)
        found |= dict(predictor="k<NN", spearman=0.4 + 0.1 * seed, patterns=3, items=30)
        (folder.parent / "predictor_report.json").write_text(json.dumps([found]))
    return tmp_path


def test_table_by_hand(workdir):
    table = report.make_table(report.read_results(workdir / "results.jsonl"))
    # Rows: seed mean, steering, MO-DiT, and the reference, which the file holds third, last.
    by_hand = [
        [0.25, 0.375, 0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 0.8],
        [0.375, 0.25, 0.5, 0.25, 0.25, 0.25, 0.5, 0.6, 0.8],
        [0.5, 0.4375, 0.5, 0.5, 0.5, 0.375, 0.5, 0.7, 0.8],
        [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.5, 0.6, 0.8],
    ]
    np.testing.assert_allclose(table.numbers, by_hand)
    # sd with n - 1: item .4 and .6 -> .1414; pattern .375 and .5 -> .0884.
    np.testing.assert_allclose(table.sd[2, :2], [0.2 / 2**0.5, 0.125 / 2**0.5])
    assert np.isnan(table.sd[:, 2:]).all()
    assert [np.flatnonzero(column).tolist() for column in table.best.T] == [
        [2], [2], [1, 2], [2], [2], [0], [0, 1, 2], [0], [0, 1, 2]
    ]  # fmt: skip


def test_text_table_marks_the_best_and_rules_off_references(workdir):
    text = report.text_table(report.read_results(workdir / "results.jsonl"))
    ours = next(line for line in text.splitlines() if line.startswith("> MO-DiT"))
    assert ours.split() == (
        "> MO-DiT *.500±.141*.438±.088 *.500*.500 *.500 .375 *.500 .700*.800 1 1-2 labels".split()
    )
    lines = text.splitlines()
    rule = lines.index("references: they read what the question hides")
    assert lines[rule - 1] == lines[2] == "-" * len(lines[2])
    assert "true positives of the pattern" in lines[rule + 1] and "*" not in lines[rule + 1]
    assert max(map(len, lines)) <= 140


def test_verdicts_by_hand(workdir):
    found = report.verdicts(report.read_results(workdir / "results.jsonl"))
    figures = {v.text.split(" in Joint")[0].removeprefix("cells where MO-DiT is "): v for v in found}
    # Differences to the seed mean .25 .25 .25 -.125, mean .15625; to steering 0 .25 .25 .125:
    # a tie is not ahead. Best of the two per cell: .5 .25 .25 .5, mean .375.
    assert figures["ahead of seed mean"].figure == "3 of 4"
    assert figures["ahead of seed mean"].text.endswith("+.156 on average")
    assert figures["ahead of linear-probe steering"].figure == "3 of 4"
    best = "ahead of the best single-probe baseline of each cell (picked on test)"
    assert figures[best].figure == "2 of 4"
    # (.46875 - .375) / (.75 - .375) = .25
    assert [v.figure for v in found[3:]] == ["25%", ".050", "0.9925"]
    assert "plain pretrained" not in str(found) and "contrastive" not in str(found)


def test_intervals_average_seeds_then_patterns(workdir):
    found = report.intervals(report.read_results(workdir / "results.jsonl"))
    assert [(i.rival, i.split, i.domain) for i in found] == [
        (rival, *cell) for rival in ("seed mean", "linear-probe steering") for cell in CELLS
    ]
    # Hits of MO-DiT over seeds 3 3 2, less 1 1 1, over K: .5 .5 .25. Pattern 5 has .5, 7 has .25.
    assert found[0][3:] == pytest.approx((0.375, 0.25, 0.5))
    assert str(found[0]) == "+.375 [+.250, +.500]"


def test_a_seed_that_is_not_evaluated_yet_is_named(workdir):
    rows = [r for r in rows_by_hand() if (r["method"], r["seed"]) != ("seed mean", 1)]
    found = report.read_results(save(workdir, rows))
    assert found.unfinished() == ["seed mean lacks seed 1"]
    table = report.make_table(found)
    assert table.numbers[0, 0] == 0.25 and np.isnan(table.sd[0]).all()
    assert "unfinished: seed mean lacks seed 1" in report.text_report(found)


def test_a_run_without_our_method_has_a_table_and_no_verdict(workdir):
    found = report.read_results(save(workdir, rows_by_hand()[:16]))
    assert not report.verdicts(found) and not report.intervals(found)
    assert "linear-probe steering" in report.text_report(found)


def changed(at: int, **fields) -> list[dict]:
    rows = copy.deepcopy(rows_by_hand())
    rows[at].update(fields)
    return rows


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([], "holds no rows"),
        (changed(3, k=20), "mixes k 20 and 4"),
        (changed(3, n_items=5), "mixes n_items 1000 and 5"),
        (changed(3, catalogue="other"), "mixes catalogue"),
        (changed(9, per_context={"pattern": [5, 7, 7], "joint": [1, 1, 1]}), "sets of contexts"),
        (rows_by_hand() + rows_by_hand()[:1], "a row twice"),
        (rows_by_hand()[1:], "lacks cells of seed mean, seed 0"),
        ([{"step": 3}], "not of an evaluation"),
    ],
)
def test_refuses(tmp_path, rows, problem):
    with pytest.raises(InputError, match=problem):
        report.read_results(save(tmp_path, rows))


class Page(HTMLParser):
    """Checks that tags nest, and gathers text, ids and whatever a browser would fetch."""

    VOID = {"meta", "wbr", "br", "img", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.ids, self.fetched, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_fetches_nothing(workdir, capsys):
    report.main(workdir)
    assert "3 of 4  cells where MO-DiT is ahead of seed mean" in capsys.readouterr().out
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert not page.open and not page.fetched
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == 3 and page.tags.count("table") == 3
    said = " ".join(page.text)
    # Names are data, never markup; the predictor's Spearman is the mean of .4 and .5.
    for words in ("<b>tiny</b> & co", "</pre><i>", "k<NN", ".450", "25%", "+.375"):
        assert words in said
    assert "b>tiny" not in text.replace("&lt;b&gt;tiny", "")
    assert (workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.glob("*.tmp"))


def test_page_needs_only_the_results(tmp_path):
    save(tmp_path, [r for r in rows_by_hand() if r["seed"] == 0])
    report.main(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 2 and "±" not in "".join(page.text)


def test_command_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "experiments.report", f"--workdir={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(report.__file__).parents[1], check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: ") and "holds no rows" in done.stderr
