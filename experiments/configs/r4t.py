"""R4T: a fan-out language model tuned by set-level rewards, compiled into a set diffusion retriever.

    --config=experiments/configs/r4t.py:size=demo
    --config=experiments/configs/r4t.py:size=evidence,data=playlists,raw=PATH,seeds=0+1+2

Arguments: size (test, demo, evidence, paper), data (words, playlists, fashion, polyvore), raw (folder or file
of the last three), seeds (0+1+2), ablations (rewards: the collapse study).

words is open-ended retrieval (OAR): themes over 16,000 embedded words, nothing to download but wheels. The
others are weakly supervised (WSCR): one reference set per query.

demo is what launch/fanout_demo.sh runs; evidence trains a wider set network, for longer, on sets of more
queries. Expected, 2 CPU cores: see the README. `paper` is for accelerators and has no figure yet.
"""

from ml_collections import ConfigDict

from experiments.arguments import fit_options, parse, seeds
from genret.types import InputError

# steps of (warm start, RL, diffusion), queries warmed up on, queries and answers of a rollout
BUDGET = {
    "test": ((12, 2, 8), 8, (2, 2)),
    "demo": ((40, 8, 8_000), 2_400, (8, 8)),
    "evidence": ((40, 8, 16_000), 2_400, (8, 8)),
    "paper": ((200, 1_000, 1_000_000), 10_000, (64, 8)),
}
# the set diffusion's network, and the directions it runs in
NETWORK = {"test": ("test", 8), "demo": ("demo", 64), "evidence": ("wide", 192), "paper": ("r4t", 0)}
DATA = ("words", "playlists", "fashion", "polyvore")


def get_config(argument: str = "") -> ConfigDict:
    """The whole tree of defaults; every leaf is read, and an unknown one is refused."""
    arg = parse(argument, size="demo", data="words", raw="", seeds="0", ablations="")
    if arg.size not in BUDGET:
        raise InputError("size", f"unknown size {arg.size!r}", f"use one of {', '.join(BUDGET)}")
    if arg.data not in DATA:
        raise InputError("data", f"unknown data {arg.data!r}", f"use one of {', '.join(DATA)}")
    (warm, rl, diffusion), warmed, (count, group) = BUDGET[arg.size]
    network, dims = NETWORK[arg.size]
    tiny, paper = arg.size == "test", arg.size == "paper"
    given = ",".join(f"{k}={v}" for k, v in vars(arg).items() if v and k not in ("seeds", "ablations"))

    c = ConfigDict()
    c.seeds = seeds(arg.seeds)  # one whole run each
    c.ablations = tuple(filter(None, arg.ablations.split("+")))  # rewards, or nothing
    c.command = f"python -m experiments.run --config=experiments/configs/r4t.py:{given}"
    c.fanout = dict(
        data=arg.data,  # words, playlists, fashion, polyvore
        raw=arg.raw,  # folder or file of a data set that is not made here
        folder="data",  # where embedded data sets are kept
        contents=2_000 if tiny else 16_000,  # words: of the pool
        queries=150 if tiny else 3_000,  # words: themes
        seed=0,  # of themes and split
    )
    c.k = 3 if tiny else 10  # sub-queries of a fan-out
    c.language = dict(
        model="smollm2",  # or a GGUF file, or a checkpoint folder
        lora_rank=16,  # 0 tunes all weights
        lora_layers=2 if tiny else 10,  # from the top; 0 is all of them
        lora_alpha=32.0,  # scale of the factors is alpha / rank
        reason=paper,  # zero-shot: the paper's prompt, <think> first, instead of a list on one line
        max_new=40 if tiny else 512 if paper else 80 if arg.data == "words" else 160,  # tokens of an answer
        temperature=0.9,  # of sampling, in training and synthesis (papers' B.4)
        remat=False,  # recompute layers in the backward pass
        dtype="bfloat16" if paper else "float32",  # of the matmuls
        batch=8 if tiny else 64,  # answers sampled at once
    )
    c.reward = dict(
        groundedness=0.6,  # eq. 1's weights, open-ended data
        diversity=0.2,
        alignment=0.2,
        recall=1.0,  # eq. 5, weakly supervised data: that alone
        depth=100,  # contents per sub-query, for recall
        normalise="scale",  # or group: z-scores
    )
    c.warm = dict(
        teacher="retrieval",  # neighbours or references of training queries; or few-shot samples
        queries=warmed,  # training queries, at most
        samples=4,  # samples: answers to each
        share=0.5,  # samples: of the best ones imitated
        batch=4 if tiny else 32,  # texts per step
        fit=fit_options(warm, 2e-3 if tiny else 1e-3, weight_decay=0.0, ema_decay=0.9),
    )
    c.rl = dict(
        count=count,  # queries of a rollout
        group=group,  # answers to each (papers' B.6: 8)
        reuse=1,  # optimiser steps on a rollout
        clip=0.2,  # of the ratio
        new_old=0.05,  # beta_1
        old_new=0.05,  # beta_2
        reference=0.0,  # weight of the KL to the warm start; the paper has none
        fit=fit_options(
            rl, 3e-4, warmup=1, weight_decay=0.0, ema_decay=0.0, log_every=1, save_every=5 if rl < 100 else 50
        ),
    )
    c.synthesis = dict(
        queries={"test": 8, "demo": 320, "evidence": 640, "paper": 0}[arg.size],  # of training; 0 = all
        fanouts=128 if paper else 1 if arg.size == "evidence" else 2,  # of each (papers' B.4: 128)
        distinct=False,  # refill repeated rows
        keep_top=1.0,  # share of each query's best sets
        shard=8 if tiny else 64 if arg.size == "evidence" else 32,  # queries written at a time
    )
    c.diffusion = dict(
        size=network,  # see r4t/stages.py
        block="paper" if paper else "adaln",  # paper: positions, no adaLN
        rows=0,  # L; 0 = k, the paper trains 12 and emits 10
        centred=False,  # True: the diffusion runs on the residual to the query
        dims=dims,  # principal directions of the rows it runs in; 0 = all
        noise="log_normal",  # or log_uniform
        drop=0.1,  # share of dropped conditions, for guidance
        batch=512 if paper else 16 if tiny else 32,  # sets per step; on a CPU small ones teach faster
        fit=fit_options(diffusion, 1e-3 if not paper else 3e-4),
    )
    c.regressor = fit_options(4 if tiny else 10_000 if paper else 4_000, 1e-3)  # MSE baseline, the same sets
    c.mesh = dict(data=-1, fsdp=1, tensor=1)  # devices per axis; -1 takes what is left
    c.evaluation = dict(
        index="auto",  # exact, scann, or auto (ScaNN where it is installed)
        part="test",  # whose queries are asked, or validation; rows of the two stand side by side
        queries=4 if tiny else 0 if paper else 64,  # of the part; 0 = all
        best_of=2 if tiny else 5,  # Best-of-N (papers' B.8: 5)
        runs=5 if paper else 2,  # draws of a method, for Vendi over runs (B.8)
        repeated=2 if tiny else 0 if paper else 8,  # the first queries, which are drawn again for it; 0 = all
        steps=4 if tiny else 256,  # of the faithful sampler, Euler-Maruyama
        few=(2, 4) if tiny else (4, 8, 16),  # Heun steps of the few-call lines
        guidance=0.1,  # w of the faithful sampler (B.6)
        pool=100,  # neighbours that re-ranking and clustering choose among
        depth=100,  # contents per direction, weakly supervised (B.8: 500)
        show=3,  # unseen queries printed side by side
        latency=(1, 8) if tiny else (1, 8, 64, 1024) if paper else (1, 8, 64),  # batch sizes timed
        repeats=2 if tiny else 5,  # timings of each
    )
    return c
