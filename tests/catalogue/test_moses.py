"""The MOSES builder on the published files, and the numbers it makes of a molecule."""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genret.catalogue import format, molecules, moses
from genret.catalogue.molecules import describe, fit_projection, map_chunks, project, scaffolds
from genret.catalogue.splits import make_splits
from genret.types import InputError
from tests.commands import ROOT

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
CAFFEINE = "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"
FAMOTIDINE = "N=C(CCSCc1csc(N=C(N)N)n1)NS(N)(=O)=O"


@pytest.fixture(scope="module")
def published():
    return moses.read_smiles()


@pytest.fixture(scope="module")
def build(published, tmp_path_factory):
    """`moses.build` of a named file, the published SMILES read once."""

    def build(name, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moses, "read_smiles", lambda: published)
            return moses.build(tmp_path_factory.mktemp("moses") / f"{name}.parquet", workers=2, **options)

    return build


@pytest.fixture(scope="module")
def cells(build):
    return build("cells", items=2000)


@pytest.fixture(scope="module")
def scaffold(build):
    return build("scaffold", items=1500, pattern="scaffold")


def columns(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path).to_pydict()
    return {name: np.array(values) for name, values in table.items()}


# ---- one molecule


def test_properties_of_known_molecules():
    """TPSA of aspirin by hand from Ertl's table: ester O 9.23, two =O 17.07, OH 20.23; Fsp3 by hand
    as well: 1 of 9, 3 of 8 and 3 of 8 carbons. Famotidine is the example of RDKit's QED
    documentation; the other values of logP and QED are RDKit's, as commonly quoted."""
    _, properties = describe([ASPIRIN, CAFFEINE, FAMOTIDINE])
    expected = [
        [1.310, 9.23 + 2 * 17.07 + 20.23, 1 / 9, 0.550],
        [-1.029, 61.82, 3 / 8, 0.538],
        [-0.558, 173.33, 3 / 8, 0.253],
    ]
    np.testing.assert_allclose(properties, expected, atol=1e-3)


def test_fingerprints():
    """Bit order against rdkit's own unpacked form; one molecule written in two ways is one."""
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    packed, _ = describe([ASPIRIN, "OC(=O)c1ccccc1OC(C)=O", CAFFEINE])
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    expected = morgan.GetFingerprintAsNumPy(Chem.MolFromSmiles(ASPIRIN))
    np.testing.assert_array_equal(bits[0], expected)
    np.testing.assert_array_equal(bits[0], bits[1])
    assert (bits[0] != bits[2]).any()


def test_no_molecule(tmp_path):
    packed, properties = describe(["not a molecule", "", ASPIRIN])
    assert np.isnan(properties[:2]).all() and np.isfinite(properties[2]).all()
    assert not packed[:2].any()
    with pytest.raises(InputError, match="'xx' is no molecule"):
        moses._describe([ASPIRIN, "xx"], tmp_path, 1, None)


def test_scaffolds_by_hand():
    """Rings and what links them: side chains go, an acyclic molecule has none."""
    got = scaffolds(["CCCc1ccccc1", "OC1CCN(Cc2ccccc2)CC1", "CCO", "xx"])
    assert got == ["c1ccccc1", "c1ccc(CN2CCCCC2)cc1", "", ""]


def test_labels_at_the_thresholds():
    got = moses._labels(np.array([[1.9, 77.0, 0.46, 0.87], [1.91, 76.9, 0.45, 0.869]]))
    for name in ("logp_low", "tpsa_high", "fsp3_high", "qed_high"):
        assert got[name].tolist() == [True, False], name


@pytest.mark.parametrize("workers", [1, 2])
def test_map_chunks_keeps_the_order(workers):
    seen = []
    smiles = ["C" * (i + 1) for i in range(25)] + ["c1ccccc1"]
    parts = [*map_chunks(scaffolds, smiles, workers=workers, chunk=10, progress=lambda *a: seen.append(a))]
    assert [len(part) for part in parts] == [10, 10, 6] and parts[-1][-1] == "c1ccccc1"
    assert seen == [(10, 26), (20, 26), (26, 26)]


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """They hold its stdout: it ends when the last of them does."""
    body = """
import os, signal
from genret.catalogue.molecules import map_chunks
if __name__ == "__main__":
    for _ in map_chunks(len, ["C"] * 40, workers=2, chunk=10):
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "killed.py").write_text(body)
    command = [sys.executable, str(tmp_path / "killed.py")]
    where = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, timeout=60, env=where)
    assert done.returncode == -signal.SIGKILL


def test_a_description_that_was_killed_goes_on(published, tmp_path, monkeypatch):
    """Whole parts are read back; one cut short, or of other molecules, is described again."""
    monkeypatch.setattr(molecules, "CHUNK", 20)
    monkeypatch.setattr(molecules, "PART", 40)
    smiles, asked, seen = published["test"][:100], [], []
    real = molecules.describe
    monkeypatch.setattr(molecules, "describe", lambda part: asked.append(len(part)) or real(part))
    describe_all = functools.partial(molecules.describe_all, folder=tmp_path / "kept", workers=1)
    expected = real(smiles)

    def killed(done, total):
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe_all(smiles, progress=killed)
    kept = lambda: sorted((tmp_path / "kept").iterdir())  # noqa: E731
    assert len(kept()) == 1
    for again in (60, 20, 60):
        asked.clear()
        got = describe_all(smiles, progress=lambda *done: seen.append(done))
        assert sum(asked) == again == seen[-1][0] == seen[-1][1]
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert len(kept()) == 2 and {file.suffix for file in kept()} == {".npz"}
        if again == 20:
            os.truncate(kept()[0], 500)
    asked.clear()
    describe_all(smiles[:40])
    describe_all(smiles[1:41])
    assert sum(asked) == 40  # other molecules are another part


# ---- the SVD


def test_projection_against_numpy(published):
    """Peer: numpy's SVD of the same 0/1 matrix, as Gram matrices, which no sign changes."""
    packed, _ = describe(published["test"][:150])
    bits = np.unpackbits(packed, axis=1, bitorder="little").astype(np.float64)
    _, values, right = np.linalg.svd(bits, full_matrices=False)
    assert values[31] - values[32] > 1e-3  # else the subspace is not defined
    theirs = bits @ right[:32].T
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    projection = fit_projection(packed, 32)
    ours = project(packed, projection)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-5)
    np.testing.assert_allclose(projection.T @ projection, np.eye(32), atol=1e-5)
    assert (np.take_along_axis(projection, np.abs(projection).argmax(0)[None], 0) > 0).all()


def test_projection_depends_on_neither_block_nor_row_order(published):
    packed, _ = describe(published["test"][:200])
    once = fit_projection(packed, 16)
    np.testing.assert_array_equal(fit_projection(packed[::-1], 16, block=7), once)
    with pytest.raises(InputError, match="200 molecules cannot span 300"):
        fit_projection(packed, 300)


def test_held_out_molecules_leave_no_trace(cells, published):
    """The training rows of the file come back bit by bit beside other held-out molecules."""
    table = columns(cells)
    train = table["split"] == "train"
    others = np.setdiff1d(published["test"][:1000], table["text"])
    smiles = table["text"].astype(object)
    smiles[~train] = others[: (~train).sum()]
    packed, _ = describe(smiles)
    again = moses.embed(packed, train)
    written = table["embedding"].astype(np.float32)
    np.testing.assert_array_equal(again[train], written[train])
    assert np.abs(again[~train] - written[~train]).max() > 0.1
    more = train.copy()
    more[np.flatnonzero(~train)[0]] = True  # the test can fail: one row more in training shows
    assert (moses.embed(packed, more)[train] != written[train]).any()


# ---- whole catalogues


def test_sizes_and_attribute_shares(cells):
    """Shares as counted on 40,000 molecules; four standard errors of 2,000."""
    catalogue = format.load(cells)
    assert catalogue.num_items == 2000 and catalogue.width == 128
    assert catalogue.num_patterns == 31 and catalogue.small_patterns == 0  # 2000 // 64
    assert catalogue.attribute_names == ("logp_low", "tpsa_high", "fsp3_high", "qed_high")
    np.testing.assert_allclose(catalogue.labels.mean(axis=1), [0.251, 0.252, 0.291, 0.278], atol=0.043)
    rows = columns(cells)["embedding"]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_rows_are_those_published(cells, published):
    table = columns(cells)
    assert len(set(table["id"])) == 2000
    split, row = zip(*(name.split("/") for name in table["id"]), strict=True)
    assert [published[s][int(r)] for s, r in zip(split, row, strict=True)] == table["text"].tolist()
    counts = {name: split.count(name) for name in moses.ROWS}
    assert counts == {"train": 1600, "test": 200, "test_scaffolds": 200}


@pytest.mark.parametrize("built", ["cells", "scaffold"])
@pytest.mark.parametrize("seed", [0, 5])
def test_make_splits_takes_the_roles_as_they_stand(built, seed, request):
    path = request.getfixturevalue(built)
    roles, catalogue = columns(path)["split"], format.load(path)
    splits = make_splits(catalogue, seed=seed)
    np.testing.assert_array_equal(splits.train, roles == "train")
    for role in ("item_holdout", "pattern_holdout"):
        items = sum(splits.holdout(role, stage).items for stage in ("validation", "test"))
        np.testing.assert_array_equal(items.astype(bool), roles == role)


def test_cells_hold_out_the_published_splits(cells):
    table = columns(cells)
    train = np.char.startswith(table["id"], "train/")
    held = table["split"] == "pattern_holdout"
    assert not (table["split"][~train] == "train").any()
    assert (table["split"][~held] == np.where(train, "train", "item_holdout")[~held]).all()
    assert not np.isin(table["pattern"][~held], table["pattern"][held]).any()
    assert len(set(table["pattern"][held])) == 6  # a fifth of 31


def test_scaffolds_hold_out_the_published_splits(scaffold):
    table = columns(scaffold)
    assert table["pattern"].tolist() == scaffolds(table["text"].tolist())
    role = {"train": "train", "test": "item_holdout", "test_scaffolds": "pattern_holdout"}
    assert table["split"].tolist() == [role[name.split("/")[0]] for name in table["id"]]
    held = table["split"] == "pattern_holdout"
    unseen, seen = set(table["pattern"][held]), set(table["pattern"][~held])
    assert not unseen & seen
    assert abs(len(unseen) / (len(unseen) + len(seen)) - 0.2) < 0.03
    _, size = np.unique(table["pattern"], return_counts=True)
    assert size.min() >= 20 and size.max() <= 200 and 700 < size.sum() <= 1500


def test_published_scaffolds_are_disjoint(published):
    """What makes test_scaffolds a pattern holdout at all, on 3,000 molecules of each."""
    seen = set(scaffolds(published["train"][:3000] + published["test"][:3000]))
    assert not seen & set(scaffolds(published["test_scaffolds"][:3000]))


def test_determinism(tmp_path, published, monkeypatch):
    """By seed, whatever the number of processes."""
    monkeypatch.setattr(moses, "read_smiles", lambda: published)
    monkeypatch.setattr(molecules, "PART", 500)
    one, two = (
        columns(moses.build(tmp_path / f"{n}.parquet", items=1000, seed=3, workers=n)) for n in (1, 2)
    )
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.parquet", "2.parquet"]
    other, _ = moses._sample(published, 1000, np.random.default_rng(4))
    assert set(other) != set(one["id"])


# ---- errors


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"pattern": "murcko"}, "pattern"),
        ({"pattern": "scaffold", "cells": 10}, "cells"),
        ({"items": 999}, "items"),
        ({"items": "most"}, "items"),
        ({"items": 1000, "cells": 9}, "cells"),
        ({"items": 1000, "cells": 101}, "cells"),
    ],
)
def test_bad_arguments(tmp_path, arguments, field):
    with pytest.raises(InputError) as error:
        moses.build(tmp_path / "out.parquet", **arguments)
    assert error.value.field == field and not list(tmp_path.iterdir())


def test_missing_package(monkeypatch):
    monkeypatch.setattr(moses, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(InputError, match="pip install --no-deps molsets==0.3.1"):
        moses.read_smiles()


def test_foreign_and_truncated_files(tmp_path, monkeypatch):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / Path(name).name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(InputError, match="train.csv.gz: not readable"):
        moses.read_smiles()
    data = gzip.compress(b"SMILES\nCCO\nCCC\n")
    (tmp_path / "train.csv.gz").write_bytes(data)
    with pytest.raises(InputError, match="2 rows under 'SMILES', not 1584663"):
        moses.read_smiles()
    (tmp_path / "train.csv.gz").write_bytes(data[:-12])
    with pytest.raises(InputError, match="train.csv.gz: not readable"):
        moses.read_smiles()
