"""Export a trained retriever: python -m experiments.export --config=... --workdir=runs/x --output=artifact

Writes one folder that needs neither genret nor flax, only jax and numpy (and flatbuffers, with which
jax.export reads programs). A folder, not an archive: its serve.py runs and its card.md is read in place.

    query.bin         StableHLO of the one-call query for cpu, cuda and tpu, any batch (sets.bin: of the sets)
    parameters*.npz   what the program reads beside its input: network, metric predictor, space, settings
    card.json, .md    attributes in order, shapes, protocol, settings, figures, versions
    serve.py          ranks the rows of an .npy file for a seed set

MO-DiT+HPPO is exported with the settings that validation chose, as results.jsonl has them: round, guidance
and reach per attribute, of the contexts of --split. Guidance and reach are parameters; attributes of several
rounds have several files of parameters, and card.json says whose is which. An R4T run exports its diffusion,
drawn by the last sampler of evaluation.few without guidance.

    --seed=1              another seed than 0
    --split=item_holdout  the settings for patterns that training saw; default: pattern_holdout, new ones
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import genret
from experiments import r4t, serve, serve_sets
from experiments.catalogues import open_catalogue
from experiments.command import launch
from experiments.fanouts import few_calls
from experiments.modit import Run, open_run
from experiments.programs import (
    PLATFORMS,
    Program,
    flat,
    lowered,
    query_program,
    set_program,
    space_arrays,
)  # fmt: skip
from experiments.report_rows import HEADLINE, portable
from experiments.workdir import read_rows, same_run
from genret.diffusion.retriever import Retriever
from genret.modit.density import DensityMLP, predictor_card
from genret.modit.protocol import SPLITS
from genret.r4t.fanout import network_calls
from genret.training.checkpoint import restore_params
from genret.types import InputError

FIGURES = ("joint", "attribute", "purity", "headroom", "normalised_joint", "contexts", "patterns", "calls")
SET_FIGURES = ("composite", "relevant", "groundedness", "diversity", "alignment", "recall", "calls")
TRAIN = "run experiments.run with the same --config and --workdir first"
EVALUATE = "run experiments.evaluate with the same --config and --workdir first"


@dataclass(frozen=True)
class Artifact:
    """What is written. card: what this model is. inputs: (shape, dtype) by name, as `lowered` takes them.
    parameters: file -> arrays by name. server: becomes serve.py."""

    kind: str
    card: dict[str, Any]
    inputs: dict[str, tuple[tuple, str]]
    program: Program
    parameters: dict[str, dict[str, np.ndarray]]
    server: Path

    @property
    def whole_card(self) -> dict[str, Any]:
        """`card`, and what every export says; two exports are the same where this is."""
        shapes = {n: {"shape": list(shape), "dtype": dtype} for n, (shape, dtype) in self.inputs.items()}
        versions = {"genret": genret.__version__} | {name: version(name) for name in ("jax", "numpy")}
        made = {"genret": "export", "version": 2, "kind": self.kind, "inputs": shapes} | self.card
        made |= {"platforms": PLATFORMS, "versions": versions}
        made["checksums"] = {file: _checksum(arrays) for file, arrays in self.parameters.items()}
        return json.loads(json.dumps(made))

    def write(self, output: Path) -> bool:
        """The whole folder or nothing; False where it is there already.

        Raises InputError where `output` holds anything else, or cannot be written.
        """
        card = self.whole_card
        found = existing(output)
        if found is not None:
            if found != card:
                raise InputError("--output", f"{output} holds another export", "choose another --output")
            return False
        program = lowered(self.program, next(iter(self.parameters.values())), *self.inputs.values())
        temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.mkdir(parents=True)
            (temporary / f"{self.kind}.bin").write_bytes(program)
            for file, arrays in self.parameters.items():
                np.savez(temporary / file, **arrays)
            (temporary / "card.json").write_text(json.dumps(card, indent=1))
            (temporary / "card.md").write_text(readable(card))
            shutil.copyfile(self.server, temporary / "serve.py")
            os.replace(temporary, output)
        except OSError as error:
            problem = f"{output} cannot be written ({error.strerror})"
            raise InputError("--output", problem, "choose another --output") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True


def existing(output: Path) -> dict[str, Any] | None:
    """The card of the export that `output` holds, None where there is nothing; raises InputError where it
    holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        return json.loads((output / "card.json").read_text())
    except (OSError, ValueError):
        raise InputError("--output", f"{output} is no export", "choose another --output") from None


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of names and values."""
    code = 0
    for name, values in sorted(arrays.items()):
        code = zlib.crc32(np.ascontiguousarray(values), zlib.crc32(name.encode(), code))
    return code


def _anywhere(retriever: Retriever) -> Retriever:
    """The same network, its attention lowered for any platform."""
    return replace(retriever, model=retriever.model.clone(attention=None))


def chosen(rows: list[dict[str, Any]], split: str, attributes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """attribute -> {"round", "guidance", "reach"} that validation chose for `split`.

    rows: of MO-DiT+HPPO, one seed. Raises InputError where a row is missing or has no such setting.
    """
    found = {}
    for name in attributes:
        row = next((r for r in rows if (r.get("split"), r.get("domain")) == (split, name)), None)
        if row is None:
            raise InputError("--workdir", f"no row of {HEADLINE} on {split}/{name}", EVALUATE)
        try:
            step, guidance, reach = row["setting"]
            found[name] = {"round": int(step), "guidance": float(guidance), "reach": float(reach)}
        except (KeyError, TypeError, ValueError):
            problem = f"the row of {HEADLINE} on {split}/{name} has no round, guidance and reach"
            raise InputError("--workdir", problem, "evaluate again in a new --workdir") from None
    return found


def query_artifact(run: Run, rows: list[dict[str, Any]], split: str) -> Artifact:
    """The one-call query of one seed, with the settings that validation chose for `split`.

    rows: of MO-DiT+HPPO, that seed. Raises InputError as `chosen`, and for a checkpoint that is not there.
    """
    catalogue, c, names = run.catalogue, run.config, run.catalogue.attribute_names
    settings = {s: chosen(rows, s, names) for s in SPLITS}
    own, labels = settings[split], run.fitted.labels
    predictor = DensityMLP(catalogue.num_domains)
    fitted = restore_params(
        run.folder / "predictor" / "checkpoints",
        jax.eval_shape(predictor.init, jax.random.key(0), jnp.zeros((1, catalogue.width)))["params"],
        card=predictor_card(catalogue, labels),
    )
    shared = {n: np.float32([own[name][n] for name in names]) for n in ("guidance", "reach")}
    models = {n: run.model("hppo", n) for n in sorted({s["round"] for s in own.values()})}
    parameters = {
        f"parameters_{n}.npz": flat(network=m.params, predictor=fitted, space=space_arrays(m.space), **shared)
        for n, m in models.items()
    }
    guided, s, width = bool(shared["guidance"].any()), c.evaluation.seeds, catalogue.width
    inputs = {
        "seeds": (("batch", s, width), "float32"),
        "mask": (("batch", s), "bool"),
        "domain": (("batch",), "int32"),
    }
    e, d = c.evaluation, c.catalogue
    card = {
        "outputs": {"query": {"shape": ["batch", width], "dtype": "float32"}},
        "network_calls": 1 + guided,
        "attributes": names,
        "split": split,
        "parameters": {name: f"parameters_{own[name]['round']}.npz" for name in names},
        "settings": settings,
        "figures": [{n: row.get(n) for n in ("split", "domain", *FIGURES)} for row in rows],
        "protocol": {
            "catalogue": catalogue.name, "items": catalogue.num_items, "seed": run.seed, "k": e.k,
            "splits": f"{d.pattern_fraction} of the patterns, and {d.item_fraction} of the items of the "
            f"others, held out by seed {d.seed} where the catalogue's split column does not say",
            "contexts": f"{e.least_seeds} to {e.seeds} held-out items of one pattern that lack the "
            "attribute; the full corpus ranked, seeds left out",
            "label_budget": c.labels.budget, "probes": len(labels.probes), "lookups": labels.lookups,
        },
        "config": portable(json.loads(c.to_json_best_effort())),
    }  # fmt: skip
    centred = run.space("hppo").centred
    program = query_program(_anywhere(run.retriever), predictor, centred=centred, guided=guided)
    return Artifact("query", card, inputs, program, parameters, Path(serve.__file__))


def set_artifact(run: r4t.FanoutRun, rows: list[dict[str, Any]]) -> Artifact:
    """The set diffusion of one seed, drawn by the last sampler of evaluation.few.

    rows: of that seed. Raises InputError where none is of this sampler, or the model is not trained.
    """
    c, e = run.config, run.config.evaluation
    if not (few := few_calls(e.few)):
        raise InputError("evaluation.few", "names no sampler to export", "give one, and evaluate it")
    name, method, steps = few[-1]
    levels = tuple(e.levels)
    row = next((r for r in rows if r.get("method") == name), None)
    if row is None:
        raise InputError("--workdir", f"no row of {name}", EVALUATE)
    model, width = run.model("diffusion"), run.data.width
    # Rows that are chosen by where they land leave the program: the server holds the contents.
    grounded = run.data.references is None and model.rows > c.k
    emitted = model.rows if grounded else c.k
    card = {
        "outputs": {"sets": {"shape": ["batch", emitted, width], "dtype": "float32"}},
        "network_calls": network_calls(method, steps),
        "settings": {
            "sampler": method, "steps": steps, "levels": levels, "guidance": 0.0, "rows": model.rows,
            "kept": c.k, "grounded": e.grounded if grounded else None,
        },
        "figures": [{n: row[n] for n in ("method", *SET_FIGURES) if n in row}],
        "protocol": {
            "data": run.data.name, "contents": len(run.data.contents), "seed": run.seed, "k": c.k,
            "test_queries": row.get("queries"),
        },
        "config": portable(json.loads(c.to_json_best_effort())),
    }  # fmt: skip
    program = set_program(
        _anywhere(model.retriever), centred=model.space.centred, rows=model.rows, k=emitted, method=method,
        steps=steps, levels=levels,
    )  # fmt: skip
    inputs = {"query": (("batch", width), "float32"), "seed": ((), "uint32")}
    parameters = {"parameters.npz": flat(network=model.params, space=space_arrays(model.space))}
    return Artifact("sets", card, inputs, program, parameters, Path(serve_sets.__file__))


def readable(card: dict[str, Any]) -> str:
    """card.json for people, in Markdown."""

    def shape(x: dict[str, Any]) -> str:
        return f"{x['dtype']}[{', '.join(map(str, x['shape']))}]"

    def table(rows: list[dict[str, Any]]) -> list[str]:
        names = list(rows[0])
        cells = [names, ["---"] * len(names), *([row[n] for n in names] for row in rows)]
        return [f"| {' | '.join(map(str, line))} |" for line in cells] + [""]

    lines = [f"# An exported genret retriever: {card['kind']}", ""]
    lines += ["`python serve.py` says how it is asked; it needs jax, numpy and flatbuffers.", ""]
    arrays = [("in", card["inputs"]), ("out", card["outputs"])]
    lines += table(
        [{"": way, "array": n, "type": shape(x)} for way, group in arrays for n, x in group.items()]
    )
    if card["kind"] == "query":
        numbers = ", ".join(f"{i} {n}" for i, n in enumerate(card["attributes"]))
        said = "seeds: unit-norm rows in any order; mask: which are there; domain: number of the attribute"
        lines += [f"{said}, {numbers}.", ""]
        lines += [f"The settings that validation chose; those of {card['split']} are the ones exported.", ""]
        lines += table(
            [
                {
                    "split": split,
                    "attribute": n,
                    **s,
                    "parameters": card["parameters"][n] * (split == card["split"]),
                }
                for split, of in card["settings"].items()
                for n, s in of.items()
            ]
        )
    else:
        lines += ["query: unit-norm rows; seed: of the draw.", "", *table([card["settings"]])]
    lines += [f"Network calls per batch: {card['network_calls']}. On test:", "", *table(card["figures"])]
    lines += table([{"protocol": n, "": v} for n, v in card["protocol"].items()])
    lines += table([{"version of": n, "": v} for n, v in card["versions"].items()])
    return "\n".join(lines)


def main(config: ConfigDict, workdir: Path, seed: int, output: str, split: str) -> None:
    """Export one seed of a run to the folder `output`."""
    if not output:
        raise InputError("--output", "is not given", "name the folder to write")
    if "fanout" in config and split:
        raise InputError("--split", "is of MO-DiT's settings", "leave it out for R4T")
    split = split or "pattern_holdout"
    if split not in SPLITS:
        raise InputError("--split", f"unknown split {split!r}", f"use {' or '.join(SPLITS)}")
    target = Path(output).resolve()
    existing(target)  # whatever else is in its place is said before anything is opened
    if not (workdir / f"seed_{seed}" / "trained").exists():
        raise InputError("--workdir", f"seed {seed} of {workdir} is not trained", TRAIN)
    rows = [row for row in read_rows(workdir / "results.jsonl") if row.get("seed") == seed]
    if not rows:
        raise InputError("--workdir", f"seed {seed} of {workdir} is not evaluated", EVALUATE)
    config = config.copy_and_resolve_references()
    config.seeds = (seed,)
    if "fanout" in config:
        made = set_artifact(next(r4t.open_runs(config, workdir)), rows)
    else:
        rows = [row for row in rows if row.get("method") == HEADLINE]
        if not rows:
            raise InputError("--workdir", f"seed {seed} has no row of {HEADLINE}", EVALUATE)
        catalogue = open_catalogue(config.catalogue)
        same_run(config, catalogue.arrays, workdir)
        made = query_artifact(open_run(config, workdir, seed, catalogue), rows, split)
    written = made.write(target)
    print(f"{target.name}: {'written' if written else 'there already'}, {readable_size(target)}")


def readable_size(folder: Path) -> str:
    """What the files of a folder take."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB"


if __name__ == "__main__":
    launch(
        main,
        alone=True,
        seed=(0, "The seed to export."),
        output=("", "The folder to write."),
        split=("", "Whose settings to export: pattern_holdout, which is the default, or item_holdout."),
    )
