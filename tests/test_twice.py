"""Training on a trie larger than memory: pieces that run twice give the gradients of one pass."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmfast
import tiny
from rmfast.benchmarks import trees
from rmfast.packed import patching, pieces, twice
from rmfast.packed.families import TRIE_BACKBONES
from rmfast.packed.step import Step
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective

EXACT = 1e-12
UNIT = 2.0**-24


def deep(seed=0):
    """Answers to two prompts, one of them inside another, and a stranger."""
    return [*tiny.rows(seed), *tiny.rows(seed + 1)]


def cut(model, most, inputs, **options):
    """Logits and gradients in pieces; how many there were."""
    count = []
    with rmfast.patched(model, max_training_tokens=most, **options):
        with pytest.MonkeyPatch.context() as patch:
            run = twice.Twice._again
            patch.setattr(twice.Twice, "_again", lambda *a: count.append(1) or run(*a))
            out = tiny.run(model, **inputs)
        report = rmfast.report(model)
    assert not report.fallbacks
    assert f"with gradients at most {most} tokens run at once" in str(report)
    return (*out, len(count))


def whole(model, inputs, **options):
    with rmfast.patched(model, **options):
        return tiny.run(model, **inputs)


@given(
    rows=st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=9), min_size=2, max_size=7),
    most=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_any_trie_cut_anywhere(rows, most):
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded([*rows, [3, 3, 4], [5]])
    want, grads = whole(model, inputs)
    got, ours, count = cut(model, most, inputs)
    assert tiny.score_error(got, want) <= EXACT
    assert tiny.grad_error(ours, grads) <= EXACT
    assert count >= len(rmfast.pack(**inputs)) / most or count == 0


@pytest.mark.parametrize("family", sorted(TRIE_BACKBONES))
def test_families(family):
    """What is left is what the model's own fp32 parts round."""
    model, inputs = tiny.model(family, torch.float64), tiny.padded(deep())
    want, grads = whole(model, inputs)
    got, ours, count = cut(model, 17, inputs)
    assert count > 3
    assert tiny.score_error(got, want) <= 16 * 96 * UNIT
    assert tiny.grad_error(ours, grads) <= 16 * 96 * UNIT


def test_every_size_of_one_trie():
    model, inputs = tiny.model("qwen3", torch.float64), tiny.padded(tiny.rows())
    want, grads = whole(model, inputs)
    for most in range(1, len(rmfast.pack(**inputs)) + 1):
        got, ours, _ = cut(model, most, inputs)
        assert tiny.score_error(got, want) <= EXACT, most
        assert tiny.grad_error(ours, grads) <= EXACT, most


def test_each_node_runs_twice_forward_and_once_backward():
    model, inputs = tiny.model(), tiny.padded(deep())
    seen, back = [], []

    def look(module, args, out):
        seen.append(out.shape[1])
        if out.requires_grad:
            out.register_hook(lambda grad: back.append(grad.shape[1]))

    model.model.layers[0].mlp.register_forward_hook(look)
    cut(model, 9, inputs)
    nodes = len(rmfast.pack(**inputs))
    assert sum(seen) == 2 * nodes and sum(back) == nodes
    seen.clear(), back.clear()
    cut(model, nodes, inputs)  # it fits: as always
    assert sum(seen) == sum(back) == nodes


MODES = ["checkpointing", "lora", "frozen", "no pruning", "not shared", "eager"]


@pytest.mark.parametrize("mode", MODES)
def test_what_else_is_at_work(mode):
    how = {"attn_implementation": "eager"} if mode == "eager" else {}
    model, inputs = tiny.model(dtype=torch.float64, **how), tiny.padded(deep())
    options = {
        "no pruning": {"prune_last_layer": False},
        "not shared": {"share_prefixes": False},
    }.get(mode, {})
    if mode == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    elif mode == "lora":
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
    elif mode == "frozen":
        model.model.requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
    want, grads = whole(model, inputs, **options)
    got, ours, count = cut(model, 9, inputs, **options)
    assert count > 3
    assert tiny.score_error(got, want) <= EXACT
    assert tiny.grad_error(ours, grads) <= EXACT


def test_autocast_is_that_of_the_forward():
    """The first pass is one without gradients, whose attention may round once more (test_ops)."""
    model, inputs = tiny.model(), tiny.padded(deep())
    exact, exact_grads = whole(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        want, grads = whole(model, inputs)
    model.zero_grad()
    rmfast.patch(model, max_training_tokens=9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    (logits * torch.linspace(-1, 2, 12).view_as(logits)).sum().backward()  # outside, as it should
    ours = {name: p.grad for name, p in model.named_parameters()}
    more = 2**0.5
    assert tiny.score_error(logits.detach(), exact) <= more * tiny.score_error(want, exact)
    assert tiny.grad_error(ours, exact_grads) <= more * tiny.grad_error(grads, exact_grads)
    assert tiny.grad_error(ours, exact_grads) > 1e-3  # it was bf16


def test_a_frozen_backbone_runs_once():
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep())
    model.model.requires_grad_(False)
    want, grads = whole(model, inputs)
    got, ours, count = cut(model, 9, inputs)
    assert count == 0 and set(ours) == {"score.weight"}
    assert tiny.score_error(got, want) <= EXACT and tiny.grad_error(ours, grads) <= EXACT


def test_noise_is_the_same_in_both_passes():
    """The gradient is that of the loss that was returned."""
    model = tiny.model("starcoder2", torch.float64, residual_dropout=0.3).train()
    inputs = tiny.padded(deep())
    rmfast.patch(model, max_training_tokens=11)
    weight = model.model.layers[1].self_attn.v_proj.weight

    def loss():
        torch.manual_seed(1)
        return model(**inputs).logits.sin().sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    torch.rand(3)
    way, step = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * way
        values.append(loss().item())  # in pieces, too: it draws as many numbers
        with torch.no_grad():
            weight -= sign * step * way
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx((grad * way).sum().item(), rel=1e-3)


# --- what asks for gradients


def test_hooks_accumulation_and_another_call_for_gradients():
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep())
    _, once = whole(model, inputs)
    rmfast.patch(model, max_training_tokens=9)
    calls, weigh = [], torch.linspace(-1, 2, 12, dtype=torch.float64)  # as in tiny.run
    handle = model.model.embed_tokens.weight.register_post_accumulate_grad_hook(calls.append)
    tiny.run(model, **inputs)
    assert len(calls) == 1
    logits = model(**inputs).logits  # accumulated
    (logits * weigh.view_as(logits)).sum().backward()
    grads = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert len(calls) == 2 and tiny.grad_error(grads, once) <= EXACT
    handle.remove()
    logits = model(**inputs).logits
    loss = (logits * weigh.view_as(logits)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    for _ in range(2):  # and again
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert tiny.grad_error(dict(zip(names, got, strict=True)), once) <= EXACT


def test_a_loss_that_is_no_number():
    model, inputs = tiny.model(), tiny.padded(deep())
    rmfast.patch(model, max_training_tokens=9)
    (model(**inputs).logits.sum() * float("nan")).backward()
    assert all(p.grad.isnan().any() for p in model.parameters())


def test_the_backward_wants_the_patch_and_not_the_old_checkpointing():
    model, inputs = tiny.model(), tiny.padded(deep())
    with rmfast.patched(model, max_training_tokens=9):
        loss = model(**inputs).logits.sum()
    with pytest.raises(RuntimeError, match="no longer patched"):
        loss.backward()
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    rmfast.patch(model, max_training_tokens=9)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**inputs)


# --- out of memory


@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_out_of_memory_cuts_smaller(where, monkeypatch):
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep() + deep(7))
    want, grads = whole(model, inputs)
    attend, failed = pieces.Budget.attempt, []

    def attempt(budget, work, *args, size):
        second = work.__name__ == "_again"

        def fails(*args):
            if size > (20 if second or where == "first" else 40):
                failed.append(second)
                raise MemoryError
            return work(*args)

        hit = where == "both" or second == (where == "second")
        return attend(budget, fails if hit else work, *args, size=size)

    monkeypatch.setattr(pieces.Budget, "attempt", attempt)
    rmfast.patch(model, max_training_tokens=80)
    got, ours = tiny.run(model, **inputs)
    assert set(failed) == {"first": {False}, "second": {True}, "both": {False, True}}[where]
    assert tiny.score_error(got, want) <= EXACT and tiny.grad_error(ours, grads) <= EXACT
    assert "memory ran out" in str(rmfast.report(model))


# --- packed steps


def pairs():
    rows = [row for seed in range(3) for row in tiny.rows(seed)[:4]]
    return [
        {"chosen_ids": rows[i], "rejected_ids": rows[i + 1], "margin": 0.5 * i}
        for i in range(0, len(rows), 2)
    ]


def groups():
    rows = [tiny.rows(seed) for seed in range(2)]
    return [{"responses_ids": rows, "ranks": [1, 0, 2, 2, 1, 3]} for rows in rows]


@pytest.mark.parametrize("kind", ["bradley_terry", "plackett_luce"])
def test_a_loss_over_pieces(kind):
    """Pairs and groups whose responses lie in different pieces, with margins and ranks."""
    model = tiny.model(dtype=torch.float64)
    batch = Collator(tiny.PAD)(pairs() if kind == "bradley_terry" else groups())

    def step(**options):
        model.zero_grad()
        with rmfast.patched(model, **options):
            loss = model(rmfast_step=Step(batch, Objective(kind), 3)).loss
            loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    want, grads = step()
    got, ours = step(max_training_tokens=13)
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    assert tiny.grad_error(ours, grads) <= EXACT


def test_fifty_steps():
    model = tiny.model()
    other = copy.deepcopy(model)
    batches = [Collator(tiny.PAD)(pairs()[i : i + 3]) for i in (0, 3)]
    losses = []
    for one, options in ((model, {}), (other, {"max_training_tokens": 15})):
        rmfast.patch(one, **options)
        optimiser, found = torch.optim.SGD(one.parameters(), 0.01), []
        for i in range(50):
            loss = one(rmfast_step=Step(batches[i % 2], Objective(), 3)).loss
            loss.backward()
            optimiser.step(), optimiser.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_patch_again_keeps_nothing():
    model = rmfast.patch(tiny.model(), max_training_tokens=9)
    assert patching.attached(rmfast.patch(model)).options.max_training_tokens is None
    with pytest.raises(ValueError, match="max_training_tokens must be 1 or more"):
        rmfast.patch(model, max_training_tokens=0)


@pytest.mark.parametrize("part", ["adapter", "layers.0.self_attn.q_proj", "layers.2", "norm"])
def test_little_is_trained(part):
    """A path takes part where something below it is trained, whatever that is."""
    net = tiny.model("llama").double().train().requires_grad_(False)
    if part == "adapter":  # of the embeddings
        config = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
        net = peft.inject_adapter_in_model(config, net).double()
    else:
        net.model.get_submodule(part).requires_grad_(True)
    batch = tiny.padded(tiny.rows(1))

    def gradients():
        net.zero_grad()
        scores = net(**batch).logits[:, 0]
        (scores * torch.arange(1.0, len(scores) + 1)).sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.requires_grad]

    want = gradients()
    rmfast.patch(net, max_training_tokens=5)
    for ours, theirs in zip(gradients(), want, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # fp32 rotary frequencies


def test_memory_is_that_of_a_piece():
    model, prompt = tiny.model(vocab_size=8000), list(range(3, 27))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def held(answers, most=None):
        inputs = tiny.padded([[*prompt, *[40 + i] * 5] for i in range(answers)])
        with rmfast.patched(model, max_training_tokens=most):
            tiny.run(model, **inputs)  # gradients are there
            return trees.most_held(lambda: model(**inputs).logits.sum().backward(), model, "cpu")

    whole, pieces_ = [held(n) for n in (8, 32, 128)], [held(n, 64) for n in (8, 32, 128)]
    assert whole[0] == pieces_[0]  # 64 nodes are one piece
    assert pieces_[1] - pieces_[0] < weights / 2  # no copy of all gradients beside one piece's
    assert pieces_[2] - pieces_[1] < (whole[2] - whole[1]) / 10  # what is left is of scored rows


def test_others_see_the_gradients_of_all_pieces():
    """Whoever is called with a gradient is called once, with its sum over pieces."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep())
    _, want = whole(model, inputs)
    named = dict(model.named_parameters())
    hooked, after = named["model.layers.0.mlp.up_proj.weight"], named["model.norm.weight"]
    seen, grads, others = [], [], []
    handle = hooked.register_hook(lambda grad: seen.append(grad.clone()))
    after.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad.clone()))
    for p in named.values():  # as an optimizer that steps once all gradients are there
        p.register_post_accumulate_grad_hook(
            lambda _: (
                others.append({n: q.grad.clone() for n, q in named.items() if n in want})
                if all(q.grad is not None for q in named.values())
                else None
            )
        )
    _, ours, count = cut(model, 5, inputs)
    assert count > 2 and tiny.grad_error(ours, want) <= EXACT
    assert [len(seen), len(grads)] == [1, 1]
    handle.remove()
    cut(model, 5, inputs)
    assert [len(seen), len(grads)] == [1, 2]
    assert len(others) == 2 and all(tiny.grad_error(x, want) <= EXACT for x in others)
    got = {"seen": seen[0], "after": grads[0]}
    one, two = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    assert tiny.grad_error(got, {"seen": want[one], "after": want[two]}) <= EXACT


@pytest.mark.parametrize("there", [False, True])
def test_gradients_that_were_asked_for_are_not_added(there):
    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep())
    _, want = whole(model, inputs)
    named = {n: p for n, p in model.named_parameters() if n in want}
    if not there:
        model.zero_grad()
    before = {n: p.grad if p.grad is None else p.grad.clone() for n, p in named.items()}
    some = "model.layers.1.self_attn.q_proj.weight"
    weight = torch.linspace(-1, 2, len(inputs["input_ids"]), dtype=torch.float64)
    with rmfast.patched(model, max_training_tokens=5):
        loss = (model(**inputs).logits[:, 0] * weight).sum()
        got = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        assert all(_same(p.grad, before[n]) for n, p in named.items())
        loss.backward(inputs=[named[some]])
    assert tiny.grad_error(dict(zip(named, got, strict=True)), want) <= EXACT
    total = named[some].grad - (before[some] if there else 0)
    assert tiny.grad_error({some: total}, {some: want[some]}) <= EXACT
    assert all(_same(p.grad, before[n]) for n, p in named.items() if n != some)


def _same(x, y):
    return x is y if x is None or y is None else torch.equal(x, y)


def test_gradients_lie_as_their_parameters_do():
    """A fused optimizer takes numbers by their place in memory."""
    grads = []
    for most in (None, 5):
        model = tiny.model()
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = weight.data.t().contiguous().t()
        with rmfast.patched(model, max_training_tokens=most):
            for _ in range(2):  # with a .grad, too
                model(**tiny.padded(deep())).logits.sum().backward()
                grads.append((weight.grad.stride(), weight.stride()))
    assert all(own == grad for grad, own in grads)


def test_compiled_autograd():
    from torch._dynamo import compiled_autograd

    model, inputs = tiny.model(dtype=torch.float64), tiny.padded(deep())
    _, want = whole(model, inputs)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        _, ours, count = cut(model, 9, inputs)
    assert count > 1 and tiny.grad_error(ours, want) <= EXACT
