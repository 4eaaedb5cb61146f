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
from experiments.packed import read_packed, save_packed
from experiments.report_rows import portable, read_about, read_results, read_run
from experiments.report_tables import again, make_table, predictor_rows, sides, steps, text_report, text_table
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
            "per_context": {
                "pattern": [5, 5, 7], "joint": HITS.get(method, [[1, 1, 1]] * 2)[seed],
                "attribute": [2, 2, 2], "purity": [3, 3, 2],
            },
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
    table = make_table(read_results(workdir / "results.jsonl"))
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


def test_a_predictor_is_averaged_over_seeds_and_never_over_budgets():
    def row(budget, seed, spearman):
        agreement = dict(spearman=spearman, kendall=0.5, ndcg=0.9, calibration=None)
        return dict(predictor="MLP", split="item_holdout", domain="a", seed=seed, budget=budget) | agreement

    rows = [row(0.05, 0, 0.5), row(0.05, 1, 0.6), row(0.2, 0, 0.7), row(0.01, 0, 0.2)]
    same = "MLP", "item holdout", "a", ".500", ".900", "-"
    found = predictor_rows(rows)
    assert [(r[1], r[4]) for r in found] == [("1%", ".200"), ("5%", ".550"), ("20%", ".700")]
    assert all((r[0], *r[2:4], *r[5:]) == same for r in found)


def test_a_tables_command_asks_for_the_seeds_that_it_has(full):
    config = json.loads((full / "config.json").read_text())
    config["command"] = (
        "python -m experiments.run --config=modit.py:seeds=0+1+2,size=demo --workdir=runs/tiny"
    )
    (full / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (full / "results.jsonl").read_text().splitlines()]
    save(full, [row for row in rows if not (row["table"] == "order" and row["seed"] == 0)])
    r = read_run(full)
    assert [line.split(":")[1].split(",")[0] for line in again(r, "main")] == ["seeds=0+1"] * 2
    assert "modit.py:seeds=1,size=demo" in again(r, "order")[0]
    assert "modit.py:seeds=0+1,size" in again(r, "predictor")[0]


def test_text_table_marks_the_best_and_rules_off_references(workdir):
    text = text_table(read_results(workdir / "results.jsonl"))
    ours = next(line for line in text.splitlines() if line.startswith("> MO-DiT"))
    assert ours.split() == (
        "> MO-DiT *.500±.141*.438±.088 *.500*.500 *.500 .375 *.500 .700*.800 1 1-2 labels".split()
    )
    lines = text.splitlines()
    rule = lines.index("references: they read what the question hides")
    assert lines[rule - 1] == lines[2] == "-" * len(lines[2])
    assert "true positives of the pattern" in lines[rule + 1] and "*" not in lines[rule + 1]
    assert max(map(len, lines)) <= 140


def test_a_seed_that_is_not_evaluated_yet_is_named(workdir):
    rows = [r for r in rows_by_hand() if (r["method"], r["seed"]) != ("seed mean", 1)]
    found = read_results(save(workdir, rows))
    assert found.unfinished() == ["seed mean lacks seed 1"]
    table = make_table(found)
    assert table.numbers[0, 0] == 0.25 and np.isnan(table.sd[0]).all()
    assert "unfinished: seed mean lacks seed 1" in text_report(found)


def test_a_run_without_our_method_has_a_table_and_no_verdict(workdir):
    found = read_results(save(workdir, rows_by_hand()[:16]))
    text = text_report(found)
    assert "linear-probe steering" in text and "ahead" not in text and "Paired" not in text


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
        (changed(9, per_context={"pattern": [5, 7, 7]}), "sets of contexts in item_holdout/tpsa"),
        (rows_by_hand() + rows_by_hand()[:1], "a row twice"),
        (rows_by_hand()[1:], "lacks cells of seed mean, seed 0"),
        ([{"step": 3}], "not of an evaluation"),
    ],
)
def test_refuses(tmp_path, rows, problem):
    with pytest.raises(InputError, match=problem):
        read_results(save(tmp_path, rows))


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
    report.main(workdir, "", "")
    said = capsys.readouterr().out
    assert "3 of 4  cells where MO-DiT is ahead of seed mean" in said and "k<NN" in said
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert not page.open and not page.fetched
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("svg") == 3 and page.tags.count("table") == 5  # 3 are of paired differences
    said = " ".join(page.text)
    # Names are data, never markup; the predictor's Spearman is the mean of .4 and .5.
    for words in ("<b>tiny</b> & co", "</pre><i>", "k<NN", ".450", "25%", "+.375"):
        assert words in said
    assert "b>tiny" not in text.replace("&lt;b&gt;tiny", "")
    assert (workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.glob("*.tmp"))


def test_page_needs_only_the_results(tmp_path):
    save(tmp_path, [r for r in rows_by_hand() if r["seed"] == 0])
    report.main(tmp_path, "", "")
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 2 and "±" not in "".join(page.text)


def side_rows(table: str, joints: dict[str, list[float]], x: dict | None = None, **fields) -> list[dict]:
    """Rows of a side table: the same Joint in every cell, one for each of two seeds; hits of K = 4."""
    return [
        row | {"method": name, "table": table, "x": (x or {}).get(name), "joint": joint, "uses": "labels"}
        | fields | {"per_context": row["per_context"] | {"joint": [round(4 * joint)] * 3}}
        for name, by_seed in joints.items()
        for row, joint in zip(rows_by_hand()[:8], np.repeat(by_seed, 4).tolist(), strict=True)
    ]  # fmt: skip


@pytest.fixture
def full(workdir):
    """The run with three side tables, two of them curves, and two checkpoints of SFT."""
    rows = [row | {"table": "main", "x": None} for row in rows_by_hand()]
    rows += side_rows(
        "order",
        {
            "order: CPT ascending": [0.75, 0.75],
            "order: CPT shuffled": [0.5, 0.5],
            "order: CPT ascending, noise for density": [0.25, 0.5],
        },
    )
    x = {"w = 2": 2, "w = 0": 0, "s = .4": 0.4, "s = .8": 0.8}
    rows += side_rows("guidance", {"w = 2": [0.5, 0.75], "w = 0": [0.25, 0.25]}, x, calls=2)
    rows += side_rows("steering", {"s = .4": [0.25, 0.25], "s = .8": [0.5, 0.5]}, x)
    save(workdir, rows)
    config = json.loads((workdir / "config.json").read_text())
    config["command"] = (
        "python -m experiments.run --config=experiments/configs/modit.py --workdir=/home/x/tiny"
    )
    (workdir / "config.json").write_text(json.dumps(config))
    checkpoints = [
        dict(folder="sft", step=step, split=split, domain=domain, seed=seed, joint=step / 100 + 0.1 * seed,
             attribute=0.5, purity=0.25 + 0.5 * (domain == "logp"))
        for step in (20, 10) for seed in range(2) for split, domain in CELLS
    ]  # fmt: skip
    (workdir / "checkpoints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checkpoints))
    return workdir


def test_side_tables_by_hand(full):
    order, guidance, steering = sides(read_run(full))
    assert [line.method for line in order.lines] == [
        "order: CPT ascending",
        "order: CPT shuffled",
        "order: CPT ascending, noise for density",
    ]
    noise = order.lines[2]
    # Seeds .25 and .5: mean .375, sd .1768; hits 1 and 2 of 4, less 2 of 4: -.125 in every context.
    np.testing.assert_allclose(noise.joint, [0.375, 0.375])
    np.testing.assert_allclose(noise.sd, [0.25 / 2**0.5] * 2)
    assert noise.rival == "order: CPT shuffled" and noise.gain[:3] == (-0.125, -0.125, -0.125)
    assert order.lines[1].rival is None and order.lines[0].gain.mean == 0.25
    assert [line.x for line in guidance.lines] == [0, 2] and [line.x for line in steering.lines] == [0.4, 0.8]
    assert guidance.x == "w" and guidance.lines[1].calls == "2" and guidance.lines[1].gain is None
    text = text_report(read_run(full))
    assert (
        "  order: CPT ascending, noise for density" in text
        and ".375±.177 .375±.177   .500 .750    1-2  -.125 [-.125, -.125] to" in text
    )
    assert (
        "   +.250  Joint@4 of order: CPT ascending minus order: CPT shuffled, [+.250, +.250], p <.001" in text
    )
    # The main table holds the main rows alone; each table says how to make it again.
    assert "CPT" not in text.split("references:")[0]
    assert "$ python -m experiments.run --config=experiments/configs/modit.py --workdir=runs/tiny\n" in text
    assert (
        "experiments.evaluate --config=experiments/configs/modit.py --workdir=runs/tiny --methods='^order: '"
        in text
    )


def test_checkpoints_by_hand(full):
    first, second = steps(read_run(full))
    assert (first.folder, first.step, first.seeds, second.step) == ("sft", 10, 2, 20)
    np.testing.assert_allclose(first.joint, [0.15, 0.15])  # .1 and .2 over seeds
    assert (first.attribute, first.purity) == (0.5, 0.5)
    text = text_report(read_run(full))
    assert "sft        20     2     .250     .250   .500 .500" in text
    assert "--checkpoints=sft" in text


def test_page_shows_every_table_and_curve(full):
    report.main(full, "", "")
    text = (full / "report.html").read_text()
    page = Page(text)
    assert not page.open and not page.fetched and len(set(page.ids)) == len(page.ids)
    said = " ".join(page.text)
    for words in (
        "The order of the walks in CPT",
        "to order: CPT shuffled",
        "--methods='^guidance: '",
        "Guidance w",
    ):
        assert words in said
    # Frontier, cells, guidance beside steering, checkpoints, training.
    assert page.tags.count("svg") == 5 and "/home/x" not in text


def test_a_packed_file_gives_the_same_report(full, tmp_path, capsys):
    path = tmp_path / "deep" / "tiny.jsonl"
    report.main(full, str(path), "")
    of_run = capsys.readouterr().out
    report.main(None, "", str(path))
    assert of_run.startswith(capsys.readouterr().out)
    assert f"\n{path}\n" in of_run
    report.main(tmp_path / "page", "", str(path))
    assert "order: CPT shuffled" in (tmp_path / "page" / "report.html").read_text()
    a, b = read_run(full), read_packed(path)
    for name in a.values:
        np.testing.assert_array_equal(a.values[name], b.values[name])
    for at, hits in b.hits.items():
        np.testing.assert_array_equal(hits, a.hits[at])
    # References and curves are held against nothing, so their contexts are not kept; all of ours are.
    assert {at[1] for at in b.hits} == {
        "seed mean", "linear-probe steering", "MO-DiT", "order: CPT ascending", "order: CPT shuffled",
        "order: CPT ascending, noise for density",
    }  # fmt: skip
    text = path.read_text()
    assert "/home/" not in text and str(tmp_path) not in text
    header = json.loads(text.splitlines()[0])
    assert header["rows"]["k"] == 4 and header["config"]["model"] == {"anchor": "</pre><i>"}
    assert header["environment"]["packed with"].keys() == {"jax", "flax"}
    # Packed again it is the same file.
    assert save_packed(b, tmp_path / "again.jsonl").read_text() == text


def test_rows_of_old_files_are_of_the_main_table(workdir):
    found = read_run(workdir)
    assert found.tables == {"main": found.methods} and found.x("MO-DiT") is None
    mixed = [*rows_by_hand(), *side_rows("order", {"order: CPT ascending": [0.75, 0.5]})]
    assert read_results(save(workdir, mixed)).tables["order"] == ["order: CPT ascending"]
    packed = save_packed(read_run(workdir), workdir / "packed.jsonl")
    assert text_report(read_packed(packed)) == text_report(read_run(workdir))


def test_no_path_of_the_machine_is_told(tmp_path):
    said = "python -m experiments.run --config=modit.py:data=/home/x/mine.parquet,seeds=0 --workdir=/tmp/a/b"
    assert portable(said) == (
        "python -m experiments.run --config=modit.py:data=mine.parquet,seeds=0 --workdir=runs/b"
    )
    assert portable({"a": ["/tmp/x/y", "~/z", "data", "p/q", 3]}) == {"a": ["y", "z", "data", "p/q", 3]}
    # Without a stored command it is what the config tells.
    config = {
        "seeds": [0, 1],
        "model": {"size": "demo"},
        "catalogue": {"data": "moses", "folder": "/tmp/data"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    about = read_about(tmp_path)
    assert about.config["catalogue"]["folder"] == "data"
    assert about.command == (
        "python -m experiments.run --config=experiments/configs/modit.py:size=demo,data=moses,seeds=0+1 "
        f"--workdir=runs/{tmp_path.name}"
    )


def test_command_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "experiments.report", f"--workdir={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(report.__file__).parents[1], check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: ") and "holds no rows" in done.stderr
    done = subprocess.run(
        command[:-1], capture_output=True, text=True, cwd=Path(report.__file__).parents[1], check=False
    )
    assert done.returncode == 1 and "error: --workdir: is not given" in done.stderr
