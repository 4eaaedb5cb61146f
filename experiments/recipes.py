"""Every model that a run trains: the four stages, their rivals, and the ablations of a table.

A recipe is one folder of a seed: a stage, the folder it starts from, and what differs from the main line.
"""

from __future__ import annotations

from dataclasses import dataclass

from genret.types import InputError

TRAINED = ("stages", "order", "pool", "preconditioning")  # tables with models of their own
TABLES = (*TRAINED, "kinds", "curves")
MEMORY = " with memory"  # the end of the name of a line that uses `modit.memory`


@dataclass(frozen=True)
class Recipe:
    """stage: pretrain, cpt, sft or hppo. start: the folder before it, None for scratch. table: the ablation
    that asks for it, '' where every run trains it. line: its name in that table.

    order: of CPT's walks (`stages.ORDERS`). retrieval: with the retrieval-aware term. regression: squared
    error without diffusion. centred: False for plain preconditioning. steered: False for the seed mean alone
    as anchor. policy, filter: of HPPO's pairs, '' for the configured ones. paper: the pool without feedback
    candidates and `pairs.PAPER`, whatever is configured.
    """

    stage: str
    start: str | None
    table: str = ""
    line: str = ""
    order: str = "ascending"
    retrieval: bool = False
    regression: bool = False
    centred: bool = True
    steered: bool = True
    policy: str = ""
    filter: str = ""
    paper: bool = False


def _pool(policy: str, filter_: str) -> Recipe:
    said = policy.replace("_", "-")
    line = f"{said}, Pareto filter off" if filter_ == "off" else f"{said}, Pareto filter on"
    return Recipe("hppo", "sft", "pool", line, retrieval=True, policy=policy, filter=filter_)


# In the order of training: each folder after the one it starts from.
RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe("pretrain", None),
    "cpt": Recipe("cpt", "pretrain"),
    "sft": Recipe("sft", "cpt"),
    "hppo": Recipe("hppo", "sft", retrieval=True),
    "sft_mse": Recipe("sft", "cpt", regression=True),
    "sft_retrieval": Recipe("sft", "cpt", retrieval=True),
    "sft_direct": Recipe("sft", "pretrain", "stages", "+SFT"),
    "hppo_dpo": Recipe("hppo", "sft", "stages", "+CPT+SFT+HPPO, preference loss alone"),
    "hppo_paper": Recipe("hppo", "sft", "stages", "+CPT+SFT+HPPO, the paper's recipe", paper=True),
    "hppo_paper_off": Recipe(
        "hppo", "sft", "stages", "+CPT+SFT+HPPO, the paper's, no Pareto filter", paper=True, filter="off"
    ),
    **{
        f"cpt_{order}": Recipe("cpt", "pretrain", "order", f"CPT {line}", order=order)
        for order, line in (
            ("shuffled", "shuffled"),
            ("descending", "descending"),
            ("true", "ascending, true density"),
            ("noise", "ascending, noise for density"),
        )
    },
    "hppo_hybrid_off": _pool("hybrid", "off"),
    "hppo_deterministic": _pool("deterministic", ""),
    "hppo_deterministic_off": _pool("deterministic", "off"),
    "hppo_on_policy": _pool("on_policy", ""),
    "hppo_on_policy_off": _pool("on_policy", "off"),
    "cpt_mean": Recipe("cpt", "pretrain", "preconditioning", "centred on the seeds +CPT", steered=False),
    "sft_mean": Recipe("sft", "cpt_mean", "preconditioning", "centred on the seeds +CPT+SFT", steered=False),
    "pretrain_plain": Recipe("pretrain", None, "preconditioning", "plain pretrain", centred=False),
    "cpt_plain": Recipe("cpt", "pretrain_plain", "preconditioning", "plain +CPT", centred=False),
    "sft_plain": Recipe("sft", "cpt_plain", "preconditioning", "plain +CPT+SFT", centred=False),
}

# The main line's own place in each table.
PLACES = {
    "stages": {"pretrain": "pretrain", "cpt": "+CPT", "sft": "+CPT+SFT", "hppo": "+CPT+SFT+HPPO"},
    "order": {"cpt": "CPT ascending"},
    "pool": {"hppo": "hybrid, Pareto filter on"},
    "preconditioning": {"pretrain": "centred pretrain", "cpt": "centred +CPT", "sft": "centred +CPT+SFT"},
}

# What a table is there to show: each folder, and the one that it is held against.
AGAINST = {
    "stages": {
        "cpt": "pretrain", "sft": "cpt", "sft_direct": "sft", "hppo": "sft", "hppo_dpo": "sft",
        "hppo_paper": "sft", "hppo_paper_off": "hppo_paper",
    },
    "order": {"cpt": "cpt_shuffled"} | {f"cpt_{o}": "cpt_shuffled" for o in ("descending", "true", "noise")},
    "pool": {
        "hppo_hybrid_off": "hppo", "hppo_deterministic": "hppo", "hppo_on_policy": "hppo",
        "hppo_deterministic_off": "hppo_deterministic", "hppo_on_policy_off": "hppo_on_policy",
    },
    "preconditioning": {
        "cpt": "cpt_mean", "sft": "sft_mean",
        "pretrain": "pretrain_plain", "cpt_mean": "cpt_plain", "sft_mean": "sft_plain",
    },
}  # fmt: skip


def lines(table: str) -> dict[str, str]:
    """Folder -> the name of its line in `table`, in the table's order; {} where it has no trained folders."""
    return PLACES.get(table, {}) | {f: r.line for f, r in RECIPES.items() if r.table == table}


def rivals(table: str) -> dict[str, str]:
    """Line -> the line that it is held against."""
    name = lines(table)
    return {name[folder]: name[other] for folder, other in AGAINST.get(table, {}).items()}


def asked(tables: tuple[str, ...], retrieval: bool) -> dict[str, Recipe]:
    """The recipes of a run with these ablation tables; retrieval: whether the term is on at all.

    Raises InputError for an unknown table.
    """
    for table in tables:
        if table not in TABLES:
            raise InputError("ablations", f"unknown table {table!r}", f"use {'+'.join(TABLES)}")
    return {
        name: r for name, r in RECIPES.items()
        if (not r.table or r.table in tables) and (retrieval or name not in ("sft_retrieval", "hppo_dpo"))
    }  # fmt: skip
