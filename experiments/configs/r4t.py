"""R4T: a fan-out language model tuned by set-level rewards, compiled into a set diffusion retriever.

    --config=experiments/configs/r4t.py:size=demo
    --config=experiments/configs/r4t.py:size=evidence,data=playlists,raw=PATH,seeds=0+1+2

Arguments: size (test, demo, evidence, paper), data (words, playlists, fashion, polyvore, or a folder of your
own), raw (folder or file of playlists, fashion or polyvore), regime (oar: open-ended, whatever the data),
seeds (0+1+2), ablations (rewards: the collapse study).

words is open-ended retrieval (OAR): themes over 16,000 embedded words, nothing to download but wheels. The
next three are weakly supervised (WSCR): one reference set per query. Your own, contents.txt and
queries.jsonl (genret/catalogue/own.py), are what queries.jsonl says. With regime=oar their reference sets are
left out: the same queries and contents, and the rewards and the table of open-ended retrieval.

demo is what launch/fanout_demo.sh runs; evidence trains a wider set network, for longer, on sets of more
queries. Expected, 2 CPU cores: see the README. `paper` is for accelerators and has no figure yet.
"""

import os

from ml_collections import ConfigDict

from experiments.arguments import fit_options, parse, seeds
from genret.types import InputError

WARM = dict(weight_decay=0.0, ema_decay=0.9)
RL = dict(warmup=4, weight_decay=0.0, ema_decay=0.0, log_every=1, save_every=5)
DATA = ("words", "playlists", "fashion", "polyvore")
# What a size has different from the demo's values, which are in the tree below.
SIZES = {
    "test": dict(
        fanout=dict(contents=2_000, queries=150),
        k=3,
        language=dict(lora_layers=2, max_new=24, max_untuned=24, batch=8),
        warm=dict(queries=8, batch=4, fit=fit_options(8, 2e-3, **WARM)),
        rl=dict(count=2, group=4, fit=fit_options(2, 3e-4, **RL)),  # eight answers at once, as all else
        synthesis=dict(queries=8, shard=8),
        diffusion=dict(size="test", dims=8, batch=16, fit=fit_options(8, 1e-3)),
        regressor=fit_options(4, 1e-3),
        evaluation=dict(
            queries=4,
            best_of=2,
            repeated=0,
            steps=4,
            few=("heun 2", "exponential 4"),
            spare=(1, 1),
            latency=(8,),
            repeats=2,
        ),
    ),
    "demo": {},
    "evidence": dict(
        synthesis=dict(queries=640, fanouts=1, shard=64),
        diffusion=dict(size="wide", dims=192, fit=fit_options(16_000, 1e-3)),
        evaluation=dict(queries=56, repeated=8),
    ),
    "paper": dict(
        language=dict(reason=True, max_new=512, dtype="bfloat16", batch=1024),
        reward=dict(depth=500, context=0.0),
        warm=dict(queries=10_000, fit=fit_options(200, 1e-3, **WARM)),
        rl=dict(count=64, fit=fit_options(1_000, 3e-4, **RL | {"save_every": 50})),
        synthesis=dict(queries=0, fanouts=128, keep_top=1.0),
        diffusion=dict(
            size="r4t",
            block="paper",
            rows=12,
            dims=0,
            noise="log_uniform",
            dtype="bfloat16",
            batch=512,
            fit=fit_options(1_000_000, 3e-4, warmup=20_000, weight_decay=0.0, ema_decay=0.9999),
        ),
        regressor=fit_options(10_000, 1e-3),
        evaluation=dict(queries=0, runs=5, repeated=0, depth=500, latency=(1, 8, 64, 1024)),
    ),
}


def get_config(argument: str = "") -> ConfigDict:
    """The whole tree of defaults; every leaf is read, and an unknown one is refused."""
    arg = parse(argument, size="demo", data="words", raw="", regime="", seeds="0", ablations="")
    if arg.size not in SIZES:
        raise InputError("size", f"unknown size {arg.size!r}", f"use one of {', '.join(SIZES)}")
    if arg.data not in DATA and not os.path.isdir(arg.data):
        raise InputError("data", f"{arg.data!r} is no folder", f"use {', '.join(DATA)}, or a folder of yours")
    given = ",".join(f"{k}={v}" for k, v in vars(arg).items() if v and k not in ("seeds", "ablations"))

    words = arg.data == "words"
    c = ConfigDict()
    c.seeds = seeds(arg.seeds)  # one whole run each
    c.ablations = tuple(filter(None, arg.ablations.split("+")))  # rewards, or nothing
    c.command = f"python -m experiments.run --config=experiments/configs/r4t.py:{given}"
    c.fanout = dict(
        data=arg.data,  # words, playlists, fashion, polyvore, or a folder of contents.txt and queries.jsonl
        raw=arg.raw,  # folder or file of a data set that is not made here
        regime=arg.regime or "given",  # oar: reference sets are left out
        folder="data",  # where embedded data sets are kept
        contents=16_000,  # words: of the pool
        queries=3_000,  # words: themes
        seed=0,  # of themes and split
    )
    c.k = 10  # sub-queries of a fan-out
    c.language = dict(
        model="smollm2",  # or a GGUF file, or a checkpoint folder
        lora_rank=16,  # 0 tunes all weights
        lora_layers=10,  # from the top; 0 is all of them
        lora_alpha=32.0,  # scale of the factors is alpha / rank
        reason=False,  # zero-shot: the paper's prompt, <think> first, instead of a list on one line
        max_new=64 if words else 160,  # tokens of an answer; ten words have 40 to 55
        max_untuned=160,  # the same of a model that is not tuned, and writes phrases; at least max_new
        temperature=0.9,  # of sampling, in training and synthesis (papers' B.4)
        remat=False,  # recompute layers in the backward pass
        dtype="float32",  # of the matmuls
        batch=64,  # answers sampled at once
    )
    c.reward = dict(
        groundedness=0.6,  # eq. 1's weights, open-ended data
        diversity=0.2,
        alignment=0.2,
        recall=1.0,  # eq. 5, weakly supervised data: that alone
        depth=100,  # contents per sub-query, for recall
        context=1.0,  # the query's weight in its sub-queries' embeddings, likewise; 0 as the paper has it
        normalise="scale",  # or group: z-scores
    )
    c.warm = dict(
        teacher="retrieval",  # neighbours or references of training queries; or few-shot samples
        queries=2_400,  # training queries, at most
        samples=4,  # samples: answers to each
        share=0.5,  # samples: of the best ones imitated
        batch=8,  # texts per step
        fit=fit_options(60, 2e-3, **WARM),  # batch and rate: chosen on 300 validation queries of words
    )
    c.rl = dict(
        count=8,  # queries of a rollout
        group=8,  # answers to each (papers' B.6: 8)
        reuse=1,  # optimiser steps on a rollout
        clip=0.2,  # of the ratio
        new_old=0.05,  # beta_1
        old_new=0.05,  # beta_2
        reference=0.0,  # weight of the KL to the warm start; the paper has none
        fit=fit_options(5, 5e-4, **RL | {"warmup": 3}),  # chosen on 64 validation queries of words, two seeds
    )
    c.synthesis = dict(
        queries=224,  # of training; 0 = all
        fanouts=2,  # of each (papers' B.4: 128)
        distinct=False,  # refill repeated rows
        keep_top=0.5,  # share of each query's best sets: of two the better, chosen on 150 validation queries
        shard=32,  # queries written at a time
    )
    c.diffusion = dict(
        size="demo",  # see r4t/stages.py
        block="adaln",  # paper: positions, no adaLN
        dtype="float32",  # of the matmuls
        rows=0,  # L; 0 = k, more are padding in training (the paper: 12, of which it emits 10)
        centred=False,  # True: the diffusion runs on the residual to the query
        dims=64,  # principal directions of the rows it runs in; 0 = all
        noise="log_normal",  # or log_uniform
        drop=0.1,  # share of dropped conditions, for guidance
        batch=32,  # sets per step; on a CPU small ones teach faster
        fit=fit_options(7_000, 4e-3),  # rate: chosen on 150 validation queries of words
    )
    c.regressor = fit_options(1_800, 1e-3)  # MSE baseline, the same sets
    c.mesh = dict(data=-1, fsdp=1, tensor=1)  # devices per axis; -1 takes what is left
    c.evaluation = dict(
        index="auto",  # exact, scann, or auto (ScaNN where it is installed)
        part="test",  # whose queries are asked, or validation; rows of the two stand side by side
        queries=45,  # of the part; 0 = all
        best_of=5,  # Best-of-N (papers' B.8: 5)
        runs=2,  # draws of a method, for Vendi over runs (B.8: 5)
        repeated=6,  # the first, which are drawn again for it; 0 = all. 5 x (45 + 6): four batches of answers
        steps=256,  # of the faithful sampler, Euler-Maruyama
        few=("exponential 8", "exponential 16", "heun 5"),  # few-call lines; the last is exported
        levels=(0.05 if words else 0.1, 10.0),  # least and largest noise level of theirs
        spare=(10, 4),  # rows drawn beyond L (block=adaln), k of all stay: open-ended, weakly supervised
        grounded=1.0,  # open-ended: weight of a row's cosine with its content beside the query's with it
        guidance=0.1,  # w of the faithful sampler (B.6)
        pool=100,  # neighbours that re-ranking and clustering choose among
        depth=100,  # contents per direction, weakly supervised (B.8: 500)
        show=3,  # unseen queries printed side by side
        latency=(1, 8),  # batch sizes timed; larger ones may follow in another evaluation
        repeats=5,  # timings of each
    )
    c.update(SIZES[arg.size])
    return c
