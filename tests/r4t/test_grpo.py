"""Soft-GRPO by hand, against TRL's own loss, as an expectation over a whole vocabulary, and on a bandit."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from genret.r4t.grpo import LOG_RATIO_LIMIT, SoftGRPO, advantages, agreement, soft_grpo
from genret.training.loop import FitOptions, accumulate, draw_for, fit
from genret.training.stage import Stage
from genret.types import InputError

PLAIN = SoftGRPO(new_old=0.0, old_new=0.0)


def mean_loss(new, old, own, advantage, weight=None, options=PLAIN, reference=None):
    """Σ w·l / Σ w, as the train step takes it."""
    weight = jnp.ones(len(new)) if weight is None else weight
    terms = soft_grpo(new, old, own, advantage, weight, options, reference)
    return (terms.weight * terms.loss).sum() / terms.weight.sum()


# Advantages


def test_advantages_by_hand():
    # 1, 2, 3: mean 2, squares 1 + 0 + 1 over G - 1 = 2, std 1. 0, 0, 3: mean 1, (1 + 1 + 4) / 2, std √3.
    found = advantages([[1, 2, 3], [0, 0, 3], [5, 5, 5]])
    expected = [[-1, 0, 1], [-1 / np.sqrt(3), -1 / np.sqrt(3), 2 / np.sqrt(3)], [0, 0, 0]]
    np.testing.assert_allclose(found.advantage, expected, atol=1e-5)
    assert found.kept.tolist() == [True, True, False]
    # ε = 1 halves an advantage whose std is 1.
    np.testing.assert_allclose(advantages([[1, 2, 3]], 1.0).advantage, [[-0.5, 0, 0.5]], atol=1e-6)


def test_rounding_alone_is_no_advantage():
    reward = np.float32([[0.1 + 0.2, 0.3, 0.3 + 1e-8]])
    found = advantages(reward)
    assert not found.kept.any() and not found.advantage.any()


rewards = st.lists(st.lists(st.integers(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rewards, st.randoms(use_true_random=False))
def test_advantages_know_neither_level_nor_scale_nor_order(values, random):
    reward = np.array(values) / 8
    found = advantages(reward)
    np.testing.assert_allclose(found.advantage.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(found.advantage.std(1, ddof=1), found.kept, atol=1e-4)
    np.testing.assert_allclose(advantages(3 * reward + 7).advantage, found.advantage, atol=1e-4)
    groups, places = random.sample(range(len(reward)), len(reward)), random.sample(range(4), 4)
    moved = advantages(reward[groups][:, places])
    np.testing.assert_allclose(moved.advantage, found.advantage[groups][:, places], atol=1e-6)
    assert moved.kept.tolist() == found.kept[groups].tolist()


def test_bad_rewards_and_options_are_refused():
    for reward in ([[1.0]], [1.0, 2.0], [[1.0, np.nan]]):
        with pytest.raises(InputError, match="reward"):
            advantages(reward)
    for options in (
        dict(clip=0.0),
        dict(clip=1.0),
        dict(new_old=-0.1),
        dict(reference=-1.0),
        dict(per="batch"),
    ):
        with pytest.raises(InputError):
            SoftGRPO(**options)


# The loss of a token: log-probability, old one, advantage -> L and dL / d ln π. Worked out on paper; exp is a
# calculator's: e^.5 = 1.6487213, e^-.5 = .6065307. b1 = .05, b2 = .02, clip .2; the two KL terms add
# b1 ρ ln ρ - b2 ln π to the loss, and b1 ρ (1 + ln ρ) - b2 to its gradient.


@pytest.mark.parametrize(
    "new, old, a, loss, gradient",
    [
        # ρ above the clip, A > 0: -1.2; the clip takes the gradient. KL: .0412180 + .02, .1236541 - .02.
        (-1.0, -1.5, 1.0, -1.2 + 0.0412180 + 0.02, 0.1036541),
        # ρ above, A < 0: the loss is not clipped, and its gradient is ρ.
        (-1.0, -1.5, -1.0, 1.6487213 + 0.0412180 + 0.02, 1.6487213 + 0.1036541),
        # ρ below, A > 0: not clipped. KL: -.0151633 + .04, .05 · .6065307 · .5 - .02 = -.0048367.
        (-2.0, -1.5, 1.0, -0.6065307 - 0.0151633 + 0.04, -0.6065307 - 0.0048367),
        # ρ below, A < 0: .8, no gradient.
        (-2.0, -1.5, -1.0, 0.8 - 0.0151633 + 0.04, -0.0048367),
        # On policy: -A, and -A + b1 - b2.
        (-1.5, -1.5, 2.0, -2.0 + 0.03, -2.0 + 0.03),
    ],
)
def test_token_by_hand(new, old, a, loss, gradient):
    options = SoftGRPO(new_old=0.05, old_new=0.02)
    own = jnp.ones((1, 1), bool)
    call = lambda x: mean_loss(x, jnp.array([[old]]), own, jnp.array([a]), options=options)  # noqa: E731
    value, slope = jax.value_and_grad(call)(jnp.array([[new]]))
    assert value == pytest.approx(loss, abs=1e-6) and slope[0, 0] == pytest.approx(gradient, abs=1e-6)


def test_answer_by_hand_and_its_log():
    # Two tokens of the answer, ratios e^.5 (clipped, A = 1) and 1: (-1.2 - 1) / 2. A third is padding.
    new, old = jnp.array([[-1.0, -3.0, jnp.nan]]), jnp.array([[-1.5, -3.0, jnp.inf]])
    terms = soft_grpo(new, old, jnp.array([[True, True, False]]), jnp.ones(1), jnp.ones(1), PLAIN)
    assert terms.loss[0] == pytest.approx(-1.1) and terms.weight[0] == 2
    expected = dict(clipped=0.5, kl_new_old=1.6487213 * 0.5 / 2, kl_old_new=-0.25, surprise=2.0)
    assert {n: float(v[0]) for n, v in terms.aux.items()} == pytest.approx(expected)
    sequence = dataclasses.replace(PLAIN, per="sequence")
    again = soft_grpo(new, old, jnp.array([[True, True, False]]), jnp.ones(1), jnp.ones(1), sequence)
    assert again.loss[0] == terms.loss[0] and again.weight[0] == 1


# TRL 1.16.0, its own GRPOTrainer._compute_loss on a trainer stubbed to give these log-probabilities, float64.


def trl_case():
    i = np.arange(20.0).reshape(4, 5)
    old = -1.5 + np.sin(1.7 * i)
    new, reference = old + 0.5 * np.sin(2.3 * i + 1), old - 0.3 * np.cos(1.1 * i)
    own = np.arange(5) < np.array([5, 3, 4, 1])[:, None]
    advantage = advantages([[0.9, 0.2], [0.1, 0.4]], epsilon=1e-4).advantage.ravel()
    return [jnp.asarray(x) for x in (new, old, own, advantage, reference)]


TRL_ADVANTAGES = [0.7069639529, -0.7069639529, -0.7067736049, 0.7067736049]
TRL = {  # (its loss_type, its beta): the loss, and its gradient with respect to ln π of three tokens
    ("grpo", 0.0): (0.08367761338, -0.0326673, 0.0569921, -0.1179082),
    ("grpo", 0.04): (0.08900912729, -0.0325561, 0.0575396, -0.1264090),
    ("bnpo", 0.0): (0.10115189829, -0.0502574, 0.0526081, -0.0362795),
    ("bnpo", 0.04): (0.10551916709, -0.0500863, 0.0531135, -0.0388951),
}


@pytest.mark.parametrize("kind, beta", TRL)
def test_plain_grpo_is_trls(kind, beta):
    new, old, own, advantage, reference = trl_case()
    np.testing.assert_allclose(advantage, TRL_ADVANTAGES, atol=1e-7)
    options = dataclasses.replace(PLAIN, per={"grpo": "sequence", "bnpo": "token"}[kind], reference=beta)
    reference = reference if beta else None
    value, slope = jax.value_and_grad(mean_loss)(
        new, old, own, advantage, options=options, reference=reference
    )
    expected = TRL[kind, beta]
    assert value == pytest.approx(expected[0], abs=1e-6)
    np.testing.assert_allclose([slope[0, 1], slope[1, 0], slope[3, 0]], expected[1:], atol=1e-6)
    terms = soft_grpo(new, old, own, advantage, jnp.ones(4), options, reference)
    clipped = (terms.aux["clipped"] * own.sum(1)).sum() / own.sum()
    assert clipped == pytest.approx(0.3846153846)  # its clip_ratio/region_mean


@pytest.mark.peer
@pytest.mark.parametrize("kind, beta", TRL)
def test_the_goldens_are_trls(kind, beta):
    import collections

    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    new, old, own, advantage, reference = (torch.tensor(np.array(x)).double() for x in trl_case())
    new.requires_grad_()
    same = lambda x, reduction="sum": x  # noqa: E731
    trainer = types.SimpleNamespace(
        loss_type=kind, beta=beta, epsilon_low=0.2, epsilon_high=0.2, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(reduce=same, gather=same, gather_for_metrics=same, num_processes=1),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    ids = torch.zeros(new.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=own, advantages=advantage,
        old_per_token_logps=old, ref_per_token_logps=reference,
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    found = [float(x) for x in (loss.detach(), new.grad[0, 1], new.grad[1, 0], new.grad[3, 0])]
    np.testing.assert_allclose(found, TRL[kind, beta], atol=1e-6)


# The KL terms, exactly: every token of a small vocabulary, weighted by the policy that samples it.

THETA = jnp.array([0.3, -1.0, 0.8, 0.1, -0.4])
OLD = jax.nn.log_softmax(jnp.array([0.1, -0.2, 0.5, 0.9, -1.1]))


def expectation(theta, sampler, options, reference=None):
    """E over tokens of the sampler exp(f32[V]) of the loss at advantage 0."""
    new, n = jax.nn.log_softmax(theta), len(theta)
    rows = lambda x: x[:, None]  # noqa: E731
    reference = None if reference is None else rows(reference)
    own = jnp.ones((n, 1), bool)
    return mean_loss(rows(new), rows(sampler), own, jnp.zeros(n), jnp.exp(sampler), options, reference)


def kl(p, q):
    return (jnp.exp(p) * (p - q)).sum()


def test_the_two_terms_are_the_two_divergences():
    new = jax.nn.log_softmax(THETA)
    forward = SoftGRPO(new_old=1.0, old_new=0.0)
    np.testing.assert_allclose(expectation(THETA, OLD, forward), kl(new, OLD), rtol=1e-5)
    backward = SoftGRPO(new_old=0.0, old_new=1.0)
    entropy = -(jnp.exp(OLD) * OLD).sum()
    np.testing.assert_allclose(expectation(THETA, OLD, backward), kl(OLD, new) + entropy, rtol=1e-5)
    # The k3 form, on the policy's own tokens.
    third = dataclasses.replace(PLAIN, reference=1.0)
    np.testing.assert_allclose(expectation(THETA, new, third, OLD), kl(new, OLD), rtol=1e-5)


def test_their_gradients_are_the_divergences_and_vanish_on_policy():
    gradient = jax.grad(expectation)
    for options, divergence in (
        (SoftGRPO(new_old=1.0, old_new=0.0), lambda t: kl(jax.nn.log_softmax(t), OLD)),
        (SoftGRPO(new_old=0.0, old_new=1.0), lambda t: kl(OLD, jax.nn.log_softmax(t))),
    ):
        found = gradient(THETA, OLD, options)
        np.testing.assert_allclose(found, jax.grad(divergence)(THETA), atol=1e-6)
        assert jnp.abs(found).max() > 0.05
        np.testing.assert_allclose(gradient(OLD, OLD, options), 0, atol=1e-6)  # the expected score is zero


def test_on_policy_equal_weights_cancel_on_every_token():
    rng = np.random.default_rng(0)
    old = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    own = jnp.asarray(rng.random((4, 6)) < 0.7)
    advantage = jnp.asarray(rng.normal(size=4), jnp.float32)
    slope = jax.grad(lambda x, o: mean_loss(x, old, own, advantage, options=o))
    paper, plain = slope(old, SoftGRPO()), slope(old, PLAIN)
    np.testing.assert_allclose(paper, plain, atol=1e-7)
    np.testing.assert_allclose(plain, -(own * advantage[:, None]) / own.sum(), atol=1e-6)
    # One of them alone is not zero, token by token: noise of mean zero.
    alone = slope(old, SoftGRPO(new_old=0.05, old_new=0.0))
    np.testing.assert_allclose(alone - plain, 0.05 * own / own.sum(), atol=1e-7)


# Batches


def batch(seed=0, rows=8, length=6):
    rng = np.random.default_rng(seed)
    own = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    return {
        "old": np.float32(rng.normal(size=(rows, length)) - 2), "own": own,
        "advantage": np.float32(rng.normal(size=rows)), "weight": np.ones(rows, np.float32),
        "shift": np.float32(rng.normal(size=(rows, length)) * 0.3),
    }  # fmt: skip


def stage_of(options):
    """A 'policy' whose log-probabilities are old + p · shift: one number to differentiate by."""

    def loss(params, frozen, batch, draw):
        new = batch["old"] + params["p"] * batch["shift"]
        return soft_grpo(new, batch["old"], batch["own"], batch["advantage"], batch["weight"], options)

    return Stage("test", lambda key: {"p": jnp.ones(())}, loss, lambda step, params: batch(), ())


def gradient_of(made, options, parts=1):
    size = len(made["own"])
    params = {"p": jnp.float32(1.0)}
    made = jax.tree.map(jnp.asarray, made)
    slope, logged = accumulate(stage_of(options), params, None, made, draw_for(0, 0, size), parts)
    return float(slope["p"]), {name: float(value) for name, value in logged.items()}


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_mean_is_over_tokens_or_answers_whatever_the_microbatches(per):
    options = SoftGRPO(per=per)
    made = batch()
    slope, logged = gradient_of(made, options)
    lengths, tokens = made["own"].sum(1), []
    for row in range(8):
        for t in range(lengths[row]):
            ratio = np.exp(made["shift"][row, t])
            a = made["advantage"][row]
            token = -min(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
            token += 0.05 * ratio * made["shift"][row, t]
            token -= 0.05 * (made["old"][row, t] + made["shift"][row, t])
            tokens.append((token, 1 / lengths.sum() if per == "token" else 1 / 8 / lengths[row]))
    assert logged["loss"] == pytest.approx(sum(t * w for t, w in tokens), abs=1e-5)
    for parts in (2, 4):
        again, log = gradient_of(made, options, parts)
        assert again == pytest.approx(slope, abs=1e-6)
        assert log == pytest.approx(logged, abs=1e-5)


def test_filtered_groups_order_and_padding_change_nothing():
    made, options = batch(), SoftGRPO()
    slope, logged = gradient_of(made, options)
    # Rows of weight 0 are as good as gone.
    other = batch(1)
    other["weight"] = np.zeros(8, np.float32)
    both = {name: np.concatenate([made[name], other[name]]) for name in made}
    for changed in (
        both,
        {name: value[::-1] for name, value in made.items()},
        {  # columns after the answers, whatever they hold
            name: np.concatenate([v, np.full((8, 3), v.dtype.type(0))], 1) if v.ndim == 2 else v
            for name, v in made.items()
        },
    ):
        again, log = gradient_of(changed, options)
        assert again == pytest.approx(slope, abs=1e-6)
        assert log == pytest.approx(logged, abs=1e-5)
    # A batch of filtered groups alone moves nothing.
    assert gradient_of(other, options)[0] == 0


def test_a_ratio_out_of_all_bounds_stays_finite():
    one = jnp.ones((1, 1))
    for new, old in ((0.0, -200.0), (-200.0, 0.0)):
        value, slope = jax.value_and_grad(mean_loss)(
            new * one, old * one, one > 0, jnp.array([-1.0]), options=SoftGRPO()
        )
        assert jnp.isfinite(value) and jnp.isfinite(slope).all()
        assert abs(value) <= (1 + 0.05 * LOG_RATIO_LIMIT) * np.exp(LOG_RATIO_LIMIT) + 10


def test_agreement_is_numpys():
    rng = np.random.default_rng(3)
    own = rng.random((4, 7)) < 0.6
    x = rng.normal(size=(4, 7)) - 50
    y = x + 0.1 * rng.normal(size=(4, 7))
    found = agreement(*(jnp.asarray(v) for v in (np.where(own, x, np.nan), y, own)))
    correlation = np.corrcoef(x[own], y[own])[0, 1]
    np.testing.assert_allclose(found["sampler_correlation"], [correlation] * 4, atol=1e-4)
    expected = [np.abs(x - y)[i][own[i]].mean() for i in range(4)]
    np.testing.assert_allclose(found["sampler_difference"], expected, atol=1e-5)
    sure = jnp.zeros((2, 3))
    assert agreement(sure, sure, sure == 0)["sampler_correlation"].tolist() == [1, 1]


@pytest.mark.parametrize("options", [SoftGRPO(), SoftGRPO(per="sequence", new_old=0.2, old_new=0.1)])
def test_a_bandit_learns_through_fit(options, tmp_path):
    # Answers of four tokens out of six; the reward is the share that spell 1 2 3 4.
    goal, size, group = np.array([1, 2, 3, 4]), 64, 8
    curve = []

    def rollout(step, params):
        rng = np.random.default_rng([7, step])
        log_probs = np.asarray(jax.nn.log_softmax(np.asarray(params["logits"])))
        cumulative = np.exp(log_probs).cumsum(1)
        tokens = (rng.random((size, 4, 1)) * cumulative[:, -1:] > cumulative).sum(-1)
        reward = (tokens == goal).mean(1).reshape(-1, group)
        curve.append(reward.mean())
        advantage, kept = advantages(reward)
        return {
            "tokens": tokens, "old": log_probs[np.arange(4), tokens], "own": np.ones((size, 4), bool),
            "advantage": advantage.ravel(), "weight": np.float32(np.repeat(kept, group)),
        }  # fmt: skip

    def loss(params, frozen, batch, draw):
        new = jax.nn.log_softmax(params["logits"])[jnp.arange(4), batch["tokens"]]
        return soft_grpo(new, batch["old"], batch["own"], batch["advantage"], batch["weight"], options)

    init = lambda key: {"logits": jnp.zeros((4, 6))}  # noqa: E731
    stage = Stage("bandit", init, loss, rollout, ((".*", PartitionSpec()),))
    fit(stage, tmp_path, FitOptions(60, learning_rate=0.1, warmup=5, log_every=60))
    assert np.mean(curve[:3]) < 0.3 and np.mean(curve[-3:]) > 0.9
