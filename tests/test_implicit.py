"""Implicit rewards against log-likelihoods of Hugging Face's models, a sequence at a time."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from test_scorer import together
from torch import nn
from transformers import AutoModelForCausalLM

import rmfast
import tiny
from rmfast.errors import RowError
from rmfast.evaluate import implicit
from rmfast.evaluate.implicit import ImplicitScorer
from rmfast.packed import patching

ROWS = [
    [("what is it? ", "it is a cat"), ("what is it? ", "it is a dog!!"), ("what is it? ", "it")],
    [("hello", "you too"), ("hello", "no")],
    [("what is this? ", "a")],
]


def policy(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **more):
    """A language model; those of different seeds are near one another, as after some training."""
    out = tiny.model(family, dtype, cls=AutoModelForCausalLM, vocab_size=tiny.WORDS, **more)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 * seed)
    return out


def log_likelihood(model: nn.Module, ids: list[int], start: int) -> float:
    """Σ log p(token | those before it) over the tokens from ``start`` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    total = logits.double().log_softmax(-1)
    return sum(total[i - 1, ids[i]].item() for i in range(start, len(ids)))


def tokens(prompt: str, answer: str) -> tuple[list[int], int]:
    tokenizer = tiny.tokenizer()
    before = tokenizer(f"user: {prompt}</s>assistant: ", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
    return before + after, len(before)


def by_hand(model: nn.Module, reference: nn.Module, rows: list, beta: float = 0.1) -> np.ndarray:
    out = []
    for prompt, answer in (pair for row in rows for pair in row):
        ids, start = tokens(prompt, answer)
        out.append(log_likelihood(model, ids, start) - log_likelihood(reference, ids, start))
    return beta * np.array(out)


def scores(scorer: ImplicitScorer, rows: list) -> np.ndarray:
    out = [one for window in scorer.windows(enumerate(rows)) for _, one in window]
    assert all(one.error is None for one in out)
    return np.concatenate([one.scores for one in out])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "family, level",
    [
        ("llama", "backbone"),
        ("gpt2", "backbone"),  # places of their own embeddings; a head that asks for more
        ("gemma2", "backbone"),  # a cap on the logits, sliding windows
        ("mixtral", "backbone"),
        ("opt", "head"),  # runs padded, on its own forward
        ("bloom", "head"),
    ],
)
def test_equals_hugging_face(family, level, dtype):
    models = [policy(family, dtype, seed) for seed in (0, 1)]
    expected = by_hand(*models, ROWS)
    bound = 1e-4 * np.std(expected)
    if dtype == torch.float64:  # what is left is the rounding of the models' own fp32 parts
        sums = [log_likelihood(model, *tokens(*ROWS[0][1])) for model in models]
        bound = 2**-22 * 0.1 * np.abs(sums).sum()
    for size in (4096, 16):
        scorer = ImplicitScorer(*models, tiny.tokenizer(), max_tokens=size)
        assert rmfast.report(models[0]).level == level
        assert scores(scorer, ROWS) == pytest.approx(expected, abs=bound)
        assert scorer.stats.conversations == 6
        assert scorer.stats.tokens == sum(len(tokens(*pair)[0]) for row in ROWS for pair in row)
        if level == "backbone":  # no prefix twice, however small the pieces
            nodes = len(rmfast.pack([tokens(*pair)[0] for row in ROWS for pair in row]))
            assert scorer.stats.tokens_run == scorer.stats.nodes == nodes
            assert (scorer.stats.micro_batches > 1) is (size < nodes)


def test_half_precision_is_as_near_as_hugging_faces():
    exact = [policy("llama", torch.float64, seed) for seed in (0, 1)]
    half = [copy.deepcopy(model).bfloat16() for model in exact]
    exact = [copy.deepcopy(model).double() for model in half]
    rows = [[(f"question {i}", "an answer " * k) for k in (1, 3)] for i in range(12)]
    truth, theirs = by_hand(*exact, rows), by_hand(*half, rows)
    ours = scores(ImplicitScorer(*half, tiny.tokenizer()), rows)
    assert np.sqrt(np.mean((ours - truth) ** 2)) <= 1.1 * np.sqrt(np.mean((theirs - truth) ** 2))


@pytest.mark.parametrize("window", [1, 3, 100])
def test_window_changes_nothing(window):
    models = [policy(seed=seed) for seed in (0, 1)]
    expected = by_hand(*models, ROWS)
    got = scores(ImplicitScorer(*models, tiny.tokenizer(), window=window), ROWS)
    assert got == pytest.approx(expected, abs=1e-4 * np.std(expected))


def test_beta():
    models = [policy(seed=seed) for seed in (0, 1)]
    got = scores(ImplicitScorer(*models, tiny.tokenizer(), beta=2.5), ROWS)
    expected = by_hand(*models, ROWS, beta=2.5)
    assert got == pytest.approx(expected, abs=1e-4 * np.std(expected))


def test_head_runs_where_an_answer_goes_on_and_nowhere_else(monkeypatch):
    """Each distinct place before an answer's token once, a few at a time."""
    models = [policy(seed=seed) for seed in (0, 1)]
    expected = by_hand(*models, ROWS)
    seen: list[int] = []
    models[0].lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    monkeypatch.setattr(implicit, "_LOGITS", 3 * tiny.WORDS)
    got = scores(ImplicitScorer(*models, tiny.tokenizer(), max_tokens=4096), ROWS)
    assert got == pytest.approx(expected, abs=1e-4 * np.std(expected))
    places = set()
    for ids, start in (tokens(*pair) for row in ROWS for pair in row):
        places |= {tuple(ids[:i]) for i in range(start, len(ids))}
    assert sum(seen) == len(places)
    assert max(seen) == 3


def test_without_a_prompt_what_answers_share_cancels():
    models = [policy(seed=seed) for seed in (0, 1)]
    scorer = ImplicitScorer(*models, tiny.tokenizer())
    expected = by_hand(*models, ROWS)
    turns = [
        [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in row
        ]
        for row in ROWS
    ]
    ids = [[tokens(*pair)[0] for pair in row] for row in ROWS]
    prompt_in_answer = [
        [
            ([{"role": "user", "content": prompt}], side)
            for (prompt, _), side in zip(*x, strict=True)
        ]
        for x in zip(ROWS, turns, strict=True)
    ]
    for rows in (turns, ids, prompt_in_answer):
        got = scores(scorer, rows)
        assert got[:3] - got[0] == pytest.approx(expected[:3] - expected[0], abs=1e-5)
        assert got[3] - got[4] == pytest.approx(expected[3] - expected[4], abs=1e-5)
        assert got[5] == 0  # nothing to be compared with


def test_plain_text_begins_where_the_prompt_ends():
    models = [policy(seed=seed) for seed in (0, 1)]
    scorer = ImplicitScorer(*models, tiny.tokenizer(adds_bos=True), chat=False)
    got = scores(scorer, [[("one two", " three"), ("one two", "")][:1], [("x", "y")]])
    tokenizer = tiny.tokenizer(adds_bos=True)
    ids = tokenizer("one two three")["input_ids"]
    start = len(tokenizer("one two")["input_ids"])
    expected = log_likelihood(models[0], ids, start) - log_likelihood(models[1], ids, start)
    assert got[0] == pytest.approx(0.1 * expected, rel=1e-4)


def test_equal_answers_tie():
    models = [policy(seed=seed) for seed in (0, 1)]
    rows = [[("q", "same"), ("q", "other"), ("q", "same")], [("p", "x"), ("p", "x")]]
    got = scores(ImplicitScorer(*models, tiny.tokenizer(), max_tokens=16), rows)
    assert got[0] == got[2] != got[1] and got[3] == got[4] != 0
    same = scores(ImplicitScorer(models[0], policy(), tiny.tokenizer()), rows)
    assert not same.any()  # a policy that has not moved


def test_cut_on_the_left_an_answer_keeps_its_tokens():
    models = [policy(seed=seed) for seed in (0, 1)]
    scorer = ImplicitScorer(*models, tiny.tokenizer(), max_length=20, on_overlong="truncate_left")
    got = scores(scorer, [[("a long question", "short"), ("a long question", "b" * 30)]])
    for score, answer in zip(got, ("short", "b" * 30), strict=True):
        ids, start = tokens("a long question", answer)
        kept, begins = ids[-20:], max(1, 20 - (len(ids) - start))
        expected = [log_likelihood(model, kept, begins) for model in models]
        assert score == pytest.approx(0.1 * (expected[0] - expected[1]), rel=1e-4)


def test_rows_that_cannot_be_scored():
    models = [policy(seed=seed) for seed in (0, 1)]
    scorer = ImplicitScorer(*models, tiny.tokenizer(), max_length=40)
    rows = [[("q", "x" * 50), ("q", "y")], RowError("no good"), [("", "a")], [("q", "a")]]
    (window,) = scorer.windows(enumerate(rows))
    assert [one.error and one.error.kind for _, one in window] == ["overlong", "bad", "bad", None]
    assert window[0][1].error.reason.startswith("conversation 1 of 2: ")
    assert (scorer.stats.overlong, scorer.stats.errors, scorer.stats.rows) == (1, 2, 1)


def test_memory_that_runs_out(monkeypatch):
    models = [policy(seed=seed) for seed in (0, 1)]
    expected = by_hand(*models, ROWS)
    forward = nn.Linear.forward

    def at_most(linear, x):
        if x.shape[:-1].numel() > 70:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        return forward(linear, x)

    scorer = ImplicitScorer(*models, tiny.tokenizer(), max_tokens=256)
    monkeypatch.setattr(nn.Linear, "forward", at_most)
    assert scores(scorer, ROWS) == pytest.approx(expected, abs=1e-4 * np.std(expected))
    assert scorer.stats.halvings > 0 and scorer.max_tokens < 256


def test_memory_that_one_row_lacks(monkeypatch):
    """What cannot run packed runs a row at a time: it is tried again, and then told in words."""
    models = [policy("opt", seed=seed) for seed in (0, 1)]
    expected = by_hand(*models, ROWS)
    forward, failures = nn.Linear.forward, [1, 1, 1]

    def fails(linear, x):
        if failures:
            failures.pop()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        return forward(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", fails)
    scorer = ImplicitScorer(*models, tiny.tokenizer(), max_tokens=256)
    assert scores(scorer, ROWS) == pytest.approx(expected, abs=1e-4 * np.std(expected))
    assert scorer.stats.halvings == 3
    failures += [1] * 100
    with pytest.raises(MemoryError, match="use a smaller dtype, another device"):
        scores(scorer, ROWS)


def test_rotary_frequencies_of_long_rows():
    """From some length on they depend on the whole batch's: such rows run alone."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    long = {"rope_parameters": rope, "max_position_embeddings": 32}
    models = [policy(seed=seed, **long) for seed in (0, 1)]
    rows = [[("q", "x" * n), ("q", "y" * m)] for n, m in ((3, 40), (60, 2), (50, 41), (4, 5))]
    flat = [tokens(*pair) for row in rows for pair in row]
    expected = []
    for ids, start in flat:  # by models that saw nothing before
        fresh = [policy(seed=seed, **long) for seed in (0, 1)]
        both = [log_likelihood(model, ids, start) for model in fresh]
        expected.append(0.1 * (both[0] - both[1]))
    scorer = ImplicitScorer(*models, tiny.tokenizer(), max_length=100)
    got = scores(scorer, rows)
    assert got == pytest.approx(np.array(expected), abs=1e-4 * np.std(expected))


def test_models_come_out_as_they_went_in():
    models = [policy(seed=seed).train() for seed in (0, 1)]
    ids = torch.tensor([[5, 6, 7, 8]])
    before = [model(ids).logits for model in models]
    scores(ImplicitScorer(*models, tiny.tokenizer()), ROWS)
    assert all(model.training for model in models)
    for model, logits in zip(models, before, strict=True):
        assert torch.equal(rmfast.unpatch(model)(ids).logits, logits)
        assert "forward" not in model.__dict__ and "forward" not in model.model.__dict__


def test_what_the_models_were_patched_with_stays():
    models = [policy(seed=seed) for seed in (0, 1)]
    for model, most in zip(models, (40, 25), strict=True):
        rmfast.patch(model, share_prefixes=False, attention="sdpa", max_tokens=most)
    patches = [patching.attached(model) for model in models]
    scorer = ImplicitScorer(*models, tiny.tokenizer())
    assert [patching.attached(model) for model in models] == patches and scorer.max_tokens == 25
    scorer = ImplicitScorer(*models, tiny.tokenizer(), attention="auto", max_tokens=60)
    assert scorer.max_tokens == 60
    for model, before in zip(models, patches, strict=True):
        now = dataclasses.replace(before.options, attention="auto")
        assert patching.attached(model).options == now
    assert scores(scorer, ROWS) == pytest.approx(by_hand(*models, ROWS), abs=1e-5)


def test_threads():
    """One scorer, another with the same reference, and calls of that model beside them."""
    first, second, other = (policy("gemma2", seed=seed) for seed in (0, 1, 2))
    scorers = [
        ImplicitScorer(model, other, tiny.tokenizer(), max_tokens=48) for model in (first, second)
    ]
    rows = [ROWS, [[("tell me", "no" * k) for k in (1, 2, 3)]] * 3]
    works = [functools.partial(scores, scorer, some) for scorer in scorers for some in rows]
    ids = torch.randint(3, tiny.WORDS, (3, 9))

    def call():
        with torch.no_grad():
            return other(input_ids=ids, use_cache=False).logits.numpy()

    works += [call, call]
    expected = [work() for work in works]
    for want, several in zip(expected, together(works, 6), strict=True):
        for got in several:
            assert np.abs(got - want).max() <= 1e-4 * np.std(want)


def test_limits_are_the_smaller_models():
    small = policy(seed=1, max_position_embeddings=24)
    scorer = ImplicitScorer(policy(), small, tiny.tokenizer())
    rows = [[("q", "x" * 20)], [("q", "x")], [[5, 6, tiny.WORDS]]]
    (window,) = scorer.windows(enumerate(rows))
    assert [one.error and one.error.kind for _, one in window] == ["overlong", None, "bad"]


def test_what_is_refused():
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is no causal language"):
        ImplicitScorer(policy(), tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is no causal language"):
        ImplicitScorer(tiny.model(), policy(), tiny.tokenizer())
    with pytest.raises(ValueError, match="normalize is an option of reward models"):
        ImplicitScorer(policy(), policy(), tiny.tokenizer(), normalize=True)
    with pytest.raises(ValueError, match="beta must be above 0, and finite, got 0"):
        ImplicitScorer(policy(), policy(), tiny.tokenizer(), beta=0)
