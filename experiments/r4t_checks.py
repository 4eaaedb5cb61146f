"""What no run of R4T can do, said before anything is trained."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from experiments.checks import at_least, of_matmuls, trainable
from experiments.fanouts import PARTS, few_calls
from genret.catalogue.fanout import FanoutData
from genret.types import InputError

LEAST = {
    "k": 1, "language.max_new": 1, "language.batch": 1, "warm.queries": 1, "warm.batch": 1, "rl.count": 1,
    "rl.group": 2, "rl.reuse": 1, "synthesis.fanouts": 1, "synthesis.shard": 1, "diffusion.batch": 1,
    "evaluation.runs": 1,
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises InputError for what no run can do, before anything is opened or computed."""
    at_least(config, LEAST)
    for name in ("language.dtype", "diffusion.dtype"):
        of_matmuls(config, name)
    trainable(config, "warm.fit", "rl.fit", "diffusion.fit", "regressor")
    if unknown := [name for name in config.ablations if name != "rewards"]:
        raise InputError("ablations", f"unknown {unknown[0]!r}", "use rewards, or none")
    if config.fanout.regime not in ("given", "oar"):
        raise InputError("regime", f"unknown regime {config.fanout.regime!r}", "use oar, or given")
    if config.ablations and config.fanout.data != "words" and config.fanout.regime != "oar":
        problem = f"rewards compares components of a reward that {config.fanout.data} does not have"
        raise InputError("ablations", problem, "leave it out, or use data=words or regime=oar")
    if 0 < config.diffusion.rows < config.k:
        problem = f"{config.diffusion.rows} for sets of {config.k}"
        raise InputError("diffusion.rows", problem, f"use {config.k} or more, or 0")
    spare = config.evaluation.spare
    if len(spare) != 2 or min(spare) < 0:
        fix = "write two counts from 0: for open-ended and for weakly supervised data"
        raise InputError("evaluation.spare", f"{spare} rows", fix)
    if not 0 <= config.evaluation.grounded < math.inf:
        raise InputError("evaluation.grounded", f"{config.evaluation.grounded}", "use 0 or more")
    few_calls(config.evaluation.few)
    levels = tuple(config.evaluation.levels)
    if len(levels) != 2 or not 0 < levels[0] < levels[1]:
        raise InputError("evaluation.levels", f"{levels}", "write the least and the largest noise level")
    if config.evaluation.part not in PARTS:
        problem = f"{config.evaluation.part!r} is asked of no method"
        raise InputError("evaluation.part", problem, f"use {' or '.join(PARTS)}")


def check_fits(config: ConfigDict, data: FanoutData) -> None:
    """Raises InputError for a configuration that asks more than the data hold."""
    contents, train = len(data.contents), len(data.rows("train"))
    asked = {"k": (config.k, contents, "contents"), "rl.count": (config.rl.count, train, "training queries")}
    if data.references is not None:
        for name in ("reward", "evaluation"):
            asked[f"{name}.depth"] = (config[name].depth, contents, "contents")
    for name, (count, most, what) in asked.items():
        if not 1 <= count <= most:
            fix = f"pass --config.{name}=N, 1 to {most}, or give more"
            raise InputError(name, f"{count} of {most} {what}", fix)
