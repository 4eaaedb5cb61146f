"""A stage of one matrix, trained in moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh
from genret.training.stage import Stage
from genret.types import Terms


class Toy:
    """Eight steps, a checkpoint at 3, 6 and 8, the last two of them kept. width: of the square matrix."""

    def __init__(self, width=8):
        self.width = width

    def fit(self, folder, meanwhile=lambda step: None, card=None, log_every=2):
        """meanwhile(step) is called when the batch of that step is drawn."""

        def batch(step, _):
            meanwhile(step)
            return {"x": np.random.default_rng(step).normal(size=(4, self.width)).astype(np.float32)}

        stage = Stage(
            "toy", init=lambda key: {"kernel": jax.random.normal(key, (self.width, self.width))},
            loss=lambda p, _, b, d: Terms(jnp.sum((b["x"] @ p["kernel"] - 1) ** 2, -1), jnp.ones(4)),
            batch=batch, rules=(("", P()),), card=card or {"width": self.width},
        )  # fmt: skip
        options = FitOptions(steps=8, warmup=2, log_every=log_every, save_every=3, keep=2)
        return jax.device_get(fit(stage, folder, options, mesh=make_mesh(devices=jax.devices()[:1])))


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """(state, folder) of a run of `toy` that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return Toy().fit(folder), folder
