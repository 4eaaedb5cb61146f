"""What every command shares: its flags, quiet logs, and errors said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from genret.types import InputError

DEFINE = {
    bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string,
}  # fmt: skip


def launch(
    main: Callable[..., None], *, config: bool = True, workdir: bool | None = True, **options: tuple[Any, str]
) -> None:
    """Run main(config, workdir), or main(workdir) for a command that reads no config, under absl.

    workdir: whether it must be given, where it is None otherwise; None: the command has none. options: more
    flags of the command, each a (default, help), given to main by name. An InputError ends with its message
    and exit status 1.
    """
    configs = config and config_flags.DEFINE_config_file(
        "config", None, "A file of experiments/configs.", lock_config=True
    )
    folder = workdir is not None and flags.DEFINE_string("workdir", None, "The folder of the run.")
    more = {n: DEFINE[type(default)](n, default, said) for n, (default, said) in options.items()}

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a checkpoint
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]}")
        # Stages of one run share most of their kernels, and a second run shares all of them.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").resolve()))
        given = [configs.value] if config else []
        if workdir is not None:
            given.append(None if folder.value is None else Path(folder.value))
        try:
            main(*given, **{n: flag.value for n, flag in more.items()})
        except InputError as error:
            raise SystemExit(f"error: {error}") from None

    flags.mark_flags_as_required(["config"] * config + ["workdir"] * bool(workdir))
    app.run(run)
