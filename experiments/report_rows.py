"""What a report reads: the rows of a run's folder, checked and laid out as arrays."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.workdir import check_rows, read_json, read_rows
from genret.modit.protocol import SPLITS
from genret.types import InputError

HEADLINE, STAGED = "MO-DiT+HPPO", "MO-DiT"  # ours: with preference optimisation, and stages 1-3 alone
ENCODER = "contrastive encoder"
METRICS = ("joint", "attribute", "purity", "normalised_joint")
COUNTED = METRICS[:3]  # those with hits per context
PROTOCOL = ("catalogue", "k", "n_items")
AGREEMENT = ("spearman", "kendall", "ndcg", "calibration")  # columns of predictor_report.json

# What the report reads of a row, of a checkpoint's row and of a predictor's (`workdir.check_rows`).
ROW = dict.fromkeys(("method", "split", "domain", "catalogue", "uses"), "text")
ROW |= dict.fromkeys(("seed", "k", "n_items", "lookups", "probes", "calls"), "count")
ROW |= {**dict.fromkeys((*METRICS, "ann_recall"), "number"), "table": "text?", "x": "number?"}
CHECKPOINT = dict.fromkeys(("folder", "split", "domain"), "text") | {"step": "count", "seed": "count"}
CHECKPOINT |= dict.fromkeys(COUNTED, "number")
PREDICTOR = dict.fromkeys(("predictor", "split", "domain"), "text") | dict.fromkeys(
    (*AGREEMENT, "budget"), "number?"
)


@dataclass(frozen=True)
class About:
    """What stands beside the rows. config, environment: {} and command: '' where they are not known.

    predictors: rows of every seed's predictor_report.json. checkpoints: rows of checkpoints.jsonl.
    """

    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    predictors: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)


NOTHING = About()


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of one catalogue under one protocol. Cells are (split, domain) pairs.

    values: metric -> f64[methods, seeds, splits, domains], NaN where a seed of a method is missing.
    hits: (metric, method, split, domain) -> f64[Q], the metric per context averaged over seeds.
    pattern: (split, domain) -> i64[Q], the pattern of each context. rows: all of them, less the lists.
    """

    methods: list[str]
    seeds: list[int]
    splits: list[str]
    domains: list[str]
    values: dict[str, np.ndarray]
    hits: dict[tuple[str, str, str, str], np.ndarray]
    pattern: dict[tuple[str, str], np.ndarray]
    rows: list[dict[str, Any]]
    about: About = NOTHING

    @property
    def k(self) -> int:
        return self.rows[0]["k"]

    @property
    def ours(self) -> str | None:
        """The method that the report is about, or None where it was not evaluated."""
        return next((m for m in (HEADLINE, STAGED) if m in self.methods), None)

    @functools.cached_property
    def cell_names(self) -> list[tuple[str, str]]:
        """(split, domain), in the order of the last two axes."""
        return [(s, d) for s in self.splits for d in self.domains]

    @functools.cached_property
    def tables(self) -> dict[str, list[str]]:
        """Table -> its methods; 'main' first, then in file order."""
        found: dict[str, list[str]] = {"main": []}
        for method in self.methods:
            found.setdefault(self._of[method][0].get("table") or "main", []).append(method)
        return found

    @functools.cached_property
    def _of(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {m: [] for m in self.methods}
        for row in self.rows:
            if row["method"] in found:
                found[row["method"]].append(row)
        return found

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """bool[methods]: reads what the question hides."""
        return np.array([hidden(self.spread(m, "uses")[0]) for m in self.methods], bool)

    def part(self, methods: Iterable[str]) -> Results:
        """The same cells and seeds of these methods alone, in their order."""
        methods = list(methods)
        at = [self.methods.index(m) for m in methods]
        return replace(self, methods=methods, values={n: v[at] for n, v in self.values.items()})

    def spread(self, method: str, key: str) -> tuple[Any, Any]:
        """Least and largest `key` of a method's rows."""
        found = [row[key] for row in self._of[method]]
        return min(found), max(found)

    def x(self, method: str) -> float | None:
        """Where a method stands on its curve; None for a method of a table."""
        return self._of[method][0].get("x")

    def cells(self, metric: str) -> np.ndarray:
        """Mean over the seeds there are, f64[methods, splits, domains]."""
        return np.nanmean(self.values[metric], axis=1)

    def cell(self, metric: str, method: str) -> np.ndarray:
        """The same of one method, f64[splits, domains]."""
        return np.nanmean(self.values[metric][self.methods.index(method)], axis=0)

    def unfinished(self) -> list[str]:
        """A sentence for each method that lacks seeds."""
        absent = np.isnan(self.values["joint"]).any(axis=(2, 3))
        return [
            f"{m} lacks seed {', '.join(map(str, np.array(self.seeds)[gone]))}"
            for m, gone in zip(self.methods, absent, strict=True)
            if gone.any()
        ]


def hidden(uses: str) -> bool:
    """Whether a row's `uses` names something that the question hides, as only references may."""
    return uses not in ("nothing", "labels")


def read_run(workdir: Path) -> Results:
    """The results of a run, and what stands beside them."""
    return replace(read_results(workdir / "results.jsonl"), about=read_about(workdir))


def read_results(path: Path) -> Results:
    """All rows of results.jsonl, references last.

    Raises InputError if there are none, if one cannot be read or is there twice, or if they are of
    several catalogues, depths or sets of contexts: such numbers must not stand in one table.
    """
    hits: dict[tuple[str, str, str, str], Any] = {}
    pattern: dict[tuple[str, str], np.ndarray] = {}
    rows, mixed = [], None
    try:
        for row in read_rows(path):
            lists = row["per_context"]
            method, split, domain = (row[key] for key in ("method", "split", "domain"))
            asked = counts(lists["pattern"])
            if not np.array_equal(pattern.setdefault((split, domain), asked), asked):
                mixed = mixed or f"{split}/{domain} ({method}, seed {row['seed']})"
            for metric in () if mixed else COUNTED:
                at = metric, method, split, domain
                hits[at] = hits.get(at, 0) + counts(lists[metric], len(asked))
            rows.append({key: value for key, value in row.items() if key != "per_context"})
        return gather(path, rows, hits, pattern, mixed)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"holds a row that is not of an evaluation ({error!r})"
        raise InputError(str(path), problem, "evaluate again") from None


def counts(values: list[int], contexts: int | None = None) -> np.ndarray:
    """i64[Q] of one count per context; raises ValueError for anything else."""
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**31 for n in values):
        raise ValueError("a list that holds no counts")
    if len(values) != (len(values) or 1 if contexts is None else contexts):
        raise ValueError(f"{len(values)} counts for {contexts or 'no'} contexts")
    return np.array(values)


def gather(
    path: Path, rows: list[dict], hits: dict, pattern: dict, mixed: str | None = None,
    about: About = NOTHING,
) -> Results:  # fmt: skip
    """Results of rows without lists and of hits summed over seeds; refuses what `read_results` says.

    mixed: names a row whose contexts are not those of the others.
    """

    def refuse(problem: str, fix: str) -> None:
        raise InputError(str(path), problem, fix)

    check_rows(path, rows, ROW)
    index = {(r["method"], r["seed"], r["split"], r["domain"]): r for r in rows}
    of_kind = {r["method"]: hidden(r["uses"]) for r in rows}  # in file order
    several = {key: sorted({r[key] for r in rows}, key=str) for key in PROTOCOL}
    if not rows:
        refuse("holds no rows", "run experiments.evaluate with the same --workdir first")
    for key, found in several.items():
        if len(found) > 1:
            refuse(f"mixes {key} {' and '.join(map(str, found))}", "give each its own --workdir")
    if len(index) < len(rows):
        refuse("holds a row twice", "evaluate again in a new --workdir")
    if mixed:
        refuse(f"mixes sets of contexts in {mixed}", "give each its own --workdir")
    methods = sorted(of_kind, key=of_kind.get)  # stable: file order, then references
    seeds = sorted({r["seed"] for r in rows})
    splits = [s for s in SPLITS if any(r["split"] == s for r in rows)]
    domains = list(dict.fromkeys(r["domain"] for r in rows))
    axes = [{name: i for i, name in enumerate(names)} for names in (methods, seeds, splits, domains)]
    values = {name: np.full([len(axis) for axis in axes], np.nan) for name in METRICS}
    count: dict[tuple[str, str, str], int] = {}
    for (method, seed, split, domain), row in index.items():
        at = tuple(axis[n] for axis, n in zip(axes, (method, seed, split, domain), strict=True))
        for name in METRICS:
            values[name][at] = row[name]
        count[method, split, domain] = count.get((method, split, domain), 0) + 1
    absent = np.isnan(values["joint"])
    for m, s in np.argwhere(absent.any(axis=(2, 3)) & ~absent.all(axis=(2, 3)))[:1]:
        refuse(f"lacks cells of {methods[m]}, seed {seeds[s]}", "evaluate again")
    mean = {at: total / count[at[1:]] / rows[0]["k"] for at, total in hits.items()}
    return Results(methods, seeds, splits, domains, values, mean, pattern, rows, about)


def read_about(workdir: Path) -> About:
    """Config, command, predictors and checkpoints of a run, without any path of this machine."""
    path = workdir / "config.json"
    config = portable(read_json(path)) if path.exists() else {}
    check_rows(path, [config], {"environment": "dict?", "command": "text?"})
    environment, command = config.pop("environment", {}), config.pop("command", "")
    predictors = []
    for path in sorted(workdir.glob("seed_*/predictor_report.json")):
        check_rows(path, found := read_json(path), PREDICTOR)
        predictors += [{"seed": int(path.parent.name.partition("_")[2]), **row} for row in found]
    command = command or _command(config, workdir.resolve().name)
    checkpoints = read_rows(workdir / "checkpoints.jsonl")
    check_rows(workdir / "checkpoints.jsonl", checkpoints, CHECKPOINT)
    return About(config, command, environment, predictors, checkpoints)


def portable(value: Any) -> Any:
    """Absolute paths in strings (and in trees of them) cut to their last part; a workdir to runs/NAME."""
    if isinstance(value, dict):
        return {key: portable(v) for key, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(--workdir[= ])(?:~?/[^\s/]+)*?/([^\s/]+)/?(?=\s|$)", r"\1runs/\2", value)
    return re.sub(r"(?:(?<=[=,:\s'\"])|^)~?/(?:[^\s,/]+/)*([^\s,/]*)", r"\1", value)


def _command(config: dict[str, Any], name: str) -> str:
    """The training command as far as the config tells it; '' where it does not."""
    try:
        size, data = config["model"]["size"], config["catalogue"]["data"]
        seeds = "+".join(map(str, config["seeds"]))
    except (KeyError, TypeError):
        return ""
    argument = f"size={size},data={data},seeds={seeds}"
    return f"python -m experiments.run --config=experiments/configs/modit.py:{argument} --workdir=runs/{name}"
