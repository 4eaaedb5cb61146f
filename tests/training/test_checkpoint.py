"""Checkpoints that are damaged or do not fit on the disk: back to the last good one, nothing destroyed."""

import shutil
import subprocess
import time

import jax
import pytest

from genret.training import checkpoint
from genret.types import InputError


def bits(state):
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def cut(step):
    """The biggest file of a checkpoint loses its second half."""
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("damage", [cut, lambda step: shutil.rmtree(step / "card"), shutil.rmtree])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_serves(
    toy, undisturbed, tmp_path, capsys, damage
):
    shutil.copytree(undisturbed[1], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "8")
    assert bits(toy.fit(tmp_path / "run")) == bits(undisturbed[0])
    said, aside = capsys.readouterr().out, list((tmp_path / "run").glob("damaged_8_*"))
    assert "toy: resumed at step 6" in said
    assert len(aside) == (damage is not shutil.rmtree) == said.count("cannot be read, back to step 6")
    assert all(contents(folder) for folder in aside)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["6", "8"]


def test_where_none_can_be_read_all_stay_where_they_are(toy, undisturbed, tmp_path):
    shutil.copytree(undisturbed[1], tmp_path / "run")
    for step in (6, 8):
        cut(tmp_path / "run" / "checkpoints" / str(step))
    before = contents(tmp_path / "run")
    with pytest.raises(
        InputError, match="^checkpoint: none in .* can be read .step 8: .*move the folder away"
    ):
        toy.fit(tmp_path / "run")
    with pytest.raises(InputError, match="this run has width=9"):  # nor does a foreign one lose anything
        shutil.copytree(undisturbed[1], tmp_path / "foreign")
        toy.fit(tmp_path / "foreign", card={"width": 9})
    assert contents(tmp_path / "run") == before
    assert contents(tmp_path / "foreign") == contents(undisturbed[1])


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: Out of memory", "Too many open files: data/0"])
def test_where_the_machine_cannot_read_just_now_nothing_is_moved(
    toy, undisturbed, tmp_path, monkeypatch, said
):
    def fails(*_):
        raise ValueError(said)

    shutil.copytree(undisturbed[1], tmp_path / "run")
    monkeypatch.setattr(checkpoint.Checkpoints, "_restore", fails)
    with pytest.raises(InputError, match=f"8 could not be read now .{said}.*nothing is moved"):
        toy.fit(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(undisturbed[1])


def test_one_process_of_several_does_not_go_back_by_itself(tmp_path, monkeypatch):
    """The others may have read the step that it cannot, and would wait for it there."""
    checkpoint._only_damage(ValueError("cut short"), tmp_path / "8")
    monkeypatch.setattr(checkpoint.processes, "several", lambda: True)
    with pytest.raises(InputError, match="8 cannot be read .cut short.. start one process alone"):
        checkpoint._only_damage(ValueError("cut short"), tmp_path / "8")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory; called with a size, it grows."""

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", tmp_path]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("700k"):
        pytest.skip("mounting is not permitted here")
    yield lambda size: mount(size, "remount")
    # Lazily: threads of the write that failed may still hold a file open.
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_is_named_and_room_lets_the_run_go_on(toy, tmp_path, small_disk, tmp_path_factory):
    """64 KiB a copy, four copies in a checkpoint: the third does not fit."""
    toy.width = 128
    with pytest.raises(OSError, match="No space left on device"):
        toy.fit(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]")) == ["3", "6"]
    assert small_disk("64m")
    assert bits(toy.fit(tmp_path / "run")) == bits(toy.fit(tmp_path_factory.mktemp("roomy")))


def test_a_clock_that_jumps_changes_nothing(toy, undisturbed, tmp_path, monkeypatch, capsys):
    """A day ahead, then a week back. Orbax waits by that clock: a writer given up is one clear error."""
    real, offset, jumps = time.time, [0.0], {4: 86400.0, 7: -604800.0}
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def jump(step):
        offset[0] = jumps.pop(step, offset[0])

    for _ in range(3):
        try:
            state = toy.fit(tmp_path, jump)
            break
        except OSError as error:
            assert "a clock that jumped" in str(error)
    assert bits(state) == bits(undisturbed[0])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
    lines = [line for line in capsys.readouterr().out.splitlines() if " eta " in line]
    assert lines and not any("-" in line for line in lines)
    assert all(line.split(" eta ")[1].startswith("0:") for line in lines)


def test_a_writer_that_the_clock_cut_off_is_one_error_and_loses_nothing(
    toy, undisturbed, tmp_path, monkeypatch
):
    """The clock goes a week ahead at every question, so no writer is in time."""
    real, calls = time.time, []
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: real() + 604800.0 * (calls.append(1) or len(calls)))
        with pytest.raises(OSError, match="a clock that jumped"):
            toy.fit(tmp_path)
    assert bits(toy.fit(tmp_path)) == bits(undisturbed[0])
