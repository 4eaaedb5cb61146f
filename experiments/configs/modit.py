"""MO-DiT+HPPO on MOSES, the Kaggle catalogues, or your own Parquet.

    --config=experiments/configs/modit.py:size=demo
    --config=experiments/configs/modit.py:size=evidence,data=mine.parquet,seeds=0+1+2

Arguments: size (test, demo, evidence, S, B, L), data (moses, scaffold, fashion, streaming or the path of a
catalogue), raw (folder or file of the Kaggle CSVs), embeddings (already computed, for those CSVs),
seeds (0+1+2), ablations (more tables: stages+order+pool+preconditioning, and kinds+curves of queries),
budget (share of the training items whose labels are probed, .05).

Expected, 2 CPU cores, test, mean Joint@20 over four domains on item / pattern holdout, one seed:
    demo       MOSES 40k: MO-DiT+HPPO .363 / .376, steering .338 / .361 (README), 8 minutes a seed
    evidence   MOSES 200k, another split, five seeds: .354 / .378, steering .331 / .362; 15 minutes a seed
    test       no figure, two minutes (most of it compiling)
S, B and L are meant for accelerators and have no figure yet.
"""

from ml_collections import ConfigDict

from experiments.arguments import fit_options, number, parse, seeds
from genret.types import InputError

# steps of (pretrain, cpt, sft, a round of hppo), rounds, examples per step, pairs per step, learning rate
BUDGET = {
    "test": ((6, 6, 6, 4), 2, 32, 8, 1e-3),
    "demo": ((200, 250, 200, 100), 2, 128, 64, 1e-3),
    "evidence": ((200, 250, 200, 150), 3, 256, 64, 1e-3),
    "S": ((50_000, 20_000, 5_000, 1_000), 3, 1024, 256, 3e-4),
    "B": ((100_000, 30_000, 10_000, 1_000), 3, 2048, 512, 2e-4),
    "L": ((200_000, 30_000, 10_000, 1_000), 3, 4096, 1024, 1e-4),
}
SMALL = ("test", "demo", "evidence")  # sized for CPUs


def get_config(argument: str = "") -> ConfigDict:
    """The whole tree of defaults; every leaf is read, and an unknown one is refused."""
    free = dict(raw="", embeddings="", seeds="0", ablations="", budget="")
    arg = parse(argument, size="demo", data="moses", **free)
    if arg.size not in BUDGET:
        raise InputError("size", f"unknown size {arg.size!r}", f"use one of {', '.join(BUDGET)}")
    steps, rounds, batch, pairs, rate = BUDGET[arg.size]
    tiny, evidence, quick = arg.size == "test", arg.size == "evidence", arg.size in ("test", "demo")
    large = evidence and arg.data in ("moses", "scaffold")  # few clusterings make cells enough
    latent_sizes = (40, 64) if large else (48, 80, 120) if arg.data == "fashion" else (32, 48, 80)
    joined = ("seeds", "ablations")  # may grow after the fact: `workdir.same_run` writes them
    given = ",".join(f"{k}={v}" for k, v in vars(arg).items() if v and k not in joined)

    c = ConfigDict()
    c.seeds = seeds(arg.seeds)  # one whole run each: labels, cells, training
    c.ablations = tuple(filter(None, arg.ablations.split("+")))  # tables of experiments/recipes.py
    c.command = f"python -m experiments.run --config=experiments/configs/modit.py:{given}"
    c.catalogue = dict(
        data="moses" if arg.data == "scaffold" else arg.data,  # moses, fashion, streaming, or a path
        folder="data",  # where built catalogues are kept
        raw=arg.raw,  # Kaggle CSVs
        embeddings=arg.embeddings,  # npy in the documented order; empty = encode here
        num_items=2_000 if tiny else 200_000 if evidence else 40_000,  # moses: sampled (0 = all 1.9 M)
        pattern="scaffold" if arg.data == "scaffold" else "cells",  # moses: cells or scaffold
        cells={"fashion": 400, "streaming": 300}.get(arg.data, 0),  # evaluation cells (0 = N / 64)
        seed=7 if evidence else 0,  # of sample, cells and split; the test of 0 was seen in development
        pattern_fraction=0.2,  # of patterns held out
        item_fraction=0.2,  # of each other pattern's groups held out
    )
    c.labels = dict(
        budget=number("budget", arg.budget or "0.05"),  # share of training items probed (A.3: 1 to 5 %)
        sweep=(0.01, 0.02, 0.2) if evidence else (),  # more budgets, for the report on the predictor alone
        predictor=fit_options(40 if tiny else 600, 1e-3, weight_decay=0.05),
    )
    c.latent = dict(
        sizes=latent_sizes,  # mean items of a latent cell, one clustering each: up to the size of a pattern
        seeds=2 if large else 4,  # clusterings per size
        smallest=24,  # items; smaller cells are not used
        neighbours=20,  # of the walk's kNN graph (GTG: 20 to 50)
        tail_share=0.1,  # papers' A.7
        tail_least=8,  # items, papers' A.7
    )
    c.model = dict(
        size="demo" if evidence else arg.size,  # see diffusion/dit.py
        centred=True,  # False: plain preconditioning, the ablation
        anchor_steering=0.4,  # strength of the linear probe in the anchor; 0 = the seed mean alone
        per_coordinate=False,  # one data std per coordinate instead of one for all
        noise="log_uniform",  # or log_normal
        drop_domain=0.1,  # share of examples under the null domain, for guidance
        dtype="float32" if arg.size in SMALL else "bfloat16",  # of the matmuls
        attention="",  # "" is genret/attention.py; "cudnn" is the fused kernel on NVIDIA GPUs, in bfloat16
    )
    c.batch = batch  # examples per step
    c.length = 16  # items per walk (papers' A.6)
    c.replay = 0.15  # share of CPT batches replayed from stage 1 (papers' A.6)
    c.stages = {
        name: fit_options(n, r)
        for name, n, r in zip(("pretrain", "cpt", "sft"), steps[:3], (rate, rate / 2, rate / 2), strict=True)
    }
    c.hppo = dict(
        steps=steps[3],  # of a round
        rounds=rounds,  # each with pools made by the parameters of the moment
        contexts=128 if tiny else 1024,  # of a round
        samples=2 if quick else 4,  # of the model per context (papers' A.8: 8)
        policy="hybrid",  # or deterministic, on_policy
        feedback=True,  # candidates by relevance feedback on the model's own query, ours
        index="exact",  # of the candidates' labels: exact search on the mesh, or scann
        batch=pairs,  # per step
        fresh=4,  # contexts of the retrieval-aware term per pair
        pairs=dict(
            margin=2,  # items of Joint (papers' A.8: two)
            filter="pair",  # Pareto filter: off, pair, reference, both, dominance
            cap=4,  # pairs per context
            on_policy_share=1.0,  # of winners, at least (papers' A.8: half); others know more than seeds tell
            near=0.0,  # radians; so near to one of the model's own counts as its own (papers' A.8: 0.2)
            improve=True,  # winners must beat the model's one-call query
            apart=0.45,  # radians from either side to that query, at most
        ),
        preference=dict(
            beta=0.1,  # on the summed error; 13 per coordinate at width 128
            safe=0.9,  # mu of the safe loser scale
            guard=1.0,  # against a rising winner error, in units of beta / 2
            anchor=0.0,  # of the winner's own error
            draws=2,  # noise draws per pair (papers' A.8: 4)
        ),
        fit=fit_options(0, rate, warmup=5, log_every=20),  # steps and checkpoints follow the rounds
    )
    c.retrieval = dict(
        weight=1.0,  # of the retrieval-aware term in HPPO, ours; 0 turns it off
        temperature=0.035,  # of its softmax over cosines
        corpus=32_768,  # its candidates per step
    )
    c.contrastive = dict(
        steps=(4,) if tiny else (200, 600) if evidence else (60, 200),  # runs; validation picks one
        batch=batch if tiny else max(batch, 256),  # examples per step: fewer would make a weaker rival
        fit=fit_options(
            0, rate, warmup=10, weight_decay=0.05, ema_decay=0.9, log_every=20
        ),  # steps come from above
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)  # devices per axis; -1 takes what is left
    c.evaluation = dict(
        k=20,  # depth of every metric
        index="auto",  # exact, scann, or auto (ScaNN where it is installed)
        seeds=8,  # items per context
        least_seeds=4,  # a context with fewer is not asked
        least_positives=5,  # a pattern with fewer is not asked
        per_pattern=1 if evidence else 2,  # contexts per (pattern, domain)
        patterns=250 if evidence else 0,  # of test, per (split, domain), at most; 0 = all
        validation_patterns=60 if quick else 120 if evidence else 0,  # the same for validation
        samples=4 if tiny else 8,  # for "mean of n" and "n merged"
        reaches=(1.0, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0),  # of the query past the seed mean; tried on validation
        memory=((0.03, 0.5), (0.03, 1.0), (0.1, 0.5)),  # (temperature, strength) of the lines with memory
        guidance=(1.0, 2.0),  # classifier-free, on the domain; tried on validation at reach 1
        seed=0,  # of the contexts: the same for every run
    )
    return c
