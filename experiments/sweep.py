"""Print a grid as commands, one a line: python -m experiments.sweep --config=experiments/configs/sweep.py

The lines are for a shell or a scheduler; nothing is run here. --workdir is where the runs' folders go (runs).
"""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from experiments.command import launch
from genret.types import InputError


def commands(config: ConfigDict, folder: Path) -> list[str]:
    """A line for every combination of the grid, the last axis fastest.

    An axis whose name begins with `config.` is an override, any other an argument of the configuration.
    Raises InputError for an axis without values or named twice, and where two runs would share a folder.
    """
    names = [name for name, _ in config.grid]
    for name, values in config.grid:
        if names.count(name) > 1 or not len(values):
            problem = "is an axis twice" if names.count(name) > 1 else "has no values"
            raise InputError("grid", f"{name} {problem}", "write (name, (value, ...)) once for each")
    try:
        launcher = shlex.split(config.launcher)
    except ValueError as error:
        raise InputError("launcher", f"{config.launcher!r}: {error}", "close what was opened") from None
    lines: dict[str, str] = {}
    for point in itertools.product(*(values for _, values in config.grid)):
        argument, overrides, folder_name = config.config, [], [Path(config.config.partition(":")[0]).stem]
        for name, value in zip(names, point, strict=True):
            if name.startswith("config."):
                overrides.append(f"--{name}={value}")
            else:
                argument += f"{',' if ':' in argument else ':'}{name}={value}"
            folder_name.append(f"{name.rpartition('.')[2]}={value}")
        run = re.sub(r"[^\w.=+-]+", "-", "_".join(folder_name))
        if run in lines:
            raise InputError("grid", f"two points are called {run}", "leave one out")
        lines[run] = shlex.join([*launcher, argument, str(folder / run), *overrides])
    return list(lines.values())


def main(config: ConfigDict, workdir: Path | None) -> None:
    """Print the lines of `config`."""
    print("\n".join(commands(config, workdir or Path("runs"))))


if __name__ == "__main__":
    launch(main, workdir=False, alone=True)
