"""A tiny random decoder with a vocabulary of twenty tokens, through warm start, rollouts and Soft-GRPO."""

import dataclasses
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret.language.decoder import Decoder, DecoderConfig
from genret.r4t import policy as training
from genret.r4t.folm import LanguagePolicy, collect_fanouts, sample_fanouts
from genret.r4t.grpo import SoftGRPO
from genret.r4t.policy import Rollouts, make_policy_stage, make_warm_start_stage
from genret.r4t.prompts import SHORT, Prompt, stop_tokens
from genret.r4t.rewards import Rewards, Scores
from genret.retrieval.index import ExactIndex
from genret.training.loop import FitOptions, fit
from genret.training.mesh import make_mesh
from genret.types import InputError

QUERIES = ["sky", "grass", "rose"]
COLOURS = ["blue", "green", "red"]
VOCABULARY = [
    "?", "\n", "Theme:", "Searches:", " [", '"blue"', '"green"', '"red"', ", ", "]", " sky", " grass",
    " rose", " and", "~", "~~", "~~~", "!", "!!", "!!!",
]  # fmt: skip
CONFIG = DecoderConfig(
    vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, intermediate_size=32, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=True, qk_norm=False,
)  # fmt: skip
ONE = make_mesh(devices=jax.devices()[:1])  # one of the eight simulated devices


def encode(text):
    """Longest match first, as a tokenizer of this vocabulary would."""
    ids = []
    while text:
        best = max((w for w in VOCABULARY if text.startswith(w)), key=len)
        ids.append(VOCABULARY.index(best))
        text = text[len(best) :]
    return ids


def decode(ids):
    return "".join(VOCABULARY[i] for i in ids)


def make_policy(lora=0, **changes):
    options = dict(prompt=SHORT, stop=stop_tokens(SHORT, decode, len(VOCABULARY)), max_new=6, k=2)
    return LanguagePolicy(Decoder(CONFIG, lora_rank=lora), encode, decode, **options | changes)


@pytest.fixture(scope="module")
def base():
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.device_get(Decoder(CONFIG).init(jax.random.key(0), tokens, tokens == 0)["params"])
    # Words far enough apart that a tied head of width 16 can tell them for certain.
    return {**params, "embed_tokens": {"embedding": 20 * params["embed_tokens"]["embedding"]}}


def colours(texts):
    return np.eye(3, dtype=np.float32)[[COLOURS.index(text) for text in texts]]


def make_rewards(k=2, **options):
    """Contents are the colours; the sky is blue, grass green and roses red."""
    eye = np.eye(3, dtype=np.float32)
    data = types.SimpleNamespace(embeddings=eye, query_embeddings=eye, references=None)
    return Rewards(data, ExactIndex(eye), colours, k=k, **options)


# Each entry is the right colour with chance 1/2, one of the others with 1/4.
PAIRS = [
    (query, [a, b])
    for query, right in zip(QUERIES, COLOURS, strict=True)
    for a in (*COLOURS, right)
    for b in (*COLOURS, right)
]


@pytest.fixture(scope="module")
def warmed(base, tmp_path_factory):
    """All weights after imitation: well-formed answers, of no strong opinion."""
    policy = make_policy()
    stage = make_warm_start_stage("warm", policy, base, PAIRS, batch=16)
    folder = tmp_path_factory.mktemp("warm")
    options = FitOptions(200, learning_rate=1e-2, warmup=10, log_every=25)
    state = fit(stage, folder, options, mesh=ONE, init_from=base)
    loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    return jax.device_get(state.params), loss


def share_valid(policy, params, n=64, key=0):
    variables = policy.variables(params, None)
    found = sample_fanouts(policy, variables, QUERIES * (n // 3), jax.random.key(key), batch=32)
    return np.mean([answer is not None for answer in found])


def test_warm_start_makes_answers_well_formed(base, warmed):
    policy = make_policy()
    params, loss = warmed
    assert share_valid(policy, base) < 0.1 and share_valid(policy, params) > 0.9
    # Two of an answer's six tokens are open, of entropy 1.5 ln 2; the others are certain.
    assert loss == pytest.approx(2 * 1.5 * np.log(2) / 6, abs=0.03)


def test_the_written_text_is_prompt_and_answer():
    policy = make_policy(max_new=8)
    text = policy.written([("sky", ["blue", "red"]), ("rose", ["red"])])
    prompt = encode(SHORT.ask("sky"))
    assert text.start == 8 and text.tokens.shape == (2, 8 + 6)
    assert decode(text.tokens[0, text.mask[0]]) == ' sky\nSearches: ["blue", "red"]\n'
    assert decode(text.tokens[1, text.own[1]]) == ' ["red"]\n'
    assert text.mask[0].sum() == len(prompt) + 6 and not (text.own & ~text.mask).any()
    assert text.mask[:, text.start - 1].all() and not text.own[:, : text.start].any()
    with pytest.raises(InputError, match="answer 1 has 4 tokens"):
        dataclasses.replace(policy, max_new=3).written([("sky", []), ("rose", ["red"])])
    with pytest.raises(InputError, match="pairs"):
        policy.written([])


def log_probs_of(policy, params, tokens, mask, start, temperature=1.0):
    variables = policy.variables(params, None)
    return np.asarray(
        jax.jit(lambda t, m: policy.log_probs(variables, t, m, start, temperature))(tokens, mask)
    )


def test_log_probs_are_the_decoders_own(base):
    """Against logits of the whole text at once: no prefix, no padding, no chunks."""
    policy = make_policy(max_new=8)
    pairs = [("sky", ["blue", "red"]), ("rose", ["red"])]
    text = policy.written(pairs)
    found = log_probs_of(policy, base, text.tokens, text.mask, text.start, 0.7)
    for row, (query, answer) in enumerate(pairs):
        ids = np.array([encode(SHORT(query) + SHORT.answer(answer))])
        logits = jax.jit(policy.decoder.apply)({"params": base}, ids, ids >= 0)[0] / 0.7
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(ids.size - 1), ids[0, 1:]]
        n = int(text.own[row].sum())
        np.testing.assert_allclose(found[row][text.own[row]], expected[-n:], atol=1e-5)
    # More padding changes nothing.
    wider = np.pad(text.tokens, ((0, 0), (3, 0))), np.pad(text.mask, ((0, 0), (3, 0)))
    again = log_probs_of(policy, base, *wider, text.start + 3, 0.7)
    np.testing.assert_allclose(again[:, 3:] * text.own, found * text.own, atol=1e-5)


def test_samples_come_with_the_log_probs_that_training_finds(warmed):
    policy = make_policy(temperature=1.3)
    variables = policy.variables(warmed[0], None)
    tokens, mask = policy.asked(QUERIES * 4)
    keys = jax.random.split(jax.random.key(1), 12)
    text, log_probs, answers = policy.sample(variables, tokens, mask, keys)
    again = log_probs_of(policy, warmed[0], text.tokens, text.mask, text.start, 1.3)
    np.testing.assert_allclose(log_probs[text.own], again[text.own], atol=1e-4)
    assert not log_probs[~text.own].any() and text.own[:, text.start].all()
    for row, answer in enumerate(answers):
        written = decode(text.tokens[row, text.own[row]])
        assert answer == SHORT.read(written, 2)
        assert len(encode(written)) == 6 or written.endswith("\n")
    # A row's answer is its own: its place in a batch does not matter.
    turned = policy.sample(variables, tokens[::-1], mask[::-1], keys[::-1])
    assert turned[2] == answers[::-1]


def test_one_endless_query_is_wide_by_itself_alone(warmed):
    policy = make_policy()
    usual, longer, endless = "sky grass rose", "sky" + " and" * 6, "sky" + " and" * 20
    assert policy.lengths([usual, longer, endless]).tolist() == [5, 9, 23]
    # In steps of 8: as wide as the longest, unless that is over twice what nearly all need.
    assert policy.usual_width([usual] * 9) == 8 and policy.usual_width([*[usual] * 9, longer]) == 16
    assert policy.usual_width([*[usual] * 9, endless]) == 8 and policy.usual_width([endless]) == 24
    policy = dataclasses.replace(policy, width=8)
    assert [policy.asked(q)[0].shape[1] for q in ([usual], [usual, endless])] == [8, 24]
    variables, asked = policy.variables(warmed[0], None), [*QUERIES, endless, "sky"]
    answers = sample_fanouts(policy, variables, asked, jax.random.key(3), batch=3)
    assert answers == sample_fanouts(policy, variables, asked, jax.random.key(3), batch=5)


def test_sample_fanouts_batches_as_one(warmed, monkeypatch):
    policy = make_policy()
    variables = policy.variables(warmed[0], None)
    whole = sample_fanouts(policy, variables, QUERIES * 5, jax.random.key(3), batch=15)
    assert sample_fanouts(policy, variables, QUERIES * 5, jax.random.key(3), batch=4) == whole
    assert sample_fanouts(policy, variables, QUERIES * 5, jax.random.key(4), batch=15) != whole
    # A query that stands there several times is asked once a batch, and answered as often.
    asked, read = np.repeat(QUERIES, 5).tolist(), []
    whole, sample = (
        sample_fanouts(policy, variables, asked, jax.random.key(3), batch=1),
        LanguagePolicy.sample,
    )
    monkeypatch.setattr(
        LanguagePolicy,
        "sample",
        lambda self, v, t, *more: (read.append(len(t)), sample(self, v, t, *more))[1],
    )
    assert sample_fanouts(policy, variables, asked, jax.random.key(3), batch=7) == whole
    assert len(QUERIES) == 3 and read == [2, 2, 2]
    for bad in (dict(queries=[]), dict(queries=QUERIES, batch=0)):
        with pytest.raises(InputError, match="queries"):
            sample_fanouts(policy, variables, key=jax.random.key(0), **bad)


def test_collected_fanouts_are_the_best_valid_ones(base, warmed):
    policy, rewards = make_policy(), make_rewards()
    rows = np.array([2, 0])
    variables = policy.variables(warmed[0], None)
    found = collect_fanouts(policy, variables, QUERIES, rows, jax.random.key(0), rewards, samples=8)
    assert found.scores.reward.shape == (2, 8) and len(found.pairs) == 2
    assert (np.diff(found.reward) <= 0).all()
    for (query, answer), reward, row in zip(found.pairs, found.reward, found.rows, strict=True):
        assert query == QUERIES[row]
        assert rewards(np.array([row]), [[answer]]).reward[0, 0] == reward
        group = rows.tolist().index(row)
        valid = found.scores.valid[group]
        assert reward == found.scores.reward[group][valid].max()
    args = (policy, variables, QUERIES, rows, jax.random.key(0), rewards)
    more = collect_fanouts(*args, samples=8, keep=3)
    half = collect_fanouts(*args, samples=8, keep=3, share=0.5)
    assert len(more.pairs) == 6 and half.pairs == more.pairs[:3]
    # Written again under the short prompt, they are a warm start's data.
    assert policy.written(more.pairs).own.any(1).all()
    for bad in (dict(share=0.0), dict(keep=9), dict(keep=0)):
        with pytest.raises(InputError, match="share"):
            collect_fanouts(*args, samples=8, **bad)
    hopeless = dataclasses.replace(policy, max_new=1)
    with pytest.raises(InputError, match="none of 4 samples is well-formed"):
        collect_fanouts(hopeless, {"params": base}, QUERIES, rows, jax.random.key(0), rewards, samples=2)


def rollouts_of(policy, base, rewards, **changes):
    options = dict(count=2, group=4, reuse=1, seed=0, workdir=None, report=lambda row: None)
    return Rollouts(policy, base, QUERIES, np.arange(3), rewards, **options | changes)


def test_a_rollout_is_a_pure_function_and_scores_what_was_written(warmed):
    policy, rewards, rows = make_policy(), make_rewards(), []
    first = rollouts_of(policy, None, rewards, report=rows.append)
    made = first(5, warmed[0])
    again = rollouts_of(policy, None, rewards)(5, warmed[0])
    chex.assert_trees_all_equal(made, again)
    other = first(6, warmed[0])
    assert not np.array_equal(made.tokens, other.tokens)
    # Read back by hand: prompts, answers, groups, rewards.
    prompts = [
        decode(row[mask & ~own]) for row, mask, own in zip(made.tokens, made.mask, made.own, strict=True)
    ]
    assert prompts[:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4 and prompts[0] != prompts[4]
    asked = [QUERIES.index(text.split("\n")[0].strip()) for text in (prompts[0], prompts[4])]
    answers = [SHORT.read(decode(t[own]), 2) for t, own in zip(made.tokens, made.own, strict=True)]
    scores = rewards(np.array(asked), [answers[:4], answers[4:]])
    spread = scores.reward.std(1, ddof=1, keepdims=True)
    expected = (scores.reward - scores.reward.mean(1, keepdims=True)) / np.maximum(spread, 1e-6)
    np.testing.assert_allclose(made.advantage.reshape(2, 4), expected, atol=1e-3)
    assert made.weight.reshape(2, 4).T.tolist() == [(np.ptp(scores.reward, axis=1) > 0).tolist()] * 4
    for name, value in scores.summary().items():
        np.testing.assert_allclose(made.stats[name], value, rtol=1e-6)
    assert rows[0]["tokens"] == made.own.sum() and rows[0]["malformed"] == (~scores.valid).sum()
    whole = [set(policy.stop) & set(t[own]) for t, own in zip(made.tokens, made.own, strict=True)]
    assert rows[0]["cut_short"] == whole.count(set())
    assert rows[0]["update_s"] is None and rows[1]["update_s"] >= 0
    assert min(rows[1]["rollout_s"], rows[1]["reward_s"], rows[1]["bound_tokens_s"]) > 0


def test_answers_that_run_out_of_tokens_are_counted(warmed):
    """A warm policy does not end at once; with two tokens an answer it never ends."""
    rows = []
    made = rollouts_of(make_policy(max_new=2), None, make_rewards(), report=rows.append)(5, warmed[0])
    assert (rows[0]["cut_short"], rows[0]["answers"], made.own.sum()) == (8, 8, 16)


def test_a_rollout_serves_several_steps_and_survives_a_kill(warmed, base, tmp_path):
    policy, rewards = make_policy(), make_rewards()
    first = rollouts_of(policy, None, rewards, reuse=3, workdir=tmp_path)
    made = first(3, warmed[0])
    assert first(5, base) is made  # parameters have moved on, the rollout has not
    again = rollouts_of(policy, None, rewards, reuse=3, workdir=tmp_path)(4, base)
    chex.assert_trees_all_equal(made, again)
    assert not np.array_equal(first(6, warmed[0]).advantage, made.advantage)
    # Of other options: not taken for it.
    other = rollouts_of(policy, None, rewards, reuse=3, workdir=tmp_path, seed=1)(4, warmed[0])
    assert not np.array_equal(other.tokens, made.tokens)


def mean_reward(policy, variables, rewards, key=9):
    answers = sample_fanouts(policy, variables, QUERIES * 32, jax.random.key(key), batch=96)
    groups = [answers[i::3] for i in range(3)]
    return rewards(np.arange(3), groups)


def test_soft_grpo_raises_the_reward_and_leaves_the_base_alone(warmed, tmp_path, capsys):
    """LoRA on the warm start, on the mesh of eight: from half of the alignment to nearly all of it."""
    policy, rewards = make_policy(lora=4), make_rewards(weights={"alignment": 1.0, "diversity": 0.0})
    start = warmed[0]
    stage = make_policy_stage(
        "policy", policy, start, QUERIES, np.arange(3), rewards, count=3, group=16, reuse=2,
        workdir=tmp_path,
    )  # fmt: skip
    fresh = policy.init(jax.random.key(0))
    before = mean_reward(policy, policy.variables(fresh, start), rewards)
    assert before.reward.mean() < 0.6 and before.valid.mean() > 0.9
    state = fit(stage, tmp_path, FitOptions(60, learning_rate=1e-2, warmup=5, log_every=1))
    params = jax.device_get(state.params)
    after = mean_reward(policy, policy.variables(params, start), rewards)
    assert after.reward.mean() > 0.8 and after.valid.mean() > 0.85
    # The base was frozen; its answers without LoRA are what they were.
    blind = mean_reward(make_policy(), {"params": start}, rewards)
    np.testing.assert_allclose(blind.reward, before.reward, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["sampler_difference"] < 1e-4 and log[0]["sampler_correlation"] > 0.9999
    assert log[0]["kl_new_old"] == pytest.approx(0, abs=1e-4) and log[0]["clipped"] == 0
    assert max(row["sampler_difference"] for row in log[1::2]) > 1e-3  # the second step has moved
    assert log[0]["reward"] == log[1]["reward"] and log[-1]["reward"] > log[0]["reward"] + 0.2
    assert {"alignment_std", "diversity", "valid", "kept", "answer_tokens"} <= log[0].keys()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rollout ")]
    assert len(said) == 3 and all(w in said[0] for w in ("rollouts/s", "tokens/s", "malformed", "update"))


def test_full_tuning_and_a_reference_hold_the_policy_back(warmed, tmp_path):
    """All weights, no LoRA; a strong KL to the start keeps it there."""
    policy, rewards, start = make_policy(), make_rewards(weights={"alignment": 1.0}), warmed[0]
    found = {}
    for beta in (0.0, 5.0):
        stage = make_policy_stage(
            "policy", policy, start, QUERIES, np.arange(3), rewards, count=3, group=16,
            options=SoftGRPO(reference=beta), reference=start if beta else None, report=lambda row: None,
        )  # fmt: skip
        options = FitOptions(40, learning_rate=1e-2, warmup=3, log_every=40)
        state = fit(stage, tmp_path / str(beta), options, mesh=ONE, init_from=start)
        variables = policy.variables(jax.device_get(state.params), None)
        found[beta] = mean_reward(policy, variables, rewards).reward.mean()
    assert found[0.0] > 0.8 > 0.65 > found[5.0]


def test_a_run_killed_inside_a_rollout_goes_on_as_if_it_had_not_been(warmed, tmp_path):
    def run(folder, kill=None):
        def report(row):
            if row["rollout"] == kill:
                raise KeyboardInterrupt

        stage = make_policy_stage(
            "policy", make_policy(), warmed[0], QUERIES, np.arange(3), make_rewards(), count=2, group=4,
            reuse=2, workdir=folder, report=report,
        )  # fmt: skip
        options = FitOptions(7, learning_rate=1e-2, warmup=1, log_every=1, save_every=3)
        return jax.device_get(fit(stage, folder, options, mesh=ONE, init_from=warmed[0]).params)

    with pytest.raises(KeyboardInterrupt):  # at step 4; the checkpoint of step 3 is amid the second rollout
        run(tmp_path / "killed", kill=2)
    resumed, whole = run(tmp_path / "killed"), run(tmp_path / "whole")
    chex.assert_trees_all_close(resumed, whole, atol=1e-6, rtol=1e-7)


def test_groups_of_one_reward_are_filtered_and_counted(warmed):
    def same(rows, answers):
        value = np.full((len(answers), len(answers[0])), 0.5, np.float32)
        value[0, 0] += 0.25
        return Scores(value, value > 0, value, {"recall": value})

    said = []
    made = rollouts_of(make_policy(), None, same, report=said.append)(0, warmed[0])
    assert made.weight.tolist() == [1] * 4 + [0] * 4 and not made.advantage[4:].any()
    assert said[0]["filtered_groups"] == 1 and (made.stats["kept"] == 0.5).all()


def test_bad_input_is_refused(base):
    def make(policy=None, **changes):
        options = dict(count=2, group=4)
        args = (policy or make_policy(), base, QUERIES, np.arange(3), make_rewards())
        return make_policy_stage("policy", *args, **options | changes)

    for field, changes in (
        ("rollout", dict(group=1)),
        ("rollout", dict(count=4)),
        ("rollout", dict(reuse=0)),
        ("workdir", dict(reuse=2)),
        ("policy", dict(policy=make_policy(temperature=0.0))),
        ("policy", dict(policy=make_policy(top_p=0.9))),
        ("reference", dict(options=SoftGRPO(reference=0.1))),
        ("reference", dict(reference=base)),
    ):
        with pytest.raises(InputError, match=f"^{field}"):
            make(**changes)


def test_a_prompt_without_a_shared_part_is_asked_too(warmed):
    bare = make_policy(prompt=Prompt("", "\nSearches:", " ", "\n"))
    assert bare.prefix is None
    text, log_probs, _ = bare.sample(
        {"params": warmed[0]}, *bare.asked(["sky"]), jax.random.split(jax.random.key(0), 1)
    )
    again = log_probs_of(bare, warmed[0], text.tokens, text.mask, text.start)
    np.testing.assert_allclose(log_probs[text.own], again[text.own], atol=1e-4)


def test_what_is_said_about_a_rollout(capsys):
    row = dict(
        rollout=10, answers=32, tokens=960, malformed=3, cut_short=2, filtered_groups=1, rollout_s=6.0,
        reward_s=1.0, update_s=3.0, bound_tokens_s=640.0, reward=0.5, valid=0.9, diversity=0.25,
        diversity_std=0.125, kept=0.9,
    )  # fmt: skip
    training.say(row)
    training.say(row | {"rollout": 11})
    training.say(row | {"rollout": 0, "update_s": None})
    assert capsys.readouterr().out == (
        "rollout 10: reward 0.5000, diversity 0.250 (std 0.125); 3 of 32 answers malformed, 2 of max_new "
        "tokens without an end, 1 groups filtered; 3.2 rollouts/s, 160 tokens/s (25% of the memory-bandwidth "
        "bound), rollout : reward : update 60 : 10 : 30\n"
    )
