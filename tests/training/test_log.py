"""What people read while a run is on."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from genret.training import log
from genret.training.mesh import make_mesh


def test_durations():
    assert [log.duration(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_plain_lines_say_step_rate_and_eta(capsys, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    log.Progress("sft", 100)(25, "loss 0.5")
    assert capsys.readouterr().out == "sft 25/100 loss 0.5 eta 0:30\n"


def test_plain_lines_keep_their_distance(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 7.0, 8.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    progress = log.Progress("moses", 4, apart=5.0)
    for done in (1, 2, 3, 4):
        progress(done)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/4", "3/4", "4/4"]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = log.Progress("sft", 4)
    progress(2, "loss 0.5")
    progress(4, "loss 0.4")
    err = capsys.readouterr().err
    assert "[############            ] sft 2/4 loss 0.5" in err
    assert err.endswith("\n") and err.count("\n") == 1


def test_rows_after_the_restart_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "l'
    )
    writer = log.MetricLog(tmp_path, start=2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    rows = [json.loads(r) for r in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 1.0), (3, 0.5)]


@pytest.mark.parametrize(
    "kind, peak", [("NVIDIA H100 80GB HBM3", 9.89e14), ("TPU v5 lite", 1.97e14), ("cpu", None)]
)
def test_peak_is_known_for_known_chips_only(monkeypatch, kind, peak):
    class Device:
        device_kind = kind

    monkeypatch.setattr(log.jax, "devices", lambda: [Device()])
    monkeypatch.setattr(log.jax, "device_count", lambda: 1)
    assert log.peak_flops() == peak


@pytest.mark.parametrize(("added", "best"), [(0.75, 2 * 4 * 1024), (0.25, 4 * 4 * 1024)])
def test_memory_bandwidth_is_that_of_the_fastest_of_three(monkeypatch, added, best):
    # 1,024 floats of four bytes each, read and written, in one second at best; then read alone.
    clock = iter([0.0, 2.0, 2.0, 3.0, 3.0, 7.0] + [8.0, 9.0, 10.0, 10.0 + added, 12.0, 13.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    assert log.memory_bandwidth.__wrapped__(1024) == best
    assert not list(clock)


def test_matmul_flops_are_those_of_the_fastest_of_three(monkeypatch):
    # Three products take 2, 1 and 4 seconds: 2 · 64³ multiplications and additions in the best of them.
    clock = iter([0.0, 2.0, 2.0, 3.0, 3.0, 7.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    assert log.matmul_flops.__wrapped__(64) == 2 * 64**3
    assert not list(clock)


def test_tensorboard_gets_every_row_at_once_whatever_the_clock_says(tmp_path, monkeypatch):
    """Read back as TensorBoard does: records of a length, a checksum, an event and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setattr(log.time, "time", iter([4e9, 4e9, 3e9, 2e9, 1e9, 0.0, 5e9]).__next__)
    metrics = log.MetricLog(tmp_path, 2)
    metrics.write(3, {"loss": 0.5, "validation joint": 0.25})
    metrics.write(4, {"loss": 0.125})
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    metrics.close()
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (3, 1)  # START: rows from 3 on are new
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]
    assert found == [(3, {"loss": 0.5, "validation joint": 0.25}), (4, {"loss": 0.125})]


def test_products_are_counted_as_often_as_they_run():
    x, w, wide = jnp.zeros((8, 4)), jnp.zeros((4, 4)), jnp.zeros((4, 5))
    one = 2 * 8 * 4 * 4
    mesh = make_mesh(8, 1, 1)
    split = jax.shard_map(lambda x: x @ w, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    cases = {
        "plain": (lambda x: jnp.sin(x @ w) * 2, one),
        "batched": (lambda x: jnp.einsum("abc,abd->acd", x.reshape(2, 4, 4), x.reshape(2, 4, 4)), one),
        "scan": (lambda x: jax.lax.scan(lambda c, _: (c @ w, c), x, None, length=7)[0], 7 * one),
        "map in a jit": (lambda x: jax.jit(lambda x: jax.lax.map(lambda r: r @ w, x))(x), one),
        "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: (x @ w).sum(), lambda x: (x @ wide).sum(), x),
                 2 * 8 * 4 * 5),
        "while": (lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w, x), one),
        "shard_map": (split, one),
        "remat": (jax.grad(lambda x: (jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x)).sum()),
                  6 * one),
    }  # fmt: skip
    for name, (function, expected) in cases.items():
        assert log.counted_flops(jax.jit(function).trace(x)) == expected, name
