"""R4T's stages on eight simulated devices, along every axis of the mesh, against one device."""

import jax
import numpy as np
import pytest

from genret.diffusion.retriever import Retriever
from genret.r4t import stages
from genret.r4t.policy import make_policy_stage, make_warm_start_stage
from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh
from tests.r4t.conftest import sets_of
from tests.r4t.test_policy import ONE, PAIRS, QUERIES, base, make_policy, make_rewards
from tests.r4t.test_stages import moved, units

pytestmark = pytest.mark.scale
__all__ = ["base", "sets_of"]  # fixtures
SHAPES = {"fsdp": (1, 8, 1), "tensor": (2, 1, 4), "all": (2, 2, 2)}  # data alone: in tests/r4t


@pytest.fixture(scope="module", params=SHAPES)
def mesh(request):
    return make_mesh(*SHAPES[request.param])


def agree(one, other, atol=1e-5):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=0, atol=atol)


@pytest.mark.parametrize("lora", [0, 4])
def test_the_policy_is_warmed_up_and_tuned_alike(base, tmp_path, mesh, lora):
    def run(mesh, folder):
        policy = make_policy(lora=lora)
        options = FitOptions(6, learning_rate=1e-3, warmup=2, log_every=6)
        warm = make_warm_start_stage("warm", policy, base, PAIRS, batch=16)
        begun = base if not lora else None
        state = fit(warm, tmp_path / folder / "warm", options, mesh=mesh, init_from=begun)
        tuned = make_policy_stage(
            "policy", policy, base, QUERIES, np.arange(3), make_rewards(), count=2, group=8,
            report=lambda row: None,
        )  # fmt: skip
        options = FitOptions(3, learning_rate=1e-3, warmup=1, log_every=3)
        return state.params, fit(
            tuned, tmp_path / folder / "policy", options, mesh=mesh, init_from=state.params
        ).params

    agree(run(ONE, "one"), run(mesh, "eight"))


@pytest.mark.parametrize("block, regression", [("paper", False), ("adaln", True)])
def test_sets_are_trained_alike(sets_of, tmp_path, mesh, block, regression):
    sets, queries = sets_of(units(1, 64, 3, 16), np.arange(64)), units(2, 64, 16)
    model = stages.set_dit("test", embedding=16, rows=3, block=block, positions=regression or None)
    retriever = Retriever(model, "log_normal")
    stage = stages.make_stage(
        "set", retriever, stages.fit_space(sets, queries), sets, queries, batch=32, regression=regression
    )
    options, begun = FitOptions(4, learning_rate=1e-3, warmup=1), moved(retriever)
    # From zero all rows are equally far from all targets, and rounding alone decides how they are matched.
    found = (fit(stage, tmp_path / str(m.size), options, mesh=m, init_from=begun) for m in (ONE, mesh))
    one, other = (jax.device_get(state.params) for state in found)
    total = lambda a, b: sum(map(lambda x, y: np.abs(x - y).sum(), *map(jax.tree.leaves, (a, b))))  # noqa: E731
    # Gradients that are zero but for rounding, of the keys' bias say, move a parameter at random.
    assert total(one, other) < 0.01 * total(one, begun)
