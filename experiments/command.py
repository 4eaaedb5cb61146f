"""What every command shares: its two flags, quiet logs, and errors said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from genret.types import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of experiments/configs.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")


def launch(main: Callable[[ConfigDict, Path], None]) -> None:
    """Run main(config, workdir) under absl; an InputError ends with its message and exit status 1."""

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a checkpoint
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]}")
        # Stages of one run share most of their kernels, and a second run shares all of them.
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").resolve()))
        try:
            main(_CONFIG.value, Path(_WORKDIR.value))
        except InputError as error:
            raise SystemExit(f"error: {error}") from None

    flags.mark_flags_as_required(["config", "workdir"])
    app.run(run)
