"""AdamW with warmup-cosine and clipping: the one optimiser of every stage."""

from __future__ import annotations

import jax
import optax

from genret.types import PyTree


def make_optimizer(
    *, learning_rate: float, steps: int, warmup: int, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW(0.9, 0.95); linear warmup over `warmup` steps, cosine to 1 % of the peak at `steps`.

    clip: global gradient norm. Weight decay acts on matrices named `kernel` only.
    """
    rate = optax.warmup_cosine_decay_schedule(
        learning_rate / max(warmup, 1),
        learning_rate,
        warmup,
        max(steps, warmup + 1),
        learning_rate / 100,
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=_kernels),
    )


def _kernels(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
