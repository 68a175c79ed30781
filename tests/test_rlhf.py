"""A patched reward model under TRL's GRPO and RLOO: their own scoring call, a piece at a time."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import rmfast
import tiny
from rmfast.packed import models, pieces

UNIT = 2.0**-24


def counted(model):
    """Tokens that each forward pass of the backbone is given."""
    out = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: out.append(args[0].numel())
    )
    return out


def groups(seed=0):
    """Rollouts of two prompts, one inside another, a duplicate, and a stranger."""
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist()

    first, second = draw(20), draw(11)
    rows = [first + draw(n) for n in (5, 9, 1, 14)] + [second + draw(n) for n in (3, 30)]
    return [*rows, rows[1], rows[3][:26], draw(8)]


# --- TRL's trainers


@functools.cache
def trainers():
    """TRL's own two, around one tiny policy; the reward model is put in by the tests."""
    pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    policy = tiny.model("llama", cls=AutoModelForCausalLM, vocab_size=tiny.WORDS)

    def make(trainer, config, folder, reward_model):
        args = config(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", beta=0.0,
            per_device_train_batch_size=8, num_generations=4,
        )  # fmt: skip
        return trainer(
            model=policy,
            reward_funcs=reward_model,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
            processing_class=tiny.tokenizer(),
            reward_processing_classes=tiny.tokenizer(),
        )

    return {
        "grpo": functools.partial(make, GRPOTrainer, GRPOConfig),
        "rloo": functools.partial(make, RLOOTrainer, RLOOConfig),
    }


PROMPTS = ["What is the tallest mountain of them all? "] * 4 + ["Hello "] * 4
ANSWERS = ["Mont Blanc", "K2, and then Everest", "", "Mont Blanc", "to you", "", "there", "t"]


def batch(kind):
    """What TRL has after generating: prompts and completions, G of them one after the other."""
    if kind == "text":
        return PROMPTS, ANSWERS
    return (
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        [[{"role": "assistant", "content": answer}] for answer in ANSWERS],
    )


@pytest.mark.usefixtures("accelerate_anew")
@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_trl_scores_a_generation_batch(name, kind, tmp_path):
    """Its own scoring call: one reward a completion, those of the unpatched model, in pieces."""
    model = tiny.model("qwen3", vocab_size=tiny.WORDS, max_position_embeddings=512)
    prompts, completions = batch(kind)

    def rewards(reward_model):
        trainer = trainers()[name](tmp_path, reward_model)
        assert trainer.reward_funcs[0] is reward_model
        inputs = [{"prompt": prompt} for prompt in prompts]
        return trainer._calculate_rewards(inputs, prompts, completions, [[5]] * len(prompts))

    want = rewards(copy.deepcopy(model))
    ran = counted(model)
    whole = rewards(rmfast.patch(model))
    nodes = sum(ran)
    assert len(ran) == 1, "it fits into the default"
    ran.clear()
    most = nodes // 4
    cut = rewards(rmfast.patch(model, max_tokens=most))
    assert len(ran) >= 4 and max(ran) <= most
    assert sum(ran) == nodes, "each node once"
    for got in (whole, cut):
        assert got.shape == want.shape == (8, 1)
        assert tiny.score_error(got, want) <= 1e-4
    assert not rmfast.report(model).fallbacks


# --- pieces


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    most=st.integers(1, 120),
    share=st.booleans(),
    prune=st.booleans(),
    side=st.sampled_from(["right", "left"]),
)
def test_pieces_score_what_the_whole_pass_scores(seed, most, share, prune, side):
    model = copy.deepcopy(_model(3))
    inputs = tiny.padded(groups(seed), side)
    options = {"share_prefixes": share, "prune_last_layer": prune}
    with torch.inference_mode():
        plain = model(**inputs).logits
        with rmfast.patched(model, max_tokens=0, **options):
            whole = model(**inputs).logits
        with rmfast.patched(model, max_tokens=most, **options):
            ran = counted(model)
            cut = model(**inputs).logits
    nodes = len(rmfast.pack(**inputs, share_prefixes=share))
    assert sum(ran) == nodes and max(ran) <= most and len(ran) >= nodes / most
    # both sides take the same steps: what is left is fp64 rounding of sums in another order
    assert tiny.score_error(cut, whole) <= 1e-12
    assert tiny.score_error(cut, plain) <= (1e-4 if side == "left" else 1e-12)


@functools.cache
def _model(num_labels):
    return tiny.model("llama", torch.float64, num_labels=num_labels)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt2", "gpt_oss", "qwen3_moe"])
def test_windows_learned_positions_sinks_and_experts(family):
    model = tiny.model(family, torch.float64)
    inputs = tiny.padded(groups())
    with torch.no_grad():
        want = model(**inputs).logits
        ran = counted(rmfast.patch(model, max_tokens=30))
        got = model(**inputs).logits
    assert len(ran) >= 4
    assert tiny.score_error(got, want) <= 16 * 96 * UNIT
    assert not rmfast.report(model).fallbacks


def test_positions_labels_tuples_and_the_cache():
    model = tiny.model(num_labels=5)
    inputs = tiny.padded(groups(), "left") | {"labels": torch.arange(9) % 5}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + 4
    with torch.no_grad():
        want = model(**inputs)
        ran = counted(rmfast.patch(model, max_tokens=30))
        got = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    assert len(ran) >= 8
    assert type(got) is type(want)
    assert tiny.score_error(got.logits, want.logits) <= 1e-4
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(as_tuple[0], got.loss) and torch.equal(as_tuple[1], got.logits)
    assert isinstance(got.past_key_values, models.NoCache)
    assert model(**inputs, use_cache=False).past_key_values is None


def test_bf16_scores_are_as_near_as_the_whole_pass():
    model = tiny.model("llama", torch.bfloat16)
    batches = [tiny.padded(groups(seed)) for seed in range(8)]

    def scores(model):
        with torch.no_grad():
            return torch.cat([model(**inputs).logits.double() for inputs in batches])

    theirs, exact = scores(model), scores(copy.deepcopy(model).double())
    ours = scores(rmfast.patch(model, max_tokens=30))
    theirs, ours = ((x - exact).square().mean().sqrt() for x in (theirs, ours))
    # two RMS errors of 72 scores: their ratio moves by 1 / sqrt(72) by chance; four of those
    assert ours <= (1.1 + 4 / 72**0.5) * theirs


def test_torch_compile_goes_around_the_pieces():
    """Into the layers alone: cutting is not compiled anew for each piece."""
    model = tiny.model("llama", torch.float64, num_hidden_layers=2)
    batches = [tiny.padded(groups(seed)) for seed in range(3)]
    torch.compiler.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    with torch.no_grad():
        want = [model(**inputs).logits for inputs in batches]
        compiled = torch.compile(rmfast.patch(model, max_tokens=30), backend="eager")
        for inputs, logits in zip(batches, want, strict=True):
            assert tiny.score_error(compiled(**inputs).logits, logits) <= 16 * 96 * UNIT
    traced = {frame.co_name for frame in torch._dynamo.utils.get_compilation_metrics()}
    assert "attend" in traced, "a layer was compiled"
    assert not traced & {"by_piece", "run", "attempt", "cut", "pack"}


def test_a_call_with_gradients_runs_whole():
    model = tiny.model("llama")
    inputs = tiny.padded(groups())
    want = tiny.run(model, **inputs)
    ran = counted(rmfast.patch(model, max_tokens=30))
    got = tiny.run(model, **inputs)
    assert ran == [len(rmfast.pack(**inputs))]
    assert tiny.score_error(got[0], want[0]) <= 1e-4 and tiny.grad_error(got[1], want[1]) <= 1e-4
    ran.clear()
    model.requires_grad_(False)
    assert tiny.score_error(model(**inputs).logits, want[0]) <= 1e-4
    assert len(ran) >= 4, "nothing is left to be trained"


def test_gradients_of_something_else_survive_the_pieces():
    """Frozen parameters, but a hook that makes the embeddings a leaf, as PEFT has it."""
    model = tiny.model("llama", torch.float64).requires_grad_(False)
    leaves = []

    def leaf(module, args, out):
        leaves.append(out.requires_grad_())

    model.get_input_embeddings().register_forward_hook(leaf)
    inputs = tiny.padded(groups())
    model(**inputs).logits.sum().backward()
    want = leaves.pop().grad[inputs["attention_mask"].bool()].sum(0)
    rmfast.patch(model, max_tokens=30)
    model(**inputs).logits.sum().backward()
    got = torch.stack([x.grad[0].sum(0) for x in leaves]).sum(0)
    assert len(leaves) >= 4
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max())


def test_dropout_without_gradients_draws_noise_for_each_sequence():
    model = tiny.model("llama", attention_dropout=0.3).train()
    rows = [groups()[0]] * 3
    ran = counted(rmfast.patch(model, max_tokens=20))
    with torch.no_grad():
        scores = model(**tiny.padded(rows)).logits
    assert sum(ran) == sum(map(len, rows)) and max(ran) <= 20
    assert len(scores.unique()) == 3


# --- memory


class Full:
    """Stands for a device that holds so many tokens and no more."""

    def __init__(self, model, tokens):
        self.tokens, self.calls = tokens, []
        model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls.append(args[0].numel())
        if args[0].numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_out_of_memory_halves_what_runs_at_once():
    model = tiny.model("llama")
    inputs = tiny.padded(groups())
    with torch.no_grad():
        want = model(**inputs).logits
        full = Full(rmfast.patch(model, max_tokens=120), 40)
        got = model(**inputs).logits
        assert "at most 30 tokens" in str(rmfast.report(model))
        assert "memory ran out 2 times" in str(rmfast.report(model))
        assert tiny.score_error(got, want) <= 1e-4
        full.calls.clear()
        again = copy.deepcopy(model)
        model(**inputs)
    assert max(full.calls) <= 30, "what was learnt is kept"
    assert "at most 30 tokens" in str(rmfast.report(again))
    rmfast.patch(model, max_tokens=64)
    assert "at most 64 tokens" in str(rmfast.report(model))


def test_nothing_fits():
    model = rmfast.patch(tiny.model("llama"))
    Full(model, 0)
    with torch.no_grad(), pytest.raises(MemoryError, match=r"16 tokens at a time .*smaller"):
        model(**tiny.padded(groups()))


def test_how_many_tokens_run_at_once():
    model = rmfast.patch(tiny.model("llama"))
    assert f"at most {pieces.most(torch.device('cpu'))} tokens" in str(rmfast.report(model))
    assert pieces.most(torch.device("cuda", 1)) == pieces.most(torch.device("xpu")) == 65536
    assert "at once" not in str(rmfast.report(rmfast.patch(model, max_tokens=0)))
    assert "at once" not in str(rmfast.report(rmfast.patch(tiny.model("bloom"))))
    with pytest.raises(ValueError, match="max_tokens must be 0"):
        rmfast.patch(model, max_tokens=-1)


def test_a_sharded_model_runs_whole(monkeypatch):
    """Its processes have batches of their own, and every pass is one for all of them."""
    import torch.distributed as dist

    inputs = tiny.padded(groups())
    for sharded in (True, False):
        model = rmfast.patch(tiny.model("llama"), max_tokens=30)
        ran = counted(model)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        if sharded:
            model.model.norm.weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
        with torch.no_grad():
            model(**inputs)
        assert (len(ran) == 1) == sharded
