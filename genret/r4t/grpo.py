"""Soft-GRPO: the advantage and the loss of R4T's policy (arXiv 2603.06397, eqs. 6-8), pure functions.

For G answers to one query with rewards r_i, and for token o_t of an answer with log-probabilities
ln π under the policy and ln π_old under the one that wrote it, ρ = π / π_old:

    (6) A_i = (r_i - mean r) / (std r + ε)
    (8) L_t = -min(ρ A, clip(ρ, 1 - c, 1 + c) A) + b1 ρ (ln π - ln π_old) - b2 ln π

The b1 term estimates KL(π ‖ π_old) token by token, the b2 term KL(π_old ‖ π) less π_old's entropy, which is
why an answer is only ever scored on tokens that its own policy sampled. At π = π_old both have an expected
gradient of zero, and for b1 = b2, the paper's .05, they cancel on every single token: ∇L_t = -A ∇ln π. So
they act from the second update on the same rollout on. With b1 = b2 = 0 this is GRPO (DeepSeekMath,
arXiv 2402.03300), whose KL to a fixed reference is an option here, in the k3 form:

    + β (e^d - d - 1),  d = ln π_ref - ln π
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from genret.types import Array, InputError, Terms

# Log-ratios are clipped to ± this: e^20 is far past any ratio that means something, and finite in f32.
LOG_RATIO_LIMIT = 20.0
ADVANTAGE_EPS = 1e-6
# Rewards of a group this close are one reward: float32 rounding alone must not become an advantage.
SAME_REWARD = 1e-6


@dataclass(frozen=True)
class SoftGRPO:
    """clip: c. new_old: b1, of KL(π ‖ π_old). old_new: b2, of KL(π_old ‖ π). reference: β, 0 for none.

    per: 'token' averages over all own tokens of the batch (eq. 8's E_t), 'sequence' over answers of their
    mean over tokens (GRPO as published; a token of a short answer then weighs more).
    Raises InputError for a weight below 0, a clip outside 0..1 or another `per`.
    """

    clip: float = 0.2
    new_old: float = 0.05
    old_new: float = 0.05
    reference: float = 0.0
    per: str = "token"

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or min(self.new_old, self.old_new, self.reference) < 0:
            problem = f"clip {self.clip}, weights {self.new_old}, {self.old_new}, {self.reference}"
            raise InputError("soft_grpo", problem, "use a clip inside 0..1 and no negative weight")
        if self.per not in ("token", "sequence"):
            raise InputError("per", f"unknown {self.per!r}", "use token or sequence")


class Advantages(NamedTuple):
    """Eq. 6 for rewards f32[Q, G]: advantage f32[Q, G], and kept bool[Q], False where a group's rewards
    are all the same: it says nothing about which answer is better."""

    advantage: np.ndarray
    kept: np.ndarray


def advantages(reward: np.ndarray, epsilon: float = ADVANTAGE_EPS) -> Advantages:
    """rewards f32[Q, G] -> `Advantages`. The std has G - 1 in it, as in TRL and Tunix; eq. 6 does not say.

    Raises InputError for a group of one, or a reward that is not finite.
    """
    reward = np.asarray(reward, np.float64)
    if reward.ndim != 2 or reward.shape[1] < 2 or not np.isfinite(reward).all():
        problem = f"{reward.shape} is not [Q, G] with G >= 2, or not finite"
        raise InputError("reward", problem, "Sample two or more answers per query.")
    kept = np.ptp(reward, axis=1) > SAME_REWARD
    centred = reward - reward.mean(1, keepdims=True)
    scaled = centred / (reward.std(1, ddof=1, keepdims=True) + epsilon)
    return Advantages(np.float32(scaled * kept[:, None]), kept)


def soft_grpo(
    log_probs: Array, old: Array, own: Array, advantage: Array, weight: Array, options: SoftGRPO,
    reference: Array | None = None,
) -> Terms:  # fmt: skip
    """Eq. 8 per answer, for `Terms`: loss = mean of L_t over its own tokens.

    log_probs, old, reference: ln π, ln π_old, ln π_ref f32[B, L] of each token; own: bool[B, L], tokens that
    the policy wrote (not prompt, not padding). advantage: f32[B]. weight: f32[B], 0 for answers of a filtered
    group, 1 for others; the Terms' weight is that times the own tokens for `per` = 'token', and that alone
    for 'sequence', so that the train step's Σ w·l / Σ w is the mean asked for, over any microbatches.

    Logged: clipped, share of tokens whose gradient the clip takes away; kl_new_old, kl_old_new and
    kl_reference, estimates of the KLs per token; surprise, -ln π (an estimate of the entropy).
    """
    count = own.sum(1)
    pick = lambda x: jnp.where(own, x, 0.0)  # noqa: E731 -- padding may hold anything, even inf
    mean = lambda x: pick(x).sum(1) / jnp.maximum(count, 1)  # noqa: E731
    log_ratio = jnp.clip(pick(log_probs) - pick(old), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, a = jnp.exp(log_ratio), advantage[:, None]
    inside = jnp.clip(ratio, 1 - options.clip, 1 + options.clip)
    token = -jnp.minimum(ratio * a, inside * a)
    token += options.new_old * ratio * log_ratio - options.old_new * pick(log_probs)
    aux = {
        "clipped": mean((inside * a < ratio * a).astype(jnp.float32)),
        "kl_new_old": mean(ratio * log_ratio),
        "kl_old_new": mean(-log_ratio),
        "surprise": mean(-log_probs),
    }
    if reference is not None:
        d = jnp.clip(pick(reference) - pick(log_probs), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        token += options.reference * (jnp.exp(d) - d - 1)
        aux["kl_reference"] = mean(jnp.exp(d) - d - 1)
    weight = weight * (count if options.per == "token" else count > 0)
    return Terms(mean(token), weight.astype(jnp.float32), aux)


def agreement(log_probs: Array, old: Array, own: Array) -> dict[str, Array]:
    """Do training and sampler agree? sampler_difference f32[B], mean |ln π - ln π_old| over own tokens, and
    sampler_correlation, over all own tokens given, repeated f32[B]. Of the first update on a rollout the two
    are one policy computed in two ways; later ones have moved.
    """
    count = jnp.maximum(own.sum(1), 1)
    total = jnp.maximum(own.sum(), 1)
    x, y = (jnp.where(own, v - jnp.where(own, v, 0).sum() / total, 0.0) for v in (log_probs, old))
    scale = jnp.sqrt((x**2).sum() * (y**2).sum())
    # A policy that is sure of every token has no spread to correlate.
    correlation = jnp.where(scale > 0, (x * y).sum() / jnp.maximum(scale, 1e-30), 1.0)
    difference = jnp.where(own, jnp.abs(log_probs - old), 0.0).sum(1) / count
    return {
        "sampler_difference": difference,
        "sampler_correlation": jnp.broadcast_to(correlation, difference.shape),
    }
