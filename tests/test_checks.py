"""What a configuration cannot have is said by the leaf's name before anything is built or trained."""

from __future__ import annotations

import pytest

from experiments import checks, r4t_checks
from experiments.configs import modit, r4t
from genret.training.loop import FitOptions
from genret.types import InputError


@pytest.mark.parametrize("argument", ["size=test", "size=demo", "size=evidence", "size=B", "size=L"])
def test_every_size_of_modit_can_be_trained(argument):
    checks.check(modit.get_config(argument))


@pytest.mark.parametrize("argument", ["size=test", "size=demo", "size=evidence", "size=paper"])
def test_every_size_of_r4t_can_be_trained(argument):
    r4t_checks.check(r4t.get_config(argument))


MODIT = [
    ("batch", 0), ("length", 1), ("latent.neighbours", 0), ("hppo.rounds", 0), ("hppo.batch", -1),
    ("evaluation.k", 0), ("model.dtype", "float99"), ("stages.sft.log_every", 0),
    ("stages.pretrain.save_every", 0), ("stages.cpt.microbatches", 0), ("stages.cpt.steps", 0),
    ("labels.predictor.steps", 0), ("hppo.fit.ema_decay", 1.0), ("contrastive.fit.clip", -1.0),
    ("stages.sft.learning_rate", float("nan")), ("stages.sft.warmup", -1),
]  # fmt: skip
R4T = [
    ("k", 0), ("rl.group", 1), ("warm.batch", 0), ("language.dtype", "int8"), ("synthesis.shard", 0),
    ("diffusion.fit.save_every", 0), ("regressor.steps", 0), ("rl.fit.learning_rate", -1e-3),
]  # fmt: skip


@pytest.mark.parametrize(
    "configs, check, leaf, value",
    [(modit, checks.check, *one) for one in MODIT] + [(r4t, r4t_checks.check, *one) for one in R4T],
)
def test_what_a_run_cannot_have_is_named(configs, check, leaf, value):
    config = configs.get_config("size=test")
    with config.unlocked():
        config.update_from_flattened_dict({leaf: value})
    with pytest.raises(InputError, match=f"^{leaf}: .*use "):
        check(config)


def test_options_are_durations_and_rates():
    for name, value in (("steps", 0), ("keep", 0), ("weight_decay", float("inf")), ("ema_decay", -0.1)):
        with pytest.raises(InputError, match=f"^{name}: {value} "):
            FitOptions(**{"steps": 1, name: value})
