"""`fit`: the one trainer. Every stage of both papers goes through it."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from genret.training import memory, preemption
from genret.training import mesh as meshes
from genret.training.checkpoint import Checkpoints, abstract_like
from genret.training.log import MetricLog, Progress, counted_flops, peak_flops
from genret.training.optimizer import make_optimizer
from genret.training.stage import Stage
from genret.types import Array, Draw, InputError, PyTree


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """Durations are in optimiser steps.

    microbatches: gradient accumulation; the result does not depend on it. ema_decay is reached through
    min(decay, (1 + step) / (10 + step)), so short runs are not dominated by their start.

    Raises InputError for a count below one, or a rate that is none.
    """

    steps: int
    learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    microbatches: int = 1
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "microbatches", "log_every", "save_every", "keep"):
            if (value := getattr(self, name)) < 1:
                raise InputError(name, f"{value} is too few", "use 1 or more")
        for name in ("learning_rate", "warmup", "weight_decay", "clip"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(name, f"{value} is no rate or duration", "use 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise InputError("ema_decay", f"{self.ema_decay} keeps nothing new", "use 0 or more, less than 1")


@struct.dataclass
class TrainState:
    """step: i32[]. params, ema: float32 trees of the same structure. opt_state: optax state."""

    step: Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


class NonFiniteLoss(RuntimeError):
    """The loss left the finite numbers; the message names the step and the last good checkpoint."""


def draw_for(seed: int, step: Array, batch: int) -> Draw:
    """The randomness of one step: `split(fold_in(key(seed), step), B)` and stratified uniforms."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    offset = jax.random.uniform(jax.random.fold_in(key, batch))
    return Draw(jax.random.split(key, batch), (jnp.arange(batch) / batch + offset) % 1.0)


def accumulate(stage: Stage, params: PyTree, frozen: PyTree, batch: PyTree, draw: Draw, parts: int):
    """(gradient, metrics) of Σ w·l / Σ w over the whole batch, in `parts` strided microbatches."""

    def objective(params, batch, draw):
        terms = stage.loss(params, frozen, batch, draw)
        w = jax.lax.stop_gradient(terms.weight)
        sums = {k: jnp.sum(w * v) for k, v in {"loss": terms.loss, **terms.aux}.items()}
        return sums["loss"], {**sums, "weight": jnp.sum(w)}

    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        total, sums = gradient(params, batch, draw)
    else:
        # Strided, so that every microbatch keeps rows on every batch shard.
        split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), (batch, draw))

        def body(carry, part):
            return jax.tree.map(jnp.add, carry, gradient(params, *part)), None

        first = jax.tree.map(lambda x: x[0], split)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, *first))
        (total, sums), _ = jax.lax.scan(body, zero, split)
    weight = jnp.maximum(sums.pop("weight"), 1e-12)
    return jax.tree.map(lambda g: g / weight, total), {k: v / weight for k, v in sums.items()}


def make_step(stage: Stage, options: FitOptions, tx: optax.GradientTransformation, gathered: PyTree):
    """(state, frozen, batch) -> (state, metrics): the train step, to be jitted with shardings.

    gathered: shardings of the parameters and of `stage.frozen` as the loss reads them, without the fsdp axis.
    """

    def step(state: TrainState, frozen: PyTree, batch: PyTree):
        size = jax.tree.leaves(batch)[0].shape[0]
        draw = draw_for(options.seed, state.step, size)
        # Left to itself, XLA's partitioner returns wrong gradients where all three axes exceed 1.
        # A reference model left sharded would spread its sharding over every activation.
        params, frozen = jax.lax.with_sharding_constraint((state.params, frozen), gathered)
        grads, metrics = accumulate(stage, params, frozen, batch, draw, options.microbatches)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(options.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), state.ema, params)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def optimizer_of(options: FitOptions) -> optax.GradientTransformation:
    """The one optimiser, with the durations and rates of `options`."""
    return make_optimizer(
        learning_rate=options.learning_rate, steps=options.steps, warmup=options.warmup,
        weight_decay=options.weight_decay, clip=options.clip,
    )  # fmt: skip


def begin(options: FitOptions, params: PyTree) -> TrainState:
    """The state of step 0: parameters, their average (a copy), and a fresh optimiser."""
    tx = optimizer_of(options)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), tx.init(params))


def compiled_step(stage: Stage, options: FitOptions, mesh: Mesh, placed: PyTree, batch: PyTree):
    """(step, shardings of `stage.frozen`, shardings of the batch): `make_step` jitted on `mesh`, its state
    donated. placed: shardings of the state. Raises InputError for a batch that does not fit the mesh."""
    on_batch = meshes.batch_shardings(batch, mesh)
    on_frozen = meshes.shardings(stage.frozen, mesh, stage.rules, strict=False)
    step = jax.jit(
        make_step(stage, options, optimizer_of(options), meshes.gathered((placed.params, on_frozen))),
        in_shardings=(placed, on_frozen, on_batch),
        out_shardings=(placed, NamedSharding(mesh, meshes.P())),
        donate_argnums=0,
    )
    return step, on_frozen, on_batch


def fit(
    stage: Stage,
    workdir: Path | str,
    options: FitOptions,
    *,
    mesh: Mesh | None = None,
    init_from: PyTree | None = None,
) -> TrainState:
    """Train `stage` to `options.steps`, resuming from `workdir` if it holds a checkpoint.

    init_from: parameters to start from instead of `stage.init` (the stage before, say); a checkpoint in
    `workdir` goes before it. Returns the final state; a finished run returns at once.

    Raises InputError for a batch that does not fit the mesh or microbatches, and for a checkpoint of
    another model, or where none can be read. NonFiniteLoss names the first bad step, whose checkpoint is
    never written. Preempted at SIGTERM, under `preemption.listen`, when the step is saved.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = mesh or meshes.make_mesh()

    # 1. State: shapes, then shardings, then values; parameters are born sharded.
    def init(params: PyTree) -> TrainState:
        return begin(options, params)

    key = jax.random.key(options.seed)
    shapes = jax.eval_shape(lambda: init(stage.init(key)))
    placed = meshes.shardings(shapes, mesh, stage.rules)
    checkpoints = Checkpoints(
        workdir / "checkpoints", card=stage.card, keep=options.keep, every=options.save_every
    )
    state = checkpoints.newest(abstract_like(shapes, placed))
    if state is not None:  # own checkpoint > init_from > scratch
        print(f"{stage.name}: resumed at step {int(state.step)}", flush=True)
    elif init_from is not None:
        state = jax.jit(init, out_shardings=placed)(init_from)
    else:
        state = jax.jit(lambda: init(stage.init(key)), out_shardings=placed)()
    start = int(state.step)
    if start >= options.steps:
        checkpoints.close()
        return state

    # 2. The step: compiled once for the shapes of the first batch, which is not drawn twice.
    batch = stage.batch(start, state.params)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if (rows // options.microbatches) * options.microbatches != rows:
        raise InputError(
            "microbatches",
            f"{options.microbatches} does not divide a batch of {rows}",
            "use a divisor",
        )
    step_fn, on_frozen, on_batch = compiled_step(stage, options, mesh, placed, batch)
    frozen = meshes.place(stage.frozen, on_frozen)
    traced = step_fn.trace(state, frozen, meshes.place(batch, on_batch))
    flops, peak = counted_flops(traced), peak_flops()
    step_fn = traced.lower().compile()  # here, where SIGTERM need not wait for it

    # Simulated CPU devices share one thread pool: programs that run ahead starve each other's collectives.
    in_step = jax.default_backend() == "cpu" and mesh.size > 1

    # 3. The loop. Order is fixed: batch of this step, step, log, save. Losses stay on the device
    # between log lines, so the host runs ahead and prepares the next batch meanwhile.
    log, progress = MetricLog(workdir, start), Progress(stage.name, options.steps, start)
    norm = jax.jit(optax.tree.norm)  # of the parameters, where it is logged: a pass over them all
    pending: list[tuple[int, dict]] = []
    clock, since = time.monotonic(), start
    # Whatever stops the run, what was being written is finished; SIGTERM waits for its step to be saved.
    with preemption.patience(), closing(log), closing(checkpoints), memory.kept() as look:
        for step in range(start, options.steps):
            if step > start:
                batch = stage.batch(step, state.params)
            state, metrics = step_fn(state, frozen, meshes.place(batch, on_batch))
            look(metrics)
            pending.append((step + 1, jax.block_until_ready(metrics) if in_step else metrics))
            last = step + 1 == options.steps
            stopping = preemption.due(every=min(8, options.log_every))  # a rollout is logged each step
            saving = last or stopping or (step + 1) % options.save_every == 0
            if saving or (step + 1) % options.log_every == 0:
                fetched = [(s, jax.device_get(m)) for s, m in pending]
                fetched[-1][1]["param_norm"] = float(norm(state.params))
                _stop_if_not_finite(stage.name, fetched, checkpoints.latest())
                seconds = (time.monotonic() - clock) / (step + 1 - since)
                row = {k: float(np.mean([m[k] for _, m in fetched])) for k in pending[0][1]}
                row |= {"param_norm": fetched[-1][1]["param_norm"]}
                row |= {"steps_per_s": 1 / seconds, "examples_per_s": rows / seconds}
                row |= {"flop_per_s": flops / seconds} | ({"mfu": flops / seconds / peak} if peak else {})
                log.write(step + 1, row)
                mfu = f" mfu {row['mfu']:.1%}" if peak else ""
                text = f"loss {row['loss']:.4f} {1 / seconds:.2f} steps/s {rows / seconds:.0f} ex/s"
                progress(step + 1, f"{text} {flops / seconds / 1e9:.1f} GFLOP/s{mfu}")
                pending, clock, since = [], time.monotonic(), step + 1
            if saving:
                checkpoints.save(step + 1, state)
            if stopping:
                print(f"{stage.name}: SIGTERM, saved at step {step + 1}", flush=True)
                break
    return state


def _stop_if_not_finite(name: str, fetched: list[tuple[int, dict]], latest: int | None) -> None:
    for step, metrics in fetched:
        bad = [k for k, v in metrics.items() if not np.isfinite(v)]
        if bad:
            where = f"restart from step {latest}" if latest is not None else "no checkpoint yet"
            raise NonFiniteLoss(
                f"{name}: {bad[0]} is not finite at step {step} ({where}); lower the learning rate"
            )
