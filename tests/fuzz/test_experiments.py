"""Damaged rows under a report, and arguments of a configuration."""

import contextlib
import json
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from experiments import arguments, fanout_report, fanout_rows
from experiments.configs import modit
from experiments.configs import r4t as r4t_configs
from experiments.packed import read_packed, save_packed
from experiments.report_rows import read_run
from experiments.report_tables import text_report
from genret.types import InputError


def written(tree) -> bytes:
    return json.dumps(tree).encode()


def result_rows():
    lists = {"pattern": [5, 5, 7], "joint": [1, 2, 1], "attribute": [2, 2, 2], "purity": [3, 3, 2]}
    return [
        {"method": method, "table": "main", "x": None, "seed": seed, "split": split, "domain": domain, "k": 4,
         "catalogue": "tiny", "n_items": 1000, "lookups": 70, "contexts": 3, "patterns": 2, "joint": 0.3,
         "attribute": 0.5, "purity": 0.6, "normalised_joint": 0.8, "headroom": 0.5, "probes": 1, "calls": 1,
         "tried": 1, "uses": "labels", "index": "exact", "ann_recall": 1.0, "setting": [4, 0.0, 1.0],
         "per_context": lists}
        for method in ("seed mean", "linear-probe steering", "MO-DiT", "MO-DiT+HPPO")
        for seed in (0, 1)
        for split in ("item_holdout", "pattern_holdout")
        for domain in ("a", "b")
    ]  # fmt: skip


def result_files():
    found = dict(domain="a", split="item_holdout", kendall=0.3, ndcg=0.9, calibration=0.01, predictor="kNN")
    found |= dict(spearman=0.4, patterns=3, items=30)
    step = dict(folder="sft", step=2, split="item_holdout", domain="a", seed=0, k=4, contexts=3)
    step |= dict(joint=0.3, attribute=0.5, purity=0.6)
    files = {
        "results.jsonl": b"".join(written(row) + b"\n" for row in result_rows()),
        "checkpoints.jsonl": written(step) + b"\n",
        "config.json": written({"seeds": [0], "model": {"size": "S"}}),
        "seed_0/predictor_report.json": written([found]),
    }
    return [files]


def packed_files():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seed_0").mkdir()
        for name, content in result_files()[0].items():
            (Path(folder) / name).write_bytes(content)
        packed = save_packed(read_run(Path(folder)), Path(folder) / "packed.jsonl")
        return [{"packed.jsonl": packed.read_bytes()}]


def set_files():
    values = dict.fromkeys(("composite", "relevant", "groundedness", "diversity", "alignment"), [0.5, 0.25])
    same = {"data": "words", "seed": 0, "queries": 2, "k": 2, "calls": 1, "contents": 9}
    same |= dict.fromkeys(values, 0.4) | {"per_query": values}
    same |= {"part": "test", "reads": "", "runs": 2, "repeated": 1, "vendi_runs": 0.5}
    shown = [{"query": "rain", "contents": ["tea"], "sub_queries": ["hot tea"]}]
    methods = ("random pool", "R4T-FOLM", "R4T-Diffusion", "zero-shot LM")
    rows = [written(same | {"method": m, "shown": shown * (m != "random pool")}) for m in methods]
    time = {"method": "R4T-FOLM", "batch": 8, "seed": 0, "calls": 1, "p50": 1.0, "p95": 2.0}
    time |= {"device": "cpu", "k": 2, "repeats": 2, "search_p50": 0.1, "encode_p50": 0.1}
    time |= {"seconds": [1.0, 1.1], "alone": [0.9, 1.0]}
    return [{"results.jsonl": b"\n".join(rows) + b"\n", "latency.jsonl": written(time) + b"\n"}]


def words_of(draw, _):
    """A configuration's argument."""
    names = "size data raw embeddings seeds ablations budget".split()
    odd = [
        "test",
        "demo",
        "moses",
        "words",
        "0",
        "0+1",
        "+",
        "²",
        "9" * 5000,
        "-1",
        "1e999",
        "nan",
        "0.05",
        "",
        "=",
    ]
    part = st.builds(
        "{}{}{}".format, st.sampled_from(names), st.sampled_from(("=", "==", "")), st.sampled_from(odd)
    )
    parts = draw(st.lists(part | st.text(max_size=8), max_size=4))
    return {"argument": ",".join(parts).encode("utf-8", "surrogatepass")}


def configured(folder):
    text = (folder / "argument").read_bytes().decode("utf-8", "surrogatepass")
    for read in (modit.get_config, r4t_configs.get_config, lambda t: arguments.parse(t, size="", data="")):
        with contextlib.suppress(InputError):
            read(text)


def fanouts(folder):
    return fanout_report.text_report(fanout_rows.read_fanouts(folder))


def packed(folder):
    return text_report(read_packed(folder / "packed.jsonl"))


LOADERS = {
    "results": lambda damage: (result_files, damage, lambda f: text_report(read_run(f))),
    "packed": lambda damage: (packed_files, damage, packed),
    "fan-outs": lambda damage: (set_files, damage, fanouts),
    "arguments": lambda _: (lambda: [{}], words_of, configured),
}


def test_damage_is_said_in_one_error(survives):
    survives()
