"""What every command shares: its flags, quiet logs, and errors said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from genret.types import InputError


def launch(main: Callable[..., None], *, config: bool = True) -> None:
    """Run main(config, workdir), or main(workdir) for a command that reads no config, under absl.

    An InputError ends with its message and exit status 1.
    """
    configs = config and config_flags.DEFINE_config_file(
        "config", None, "A file of experiments/configs.", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "The folder of the run.")

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a checkpoint
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]}")
        # Stages of one run share most of their kernels, and a second run shares all of them.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").resolve()))
        try:
            main(*([configs.value] if config else []), Path(workdir.value))
        except InputError as error:
            raise SystemExit(f"error: {error}") from None

    flags.mark_flags_as_required(["config", "workdir"] if config else ["workdir"])
    app.run(run)
