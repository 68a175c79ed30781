"""Packed batches, batches by token budget, and what is minimised."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rmfast
import tiny
from rmfast.packed import step as packed_step
from rmfast.train import batches as train_batches
from rmfast.train import objective as train_objective
from rmfast.train import sampler as train_sampler
from rmfast.trie import shared_length

IDS = st.lists(st.integers(1, 4), min_size=1, max_size=9)


def batch_of(examples, **options):
    return train_batches.Collator(tiny.PAD, **options)(examples)


def rows_of(examples):
    if "responses_ids" in examples[0]:
        return [row for e in examples for row in e["responses_ids"]]
    return [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]


def pair(chosen, rejected, **more):
    return {"chosen_ids": chosen, "rejected_ids": rejected, **more}


def group(rows, ranks):
    return {"responses_ids": rows, "ranks": ranks}


# --- the collator


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), st.booleans())
def test_a_packed_batch_is_its_rows(pairs, share):
    examples = [pair(chosen, rejected) for chosen, rejected in pairs]
    batch = batch_of(examples, share_prefixes=share)
    rows = rows_of(examples)
    inputs = packed_step.padded(batch, tiny.PAD)
    assert [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)] == rows
    assert batch["tokens"] == sum(map(len, rows)) and batch["longest"] == max(map(len, rows))
    assert batch["count"] == len(pairs)
    assert batch["pooled"].tolist() == sorted(set(batch["pool_index"].tolist()))
    assert share or len(batch["input_ids"]) == batch["tokens"]


def test_a_sequence_ends_where_hugging_face_scores_it():
    batch = batch_of([pair([5, 6, tiny.PAD], [tiny.PAD, tiny.PAD])])
    ids = packed_step.padded(batch, tiny.PAD)["input_ids"]
    assert ids.tolist() == [[5, 6], [tiny.PAD, tiny.PAD]]
    kept = train_batches.Collator(None)([pair([5, 6, tiny.PAD], [7])])
    assert len(kept["input_ids"]) == 4


@given(
    st.lists(
        st.lists(st.tuples(IDS, st.integers(0, 2)), min_size=1, max_size=4), min_size=1, max_size=4
    )
)
def test_groups_keep_their_order(groups):
    examples = [group([x for x, _ in g], [r + 2**25 for _, r in g]) for g in groups]
    batch = batch_of(examples)
    assert batch["sizes"].tolist() == [len(g) for g in groups] == batch["offsets"].diff().tolist()
    ranks = [rank for g in groups for _, rank in g]
    want = []
    for first, last in zip(batch["offsets"], batch["offsets"][1:], strict=False):
        want += [
            [i, j] for i in range(first, last) for j in range(first, last) if ranks[i] < ranks[j]
        ]
    assert batch["pairs"].tolist() == want
    got = batch["ranks"]
    assert (got[:, None] < got).tolist() == [[a < b for b in ranks] for a in ranks]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([pair([1], [2]), {"chosen_ids": [1]}], "example 1 of the batch has no rejected_ids"),
        ([pair([1], [2], margin=0.5), pair([1], [2], margin=float("nan"))], "example 1.* nan"),
        ([pair([1], [2], margin=0.5), pair([1], [2])], "example 1.*None"),
        ([pair([1], [2]), pair([1], [2], margin=0.5)], "example 0.*None"),
        ([pair([1], [2]), pair([3], [2], margin=None), pair([1], [2], margin=0)], "example 0.*No"),
        ([], "at least one example"),
        ([group([[1], [2]], [1, 2]), pair([1], [2])], "example 1 .* has no responses_ids"),
        ([pair([1], [2]), group([[1], [2]], [1, 2])], "example 1 of the batch has no chosen_ids"),
        ([group([[1], [2]], [1])], "example 0 .* 2 responses, its ranks"),
        ([group([[1], [2]], [1, float("nan")])], "example 0 .* finite"),
        ([group([[1]] * 65, list(range(65)))], "65 responses, more than 64"),
        ([pair([1], [])], "row 1 has no token"),
    ],
)
def test_bad_examples_are_named(examples, message):
    with pytest.raises(ValueError, match=message):
        batch_of(examples)


# --- batches by token budget


@given(
    st.lists(st.integers(3, 20), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(20, 60),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_every_rank_and_epoch_has_as_many_batches(nodes, common, most, world, epochs):
    samplers = [
        train_sampler.TokenBudgetSampler(
            nodes, most, common=common, ranks=(world, rank), epochs=epochs, seed=3
        )
        for rank in range(world)
    ]
    seen = []
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        assert {len(b) for b in batches} == {len(samplers[0])}
        flat = [batch for each in batches for batch in each]
        for batch in flat:
            assert batch
            assert common + sum(nodes[i] - common for i in batch) <= most
        counts = np.bincount([i for batch in flat for i in batch], minlength=len(nodes))
        # only where there are fewer examples than batches does one run twice
        assert counts.min() == 1 == counts.max() or len(nodes) < world * len(samplers[0])
        assert counts.min() >= 1
        seen.append(flat)
    if epochs > 1 and len(nodes) > 12:
        assert seen[0] != seen[1]


def test_batches_are_full():
    sampler = train_sampler.TokenBudgetSampler([10] * 100, 45)
    assert [len(batch) for batch in sampler] == [4] * 25
    assert len(train_sampler.TokenBudgetSampler([10] * 100, 45, common=5)) == 13  # 8 of 5, and 5


def test_an_example_over_budget_is_named():
    with pytest.raises(ValueError, match="example 1 has 50 trie nodes, more than max_tokens = 45"):
        train_sampler.TokenBudgetSampler([10, 50], 45)
    order = [*train_sampler.TokenBudgetSampler([10, 50, 10, 60, 10], 45, cuts=True)]
    assert [1] in order and [3] in order  # alone


def test_common_prefix():
    rows = [np.array(row) for row in ([1, 2, 3], [1, 2, 4], [1, 2], [5])]
    assert [shared_length([rows[0], row]) for row in rows] == [3, 2, 2, 0]


# --- the loss of a packed batch


def examples_of(kind, generator):
    def ids(n):
        return torch.randint(1, tiny.VOCAB, (n,), generator=generator).tolist()

    if kind in train_objective.KINDS["pairs"]:
        out = []
        for i in range(4):
            prompt = ids(5 + i)
            out.append(pair(prompt + ids(3), prompt + ids(1 + i), margin=0.25 * i))
        return out
    out = []
    for i, ranks in enumerate(([1, 2, 2], [3, 1], [0, 0, 5, 1])):
        prompt = ids(4)
        out.append(group([prompt + ids(1 + (i + j) % 3) for j in range(len(ranks))], ranks))
    return out


def by_hand(objective, scores, examples):
    """The loss written out, summed."""
    logsigmoid = torch.nn.functional.logsigmoid
    if objective.of_pairs:
        c, r = scores.chunk(2)
        z = c - r - torch.tensor([e["margin"] for e in examples], dtype=scores.dtype)
        eps = objective.label_smoothing
        loss = -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)
        if objective.kind == "focal":
            loss = loss * (1 - 2 * (z.sigmoid() - 0.5).relu()) ** objective.gamma
        return (loss + objective.center * (c + r) ** 2).sum()
    total, first = 0.0, 0
    for e in examples:
        ranks = e["ranks"]
        s = scores[first : first + len(ranks)]
        first += len(ranks)
        places = range(len(ranks))
        if objective.kind == "all_pairs":
            terms = [
                -logsigmoid(s[i] - s[j]) for i in places for j in places if ranks[i] < ranks[j]
            ]
            total = total + sum(terms) / (len(ranks) * (len(ranks) - 1) / 2)
        else:
            for i in places:
                left = torch.stack([s[j] for j in places if ranks[j] >= ranks[i]])
                total = total + left.logsumexp(0) - s[i]
    return total


OBJECTIVES = [
    train_objective.Objective(),
    train_objective.Objective(label_smoothing=0.1, center=0.01),
    train_objective.Objective("focal", gamma=1.5, center=0.01),
    train_objective.Objective("all_pairs"),
    train_objective.Objective("plackett_luce"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_loss_and_gradients_are_those_of_padded_rows(objective, family):
    examples = examples_of(objective.kind, torch.Generator().manual_seed(1))
    batch = batch_of(examples)
    plain = tiny.model(family, torch.float64)
    scores = plain(**packed_step.padded(batch, tiny.PAD)).logits[:, 0]
    want = by_hand(objective, scores, examples)
    want.backward()
    model = rmfast.patch(tiny.model(family, torch.float64))
    out = model(input_ids=batch["input_ids"][None], rmfast_step=packed_step.Step(batch, objective))
    out.loss.backward()
    assert not rmfast.report(model).fallbacks and rmfast.report(model).packed.total() == 1
    torch.testing.assert_close(out.logits[:, 0], scores.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, want.detach(), rtol=1e-9, atol=1e-9)
    # rotary frequencies are fp32 in every model
    scale = max(q.grad.abs().max().item() for q in plain.parameters())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"kind": "hinge"}, {"kind": "focal", "label_smoothing": 0.1},
     {"kind": "all_pairs", "label_smoothing": 0.1}, {"kind": "plackett_luce", "center": 0.1}],
    ids=str,
)  # fmt: skip
def test_objectives_that_mean_nothing(options):
    with pytest.raises(ValueError, match=options["kind"]):
        train_objective.Objective(**options)


def test_metrics_of_groups_count_pairs():
    objective = train_objective.Objective("all_pairs")
    batch = batch_of([group([[1], [2], [3]], [1, 2, 2]), group([[4], [5]], [2, 1])])
    scores = torch.tensor([2.0, 1.0, 3.0, 0.0, 0.5])
    _, _, metrics = objective.of_scores(scores, batch)
    torch.testing.assert_close(  # better - worse: 1, -1, 0.5
        metrics, torch.tensor([2 / 3, 0.0, 0.5 / 3, 1.3, 0.0, 3.0])
    )
    tied = batch_of([group([[1], [2]], [1, 1])])
    loss, _, metrics = objective.of_scores(scores[:2].requires_grad_(), tied)
    assert loss.item() == 0 and metrics.isnan().all()


@pytest.mark.parametrize("why", ["dropout", "long", "level", "noise"])
def test_what_cannot_be_packed_is_padded(why):
    """And the numbers are the padded model's."""
    options = {}
    if why == "long":
        options = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
        options["max_position_embeddings"] = 6
    objective = train_objective.Objective()
    examples = examples_of("bradley_terry", torch.Generator().manual_seed(1))
    batch = batch_of(examples)
    plain, model = (tiny.model("llama", torch.float64, **options) for _ in range(2))
    patch_options = {"attention": "sdpa"}
    if why == "dropout":
        for m in (plain, model):
            m.model.layers[0].self_attn.attention_dropout = 0.5
            m.train()
    if why == "noise":
        model.model.embed_tokens.neftune_noise_alpha = 1e-30
        model.train()
    rmfast.patch(model, **patch_options)
    if why == "level":
        model._rmfast.level = "head"
    torch.manual_seed(5)
    scores = plain(**packed_step.padded(batch, tiny.PAD)).logits[:, 0]
    torch.manual_seed(5)
    out = model(input_ids=batch["input_ids"][None], rmfast_step=packed_step.Step(batch, objective))
    assert bool(rmfast.report(model).fallbacks) == (why != "level")
    if why == "dropout":  # packed after all, without sharing: other noise
        assert out.loss.isfinite()
        return
    torch.testing.assert_close(out.logits[:, 0], scores.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        out.loss, by_hand(objective, scores, examples).detach(), rtol=1e-6, atol=1e-6
    )
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("pooling", ["hf", "mask"])
@pytest.mark.parametrize("objective", OBJECTIVES[1:4], ids=str)
def test_a_padded_step_is_one_op_too(objective, pooling, monkeypatch):
    """At level head: loss and gradients are those of the model's own forward."""
    seen = []
    fused = rmfast.ops.reward_head_pairwise_loss
    monkeypatch.setattr(
        rmfast.ops,
        "reward_head_pairwise_loss",
        lambda hidden, **rest: seen.append(hidden.ndim) or fused(hidden, **rest),
    )
    examples = examples_of(objective.kind, torch.Generator().manual_seed(2))
    batch = batch_of(examples)
    plain, model = (tiny.model("bloom", torch.float64) for _ in range(2))
    scores = plain(**packed_step.padded(batch, tiny.PAD)).logits[:, 0]
    want = by_hand(objective, scores, examples)
    want.backward()
    assert rmfast.report(rmfast.patch(model, pooling=pooling)).level == "head"
    step = packed_step.Step(batch, objective)
    out = model(input_ids=batch["input_ids"][None], rmfast_step=step)
    out.loss.backward()
    assert seen == ([3] if objective.of_pairs else [])
    torch.testing.assert_close(step.scores, scores.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, want.detach(), rtol=1e-9, atol=1e-9)
    scale = max(q.grad.abs().max().item() for q in plain.parameters())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9 * scale, msg=name)


def test_prompt_learning_is_refused():
    model = rmfast.patch(tiny.model())
    batch = batch_of([pair([1, 2], [1, 3])])
    with pytest.raises(ValueError, match="cannot be run with inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32), rmfast_step=packed_step.Step(batch, None))


def test_a_step_that_no_patched_model_ran_gives_nothing():
    """Models of Hugging Face take any argument."""
    batch = batch_of([pair([1, 2], [1, 3])])
    ids = batch["input_ids"][None]
    never, unpatched, wrapped = tiny.model(), tiny.model(), tiny.model()
    rmfast.unpatch(rmfast.patch(unpatched))
    tiny.double(rmfast.patch(wrapped))
    rmfast.unpatch(wrapped)  # the stand-in stays inside the wrapper, and hands everything on
    for model in (never, unpatched, wrapped):
        step = packed_step.Step(batch, train_objective.Objective())
        model(input_ids=ids, rmfast_step=step)
        for name in ("loss", "scores", "metrics"):
            with pytest.raises(RuntimeError, match=f"no {name}: no patched reward model"):
                getattr(step, name)
    assert not hasattr(step, "gradient")
    from transformers import AutoModelForTokenClassification

    other = rmfast.patch(tiny.model(cls=AutoModelForTokenClassification))
    assert rmfast.report(other).level == "backbone"
    with pytest.raises(ValueError, match="rmfast_step goes to a model that scores by its"):
        other(input_ids=ids, rmfast_step=step)


# --- no look at the device


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_nothing_waits_for_a_gpu(objective, monkeypatch):
    """On tensors that hold no numbers: whatever would fetch one from the device raises."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as on a GPU, where kernels run
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = batch_of(examples_of(objective.kind, torch.Generator().manual_seed(1)))
    model = tiny.model().train()
    mode = FakeTensorMode()

    def empty(x):
        return mode.from_tensor(x.detach())

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(empty(value))
        for name, value in module._buffers.items():
            module._buffers[name] = empty(value)
    batch = {k: empty(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with mode:
        rmfast.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        step = packed_step.Step(batch, objective)
        out = model(input_ids=batch["input_ids"][None], rmfast_step=step)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with pytest.raises(Exception, match="local_scalar_dense"):
            out.loss.item()
    assert not rmfast.report(model).fallbacks
    assert all(p.grad is not None for p in model.parameters())
