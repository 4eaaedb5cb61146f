"""Report on a run: python -m experiments.report --workdir=runs/x

Reads workdir/results.jsonl (and config.json, checkpoints.jsonl, the training logs and the predictors'
reports where they are), prints the tables and the verdicts, and writes report.html and frontier.png beside
them. A run whose evaluation is still going on can be reported; methods that lack seeds are named.

    --save=experiments/results/NAME.jsonl      also packs what the report reads into one small file
    --results=experiments/results/NAME.jsonl   reads such a file and no run; writes the page into --workdir,
                                               if that is given
"""

from __future__ import annotations

from pathlib import Path

from experiments import fanout_report, fanout_rows, report_page
from experiments.command import launch
from experiments.packed import read_packed, save_packed
from experiments.report_rows import read_run
from experiments.report_tables import text_report
from genret.types import InputError


def main(workdir: Path | None, save: str, results: str) -> None:
    """Print the report of a run or of a packed file, and write its page."""
    if workdir is None and not results:
        raise InputError("--workdir", "is not given", "give the folder of a run, or --results=FILE")
    if save and results:
        raise InputError("--save", "packs a run, and --results is one packed already", "give one of them")
    source = Path(results) if results else workdir
    if fanout_rows.is_fanout(source):
        found = fanout_rows.read_fanouts(source)
        print(fanout_report.text_report(found))
        if save:
            print(f"\n{fanout_rows.save_fanouts(found, Path(save))}")
        if workdir is not None:
            print(f"\n{fanout_report.write(workdir, found)}")
        return
    r = read_packed(Path(results)) if results else read_run(workdir)
    print(text_report(r))
    if save:
        print(f"\n{save_packed(r, Path(save))}")
    if workdir is not None:
        print(f"\n{report_page.write(workdir, r)}")


if __name__ == "__main__":
    launch(
        main,
        config=False,
        workdir=False,
        alone=True,
        save=("", "Pack what the report reads into this file."),
        results=("", "Read this packed file, and no run."),
    )
