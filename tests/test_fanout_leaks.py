"""No step of an R4T run reads a query of validation or test: a tiny decoder, trained twice on data that
differ in those queries alone, leaves the same pairs, rollouts and sets to the bit."""

import dataclasses
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import r4t
from experiments.configs import r4t as configs
from genret.catalogue.fanout import FanoutData
from genret.language.decoder import DecoderConfig
from genret.language.pretrained import LanguageModel
from genret.r4t.policy import make_warm_start_stage
from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh

CONTENTS = [*"abcdefgh"]
VOCABULARY = ["?", "\n", "Theme:", "Searches:", " [", ", ", "]", *(f'"{name}"' for name in CONTENTS)]
CONFIG = DecoderConfig(
    vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, intermediate_size=32, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=True, qk_norm=False,
)  # fmt: skip
TRAIN = 6  # of twelve queries; then three of validation and three of test


class Words:
    """The tokenizer of that vocabulary."""

    size = len(VOCABULARY)

    def encode(self, text):
        """Longest match first; an unknown character is "?"."""
        found = []
        while text:
            best = max((w for w in VOCABULARY[1:] if text.startswith(w)), key=len, default="?")
            found.append(VOCABULARY.index(best))
            text = text[len(best) :]
        return found

    def decode(self, row, special=False):
        return "".join(VOCABULARY[i] for i in row)


def vectors(texts, **_):
    rows = np.stack([np.random.default_rng(zlib.crc32(t.encode())).normal(size=8) for t in texts])
    return np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def data_of(references, begin="theme"):
    """begin: of the queries' texts, from which their embeddings and reference sets follow too."""
    queries = [f"{'theme' if i < TRAIN else begin} {i}" for i in range(12)]
    rngs = (np.random.default_rng(zlib.crc32(query.encode())) for query in queries)
    sets = [np.sort(rng.choice(8, 4, replace=False)).astype(np.int32) for rng in rngs]
    split = np.repeat([0, 1, 2], (TRAIN, 3, 3)).astype(np.int8)
    return FanoutData(
        "tiny", CONTENTS, vectors(CONTENTS), queries, vectors(queries), split, sets if references else None
    )


def run_of(data, folder, params=None):
    config = configs.get_config("size=test")
    config.language.update(lora_rank=0, max_new=8)
    config.warm.fit.update(steps=2, learning_rate=1e-4)
    config.rl.update(reuse=2)  # so that its rollouts are kept
    config.rl.fit.update(steps=3)
    config.evaluation.index, config.reward.depth = "exact", 2
    run = r4t.FanoutRun(config, data, SimpleNamespace(encode=vectors), folder, 0)
    run.__dict__["language"] = LanguageModel(CONFIG, params, Words())
    run.__dict__["mesh"] = make_mesh(devices=jax.devices()[:1])
    return run


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A model that writes well-formed answers of any contents."""
    run = run_of(data_of(False), tmp_path_factory.mktemp("made"))
    begun = jax.device_get(jax.jit(run.policy.init)(jax.random.key(0)))
    begun = {**begun, "embed_tokens": {"embedding": 20 * begun["embed_tokens"]["embedding"]}}
    rng = np.random.default_rng(0)
    pairs = [(f"theme {i}", rng.permutation(CONTENTS)[:3].tolist()) for i in range(64)]
    stage = make_warm_start_stage("made", run.policy, begun, pairs, batch=16)
    options = FitOptions(150, learning_rate=1e-2, warmup=10, log_every=50)
    return jax.device_get(fit(stage, run.folder, options, mesh=run.mesh, init_from=begun).params)


def left(data, folder, params):
    """Every array and text that the run leaves on the way to the set models, by its place."""
    run = run_of(data, folder, params)
    run.train_policy()
    assert len(run.sets) > TRAIN
    found = {"pairs": (folder / "warm_pairs.json").read_text()}
    for path in sorted(folder.glob("folm/rollouts/*.npz")):
        with np.load(path) as file:
            found |= {f"{path.name}/{name}": file[name] for name in file}
    for path in sorted(folder.glob("synthesis/*/*.npy")):
        found[f"{path.parent.name}/{path.name}"] = np.load(path)
    leaves = jax.tree_util.tree_leaves_with_path(run.trained("folm"))
    return found | {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in leaves}


def changed(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()}


@pytest.mark.parametrize("references", [False, True])
def test_what_is_trained_on_does_not_know_the_queries_that_are_held_out(tmp_path, params, references):
    data = data_of(references)
    first = left(data, tmp_path / "a", params)
    assert {"0.npz/tokens", "1.npz/old", "shard_00000/targets.npy", "pairs"} <= first.keys()
    other = data_of(references, begin="elsewhere")
    assert (other.query_embeddings[TRAIN:] != data.query_embeddings[TRAIN:]).any(1).all()
    assert not changed(first, left(other, tmp_path / "b", params))
    # A training query is known.
    swapped = np.array([1, 0, *range(2, 12)])
    moved = {"query_embeddings": data.query_embeddings[swapped]}
    moved |= {"references": [data.references[i] for i in swapped]} if references else {}
    run_of(dataclasses.replace(data, **moved), tmp_path / "c", params)._pairs()
    assert (tmp_path / "c" / "warm_pairs.json").read_text() != first["pairs"]
