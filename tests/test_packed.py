"""Packed files: small, exact, and refused where they are something else."""

import json

import numpy as np
import pytest

from experiments.packed import decode, encode, read_packed, save_packed
from experiments.report_rows import read_results
from genret.types import InputError


def test_a_packed_file_is_small(tmp_path):
    """5 seeds, 8 cells, 300 contexts, 60 methods: below 1.5 MB."""
    rng, joint = np.random.default_rng(0), ("joint", "attribute", "purity")
    with open(tmp_path / "results.jsonl", "w") as file:
        for m, seed, split, domain in np.ndindex(60, 5, 2, 4):
            row = {"method": f"method of a long enough name {m}", "seed": seed, "domain": "abcd"[domain]}
            row |= {"split": ("item_holdout", "pattern_holdout")[split], "k": 20, "catalogue": "tiny"}
            row |= {"n_items": 1000, "lookups": 70 + seed, "contexts": 300, "probes": 1, "calls": 1}
            row |= {"uses": "labels", "index": "exact", "setting": ["sft", 0.0, 0.9], "ann_recall": 0.999123}
            row |= {n: round(rng.random(), 6) for n in (*joint, "normalised_joint")}
            lists = {n: rng.integers(21, size=300).tolist() for n in joint}
            print(json.dumps(row | {"per_context": {"pattern": list(range(300)), **lists}}), file=file)
    path = save_packed(read_results(tmp_path / "results.jsonl"), tmp_path / "packed.jsonl")
    assert path.stat().st_size < 1_500_000
    assert len(read_packed(path).hits) == 60 * 8 * 3


@pytest.mark.parametrize("most", [0, 35, 36, 1295, 1296])
def test_counts_survive_their_encoding(most):
    counts = np.append(np.random.default_rng(most).integers(most + 1, size=40), most)
    said = encode(counts)
    assert isinstance(said, list) == (most == 1296)
    assert len(said) == 41 * (1 + (35 < most < 1296))
    np.testing.assert_array_equal(decode(said, 41), counts)
    with pytest.raises(InputError, match="41|82"):
        decode(said, 40)
    # By hand: 35 is z, 36 is 10 in base 36.
    assert encode(np.array([3, 35])) == "3z" and encode(np.array([3, 36])) == "0310"


@pytest.mark.parametrize("text", ["", "{}\n", '{"genret": "results", "version": 2}\n', "no json", "[1]\n"])
def test_refuses_what_is_no_packed_file(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match="is not a packed run"):
        read_packed(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        read_packed(tmp_path / "y.jsonl")
