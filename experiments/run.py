"""Train a configuration: python -m experiments.run --config=experiments/configs/modit.py --workdir=runs/x

A run that is interrupted continues where it stopped; a finished one returns at once. SIGTERM saves the step
it is at and ends with status 0.
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments import r4t
from experiments.catalogues import open_catalogue
from experiments.checks import check
from experiments.command import launch
from experiments.modit import open_run
from experiments.workdir import alone, same_run
from genret.training.memory import peak


def main(config: ConfigDict, workdir: Path) -> None:
    """Every seed of `config`, one after the other."""
    with alone(workdir, "run"):
        _train(config, workdir)
    print(peak(), flush=True)


def _train(config: ConfigDict, workdir: Path) -> None:
    if "fanout" in config:
        for run in r4t.open_runs(config, workdir):
            run.train()
        return
    check(config)
    catalogue = open_catalogue(config.catalogue)
    same_run(config, catalogue.arrays, workdir)
    print(
        f"{catalogue.name}: {catalogue.num_items} items x {catalogue.width}, "
        f"{catalogue.num_patterns} patterns, attributes {', '.join(catalogue.attribute_names)}; "
        f"{jax.device_count()} {jax.default_backend()} device(s)",
        flush=True,
    )
    for seed in config.seeds:
        open_run(config, workdir, seed, catalogue).train()


if __name__ == "__main__":
    launch(main)
