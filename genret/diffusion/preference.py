"""Reference-anchored preference optimisation (DPO) on the denoising error.

Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14) with this package's error ℓ(z) = λ(σ) ‖D - z‖²
summed over the set and its coordinates, the same σ and ε for the winner w and the loser l:

    u = [ℓ_θ(w) - ℓ_ref(w)] - [ℓ_θ(l) - ℓ_ref(l)]
    L = -log sigmoid(-β/2 u)  +  b β/2 relu(ℓ_θ(w) - ℓ_ref(w))  +  a ℓ_θ(w) / (K D)

β multiplies the *sum*. A β quoted for errors averaged over n coordinates (image papers: 5000 over 16,384)
is n times larger for the same strength: β_sum = β_mean / n, so 5000 there is .305 here, and .39 here is 50
per-coordinate at n = 128.

Safe loser scale (Diffusion-SDPO, arXiv 2511.03317): the loser's *gradient*, not its value, is multiplied by

    s = clip((1 - μ) ‖g_w‖² / (g_w · g_l), 0, 1) where g_w · g_l > 0, else 1,

g the gradients of the two errors with respect to the network's outputs, so that to first order the winner's
error does not rise. The guard b is DPO-Positive's (arXiv 2402.13228), in units of β/2; a anchors winners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from genret.diffusion import edm
from genret.diffusion.retriever import Retriever
from genret.types import Array, Condition, Draw, InputError, PyTree, Terms


@struct.dataclass
class PairBatch:
    """Of two sets for one condition, `winner` is preferred to `loser`: unit-norm f32[B, K, D] each.

    weight: f32[B]; a row of weight 0 is padding and changes nothing.
    """

    condition: Condition
    winner: Array
    loser: Array
    weight: Array


@dataclass(frozen=True)
class Preference:
    """beta: β on the summed error. safe: μ of the safe loser scale, or None for plain DPO. guard: b.
    anchor: a. draws: noise draws per pair and step, averaged."""

    beta: float
    safe: float | None = 0.9
    guard: float = 1.0
    anchor: float = 0.0
    draws: int = 4

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.draws < 1:
            raise InputError(
                "preference", f"beta {self.beta}, draws {self.draws}", "use beta > 0 and at least one draw"
            )
        if min(self.guard, self.anchor) < 0 or not (self.safe is None or 0 <= self.safe <= 1):
            problem = f"safe {self.safe}, guard {self.guard}, anchor {self.anchor}"
            raise InputError("preference", problem, "use safe in 0..1 or None, and no negative weight")


def safe_scale(winner: Array, loser: Array, mu: float) -> Array:
    """Diffusion-SDPO's s f32[B] from the residuals √λ (D - z) f32[B, K, D] of the two sides.

    The output gradients are 2 √λ times the residuals, and σ is shared, so the factor cancels.
    """
    square = jnp.sum(winner**2, axis=(1, 2))
    product = jnp.sum(winner * loser, axis=(1, 2))
    scale = (1 - mu) * square / jnp.where(product > 0, product, 1.0)
    return jnp.where(product > 0, jnp.clip(scale, 0, 1), 1.0)


def preference_terms(
    winner: Array, loser: Array, reference_winner: Array, reference_loser: Array, options: Preference
) -> tuple[Array, dict[str, Array]]:
    """(L f32[B], logged values f32[B]) of the module's formula.

    winner, loser: residuals f32[B, K, D] of the model; reference_*: errors ℓ_ref f32[B], summed.
    Logged: accuracy (1 where u < 0), margin -β/2 u, both errors against the reference and the loser scale;
    errors per coordinate.
    """
    error_w, error_l = (jnp.sum(r**2, axis=(1, 2)) for r in (winner, loser))
    scale = jnp.ones_like(error_w)
    if options.safe is not None:
        scale = jax.lax.stop_gradient(safe_scale(winner, loser, options.safe))
    # The value of the loser's error stays, to the last bit; its gradient is scaled.
    held = jax.lax.stop_gradient(error_l)
    scaled = held + scale * (error_l - held)
    gain_w, gain_l = error_w - reference_winner, error_l - reference_loser
    margin = -options.beta / 2 * (gain_w - (scaled - reference_loser))
    coordinates = winner.shape[1] * winner.shape[2]
    loss = -jax.nn.log_sigmoid(margin) + options.anchor * error_w / coordinates
    loss += options.guard * options.beta / 2 * jax.nn.relu(gain_w)
    aux = {
        "accuracy": (margin > 0).astype(jnp.float32), "margin": margin, "loser_scale": scale,
        "winner_error": gain_w / coordinates, "loser_error": gain_l / coordinates,
    }  # fmt: skip
    return loss, aux


def preference_loss(retriever: Retriever, options: Preference, place: Callable[[Array], Array] | None = None):
    """(params, frozen, PairBatch, draw) -> Terms; frozen holds `space` and the `reference` parameters.

    At the reference the loss is log 2 per pair (plus the anchor). The condition is never dropped.

    place: keeps arrays [draws, B, ...] on the devices of their rows (`mesh.with_rows`). Left to itself on a
    mesh that shards parameters, XLA splits the features of activations instead, and moves them about.
    """
    place = place or (lambda x: x)

    def loss(params: PyTree, frozen: PyTree, batch: PairBatch, draw: Draw) -> Terms:
        space = frozen["space"]
        anchor = space.anchor(batch.condition)
        clean = [space.encode(side, anchor) for side in (batch.winner, batch.loser)]
        policy, reference = (
            retriever.denoiser(p, batch.condition, anchor) for p in (params, frozen["reference"])
        )

        def randomness(turn: Array) -> tuple[Array, Array]:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, turn))(draw.key)
            # The draws of a pair share out the noise levels between them.
            sigma = edm.noise_level((draw.uniform + turn / options.draws) % 1.0, retriever.noise)
            return sigma, edm.gaussian_noise(keys, clean[0].shape[1:])

        def one(sigma: Array, noise: Array) -> tuple[Array, dict[str, Array]]:
            ours = [edm.denoising_residual(policy, z, sigma, noise) for z in clean]
            theirs = [edm.denoising_error(reference, z, sigma, noise) for z in clean]
            return preference_terms(*ours, *theirs, options)

        drawn = jax.tree.map(place, jax.vmap(randomness)(jnp.arange(options.draws)))
        value, aux = jax.tree.map(lambda x: x.mean(0), jax.vmap(one)(*drawn))
        return Terms(value, batch.weight, aux)

    return loss
