"""A grid for experiments/sweep.py, to copy and edit: HPPO's margin and contexts, two seeds each.

python -m experiments.sweep --config=experiments/configs/sweep.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Each axis is (name, values): an argument of the configuration, or one of its leaves."""
    c = ConfigDict()
    c.launcher = "launch/local.sh"  # or sbatch --nodes=4 launch/slurm.sh
    c.config = "experiments/configs/modit.py:size=demo"
    c.grid = (
        ("seeds", (0, 1)),
        ("config.hppo.pairs.margin", (1, 2, 4)),
        ("config.hppo.contexts", (512, 1024)),
    )
    return c
