"""What every command shares: its flags, quiet logs, errors said in one line, and many processes as one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.workdir import apart, tells
from genret.training import preemption, processes
from genret.training.loop import NonFiniteLoss
from genret.training.memory import one_heap
from genret.training.watch import Watch
from genret.types import InputError

DEFINE = {
    bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string,
}  # fmt: skip


def launch(
    main: Callable[..., None],
    *,
    config: bool = True,
    workdir: bool | None = True,
    alone: bool = False,
    **options: tuple[Any, str],
) -> None:
    """Run main(config, workdir), or main(workdir) for a command that reads no config, under absl.

    workdir: whether it must be given, where it is None otherwise; None: the command has none. alone: under
    --multihost process 0 does it by itself; else all do it together, and process 0 writes and speaks.
    options: more flags of the command, each a (default, help), given to main by name. An InputError, a full
    disk and a loss that leaves the finite numbers end with one line and exit status 1, a lost process with
    `processes.AGAIN`; SIGTERM with one line, and the status of `preemption.status`.
    """
    configs = config and config_flags.DEFINE_config_file(
        "config", None, "A file of experiments/configs.", lock_config=True
    )
    folder = workdir is not None and flags.DEFINE_string("workdir", None, "The folder of the run.")
    place = _multihost_flags()
    more = {n: DEFINE[type(default)](n, default, said) for n, (default, said) in options.items()}

    def run(argv: list[str]) -> None:
        one_heap()
        logging.set_verbosity(logging.FATAL)  # Orbax tells twenty lines a checkpoint, and pages of an error
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]}")
        # Stages of one run share most of their kernels, and a second run shares all of them.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").resolve()))
        given = [configs.value] if config else []
        if config:
            tell_overrides(configs.value, config_flags.get_override_values(flags.FLAGS["config"]))
        if workdir is not None:
            given.append(None if folder.value is None else Path(folder.value))
        if not alone:  # those that go on where they were
            preemption.listen()
        sys.unraisablehook = _unless_abandoned(sys.__unraisablehook__)
        threading.excepthook = _unless_abandoned(threading.__excepthook__)
        try:
            multihost, *where = (flag.value for flag in place)
            if multihost and workdir is not None and given[-1] is not None:
                apart(given[-1], Path(sys.argv[0]).stem, where[0])
            with (_by_one if alone else _joined)(multihost, *where):
                main(*given, **{n: flag.value for n, flag in more.items()})
            preemption.over()
        except preemption.Preempted as stop:
            status = preemption.status(told=True)
            preemption.over()
            print(stop, flush=True)
            if status:
                raise SystemExit(status) from None
        except BrokenPipeError:  # whoever reads has enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (InputError, NonFiniteLoss, OSError) as error:
            if said := one_line(error):
                raise SystemExit(f"error: {said}") from None
            raise

    flags.mark_flags_as_required(["config"] * config + ["workdir"] * bool(workdir))
    app.run(run)


def _unless_abandoned(show: Callable[[Any], None]) -> Callable[[Any], None]:
    """A hook for errors that reach no caller, without those of writes that Orbax gives up on a full disk (the
    main thread is told, and each of the others would print a traceback, before or after its line), and
    without a SIGTERM that met a `__del__`, which comes again."""

    def hook(found: Any) -> None:
        error = found.exc_value
        given_up = _is_full(error) or (type(error) is RuntimeError and str(error) == "Event loop is closed")
        if not given_up and not isinstance(error, preemption.Preempted):
            show(found)

    return hook


def regex(flag: str, pattern: str) -> re.Pattern:
    """Raises InputError for what is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        problem = f"{pattern!r} is no regular expression ({error})"
        raise InputError(flag, problem, "quote special characters") from error


def matching(flag: str, pattern: str, names: Iterable[str], of: str, more: str = "") -> list[str]:
    """The names in which the regular expression is found; of: what has them, a line, a stage, a method;
    more: added to the list of all.

    Raises InputError for what is none, and for one that is found nowhere.
    """
    wanted, names = regex(flag, pattern), list(names)
    found = [name for name in names if wanted.search(name)]
    if not found:
        raise InputError(flag, f"{pattern!r} is in no {of}'s name", f"use some of: {', '.join(names)}{more}")
    return found


def tell_overrides(config: ConfigDict, overrides: dict[str, Any]) -> None:
    """Adds to the config's `command` what `--config.LEAF=VALUE` gave, as far as it makes the run another."""
    parts = [f"--config.{leaf}={value}" for leaf, value in sorted(overrides.items()) if tells(leaf)]
    if "command" in config:
        config.command = " ".join([config.command, *map(shlex.quote, parts)])


def _multihost_flags() -> tuple[flags.FlagHolder, ...]:
    return (
        flags.DEFINE_bool("multihost", False, "Run as one of several processes that share --workdir."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX cannot ask the cluster."),
        flags.DEFINE_integer("process_id", None, "Which process this is, likewise."),
        flags.DEFINE_integer("num_processes", None, "How many there are, likewise."),
    )


_UNWRITABLE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def one_line(error: BaseException) -> str | None:
    """What to say of an error that is not the program's: input, disk, or another process; None of others."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        where = "" if error.filename is None else f"{error.filename}: "
        fix = "make room, and " if _is_full(error) else ""
        fix = "use a folder that can be written, and " if error.errno in _UNWRITABLE else fix
        return f"{where}{error.strerror or error}. {fix}start again: what is finished is kept"
    known = isinstance(error, InputError | NonFiniteLoss | processes.BarrierError)
    return str(error) if known else str(processes.lost(error) or "") or None


def _is_full(error: BaseException | None) -> bool:
    """Whether it says that there is no room; NumPy's have no errno."""
    return isinstance(error, OSError) and error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _of_several(multihost: bool, *place: Any) -> bool:
    for name, value in zip(("coordinator", "process_id", "num_processes"), place, strict=True):
        if value is not None and not multihost:
            raise InputError(f"--{name}", "is given for one process alone", "give --multihost too")
    return multihost


@contextlib.contextmanager
def _by_one(multihost: bool, *place: Any) -> Iterator[None]:
    """Process 0 of several goes on; the others end here, with status 0."""
    if _of_several(multihost, *place):
        goes_on, said = processes.alone(*place)
        print(said, flush=True)
        if not goes_on:
            raise SystemExit(0)
    yield


@contextlib.contextmanager
def _joined(multihost: bool, *place: Any) -> Iterator[None]:
    """Between joining the other processes and leaving them all together."""
    if not _of_several(multihost, *place):
        yield
        return
    print(processes.start(*place), flush=True)
    watch, status = Watch(), 0
    try:
        watch.begin()
        processes.same("command", Path(sys.argv[0]).stem)
        with contextlib.ExitStack() as quiet:
            if not processes.is_writer():
                sink = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(sink))
            try:
                yield
            except preemption.Preempted as stop:  # met by all at the same step
                status = preemption.status(preemption.came())
                preemption.over()
                print(stop, flush=True)
        processes.barrier("end")
        watch.ended()
    except BaseException as error:
        said = "nobody reads what is printed" if isinstance(error, BrokenPipeError) else one_line(error)
        met = processes.lost(error) is not None
        watch.fail(f"error: {said}" if said else traceback.format_exc(), lost=met)
    if status:
        raise SystemExit(status)
