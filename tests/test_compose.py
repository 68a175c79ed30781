"""The patch under what people put around a reward model."""

import copy
import os
import pickle
import threading
from pathlib import Path

import processes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import CONFIG_MAPPING

import rmfast
import tiny
from rmfast.packed.families import TRIE_BACKBONES


def pairs(count=4, seed=0):
    """Chosen rows, then rejected rows, as trainers lay them out."""
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = [], []
    for _ in range(count):
        prompt = torch.randint(3, tiny.VOCAB, (8,), generator=g).tolist()
        for side in (chosen, rejected):
            length = int(torch.randint(1, 7, (1,), generator=g))
            side.append(prompt + torch.randint(3, tiny.VOCAB, (length,), generator=g).tolist())
    return tiny.padded(chosen + rejected)


def loss_of(model, inputs):
    chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def step(model, inputs):
    """Loss and gradients of one step, by parameter name without PEFT's and DDP's prefixes."""
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_step(got, want, bound=1e-4):
    torch.testing.assert_close(got[0], want[0], rtol=bound, atol=bound)
    assert tiny.grad_error(got[1], want[1]) <= bound


# --- gradient checkpointing, autocast


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing(family, reentrant):
    quiet = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny.model(family, **quiet).train()
    inputs = pairs()
    want = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    rmfast.patch(model)
    runs = []
    model.base_model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: runs.append(args[0].numel())
    )
    assert_step(step(model, inputs), want)
    assert runs == [len(rmfast.pack(**inputs))]
    assert not rmfast.report(model).fallbacks


@pytest.mark.parametrize("patched", [False, True])
def test_calls_that_run_unpacked_may_be_checkpointed_too(patched):
    """The recomputation comes after the call: it must find the attention the call had."""
    model = tiny.model().train()
    inputs = pairs()
    want = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if patched:
        rmfast.patch(model)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        loss_of(model, inputs)
    model.config.pad_token_id = tiny.PAD
    last = loss_of(model, inputs)
    last.backward()
    assert torch.isfinite(last)
    assert not torch.equal(last, want[0])  # by embeddings Hugging Face pools the last column


def test_autocast():
    """bf16 autocast: no further from the fp32 step than unpatched autocast is."""
    model = tiny.model("llama", torch.float64).train()
    inputs = [pairs(seed=seed) for seed in range(8)]
    exact = [step(model, batch) for batch in inputs]
    model.float()

    def steps():
        out = []
        for batch in inputs:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            out.append((loss.detach(), grads))
        return out

    def errors(got):
        losses = sum((a[0].double() - b[0]).square() for a, b in zip(got, exact, strict=True))
        grads = sum(tiny.grad_error(a[1], b[1]) ** 2 for a, b in zip(got, exact, strict=True))
        return losses**0.5, grads**0.5

    theirs = errors(steps())
    rmfast.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs[0]).logits.dtype == torch.float32
    ours = errors(steps())
    assert ours[0] <= 1.1 * theirs[0] + 2.0**-8
    assert ours[1] <= 1.1 * theirs[1] + 2.0**-8


def test_accelerates_mixed_precision_wrapper():
    """It wraps ``forward`` on the instance, and makes a method of it when it unwraps."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import extract_model_from_parallel

    AcceleratorState._reset_state(reset_partial_state=True)  # of trainers in other tests
    model = rmfast.patch(tiny.model())
    inputs = pairs()
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    want = wrapped(**inputs).logits
    plain = extract_model_from_parallel(wrapped, keep_fp32_wrapper=False)
    for same in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert tiny.score_error(same(**inputs).logits, want) <= 0.1  # fp32 now, bf16 before
        assert not rmfast.report(same).fallbacks
    rmfast.unpatch(plain)
    assert "forward" not in plain.__dict__


# --- PEFT


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}


@pytest.mark.parametrize("order", ["patch-then-peft", "peft-then-patch"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora(order, dropout):
    torch.manual_seed(0)
    plain = get_peft_model(tiny.model(), LoraConfig(**LORA, lora_dropout=dropout))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    inputs = pairs()
    plain.eval()
    want = step(plain, inputs)
    if order == "patch-then-peft":
        model = get_peft_model(rmfast.patch(tiny.model()), LoraConfig(**LORA, lora_dropout=dropout))
        model.load_state_dict(plain.state_dict())
        model.eval()
    else:
        model = rmfast.patch(copy.deepcopy(plain))
    report = rmfast.report(model)
    assert report.level == "trie"
    assert bool(report.warnings) == bool(dropout)
    assert_step(step(model, inputs), want)
    assert any("score" in n for n in want[1])
    assert any("lora_A" in n for n in want[1])
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        want_logits = plain(**inputs).logits
        assert tiny.score_error(model(**inputs).logits, want_logits) <= 1e-4
    model.train()
    if dropout:  # each sequence draws its own noise
        assert not torch.equal(step(model, inputs)[0], step(model, inputs)[0])
    rmfast.unpatch(model)
    model.eval()
    assert torch.equal(step(model, inputs)[0], want[0])


def test_lora_on_the_head_itself():
    targets = LORA | {"target_modules": ["q_proj", "score"], "task_type": None}
    model = get_peft_model(tiny.model(), LoraConfig(**targets)).eval()
    inputs = pairs()
    want = step(model, inputs)
    rmfast.patch(model)
    assert_step(step(model, inputs), want)


def test_merged_adapters_leave_a_patched_model():
    model = get_peft_model(rmfast.patch(tiny.model()), LoraConfig(**LORA)).eval()
    inputs = pairs()
    want = model(**inputs).logits
    merged = model.merge_and_unload()
    assert rmfast.report(merged).level == "trie"
    assert tiny.score_error(merged(**inputs).logits, want) <= 1e-4


# --- torch.compile


def test_compiled_layers_do_not_recompile_for_each_batch():
    model = tiny.model("llama", torch.float64, num_hidden_layers=2)
    batches = [tiny.padded(tiny.rows(seed)[: 3 + seed % 3]) for seed in range(7)]
    want = [tiny.run(model, **batch) for batch in batches]
    bound = 96 * 2.0**-24  # fused, the fp32 parts of a layer round elsewhere: 16 steps, 3 layers
    rmfast.patch(model)
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    for batch, (logits, grads) in zip(batches[:2], want[:2], strict=True):
        got = tiny.run(model, **batch)
        assert tiny.score_error(got[0], logits) <= bound
        assert tiny.grad_error(got[1], grads) <= bound
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, (logits, grads) in zip(batches[2:], want[2:], strict=True):
            got = tiny.run(model, **batch)
            assert tiny.score_error(got[0], logits) <= bound
            assert tiny.grad_error(got[1], grads) <= bound


def test_compiled_layers_are_one_graph():
    """Attention is one opaque op: nothing breaks the graph of a decoder layer."""
    model = rmfast.patch(tiny.model("llama"))
    layer, seen = model.model.layers[0], {}
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(**pairs())
    hook.remove()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    want, got = (f(*seen["args"], **seen["kwargs"]) for f in (layer, compiled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_first", [True, False])
def test_torch_compile_of_the_whole_model(patch_first):
    model = tiny.model("llama", torch.float64, num_hidden_layers=2)
    inputs = pairs()
    want = step(model, inputs)
    if patch_first:
        compiled = torch.compile(rmfast.patch(model), backend="aot_eager")
    else:
        compiled = rmfast.patch(torch.compile(model, backend="aot_eager"))
    assert rmfast.report(compiled).level == "trie"
    got = step(compiled, inputs)
    got = got[0], {n.removeprefix("_orig_mod."): g for n, g in got[1].items()}
    assert_step(got, want, 1e-5)


def test_torch_compile_of_a_call_that_runs_unpacked():
    model = tiny.model("llama", torch.float64, num_hidden_layers=2, attn_implementation="eager")
    inputs = pairs() | {"output_attentions": True}
    with torch.no_grad():
        want = model(**inputs).logits
        compiled = torch.compile(rmfast.patch(model), backend="eager")
        assert tiny.score_error(compiled(**inputs).logits, want) <= 1e-5
    assert list(rmfast.report(model).fallbacks) == ["the argument output_attentions"]


UNPICKLED = """
import pickle, sys, torch, tiny
model, batches, want = pickle.load(open(sys.argv[1], "rb"))
compiled = torch.compile(model, backend="eager")  # what is traced counts here
for i, (batch, logits) in enumerate(zip(batches, want)):
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 3):
        assert tiny.score_error(compiled(**batch).logits, logits) <= 1e-5
import rmfast
assert not rmfast.report(model).fallbacks
"""


def test_torch_compile_of_a_model_unpickled_in_another_process(tmp_path):
    """Where nobody patched anything: packing is gone around there too."""
    model = tiny.model("llama", torch.float64, num_hidden_layers=2)
    batches = [tiny.padded(tiny.rows(seed)[: 3 + seed % 3]) for seed in range(7)]
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
    (tmp_path / "model").write_bytes(pickle.dumps((rmfast.patch(model), batches, want)))
    processes.alone(UNPICKLED, tmp_path / "model")


# --- threads


def test_two_threads_score_at_once():
    model = rmfast.patch(tiny.model("llama", torch.float64))
    batches = [tiny.padded(tiny.rows(seed)) for seed in range(8)]
    unpacked = [{**batch, "use_cache": True} for batch in batches]
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
    wrong = []

    def score(calls, bound):
        for _ in range(5):
            for call, logits in zip(calls, want, strict=True):
                with torch.no_grad():
                    if tiny.score_error(model(**call).logits, logits) > bound:
                        wrong.append(call)

    jobs = [(batches, 0), (batches, 0), (unpacked, 1e-9)]
    threads = [threading.Thread(target=score, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- several processes


def worker(rank, port, kind, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    inputs = pairs(8)
    mine = [*range(rank * 4, rank * 4 + 4), *range(8 + rank * 4, 8 + rank * 4 + 4)]
    inputs = {k: v[mine] for k, v in inputs.items()}
    model = rmfast.patch(tiny.model("llama").train())
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if kind == "fsdp2-head":
            fully_shard(model.score, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss = loss_of(wrapped, inputs)
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        grad = p.grad
        grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    report = rmfast.report(model)
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        out = {"loss": total / 2, "grads": grads, "fallbacks": dict(report.fallbacks)}
        torch.save(out, Path(folder) / f"{kind}.pt")
    processes.leave()


KINDS = ("ddp", "fsdp2", "fsdp2-head")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return processes.launch("test_compose", KINDS, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, two_processes):
    got = torch.load(two_processes / f"{kind}.pt")
    assert not got["fallbacks"]
    assert_step((got["loss"], got["grads"]), step(tiny.model("llama").train(), pairs(8)))


# --- TRL


def test_trl_reward_trainer_unchanged(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    g = torch.Generator().manual_seed(0)

    def text(n):
        return " ".join(f"w{i}" for i in torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist())

    records = []
    for i in range(12):
        prompt = text(9)
        chosen, rejected = f"{prompt} {text(1 + i % 5)}", f"{prompt} {text(6)}"
        records.append({"chosen": chosen, "rejected": rejected, "margin": 0.1 * i})

    def train(model, name):
        args = RewardConfig(
            output_dir=str(tmp_path / name), max_steps=3, per_device_train_batch_size=4,
            learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, seed=0,
            save_strategy="no", bf16=False, gradient_checkpointing=True, max_length=64,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, trainer

    want, _ = train(tiny.model(), "plain")
    model = rmfast.patch(tiny.model())
    got, trainer = train(model, "patched")
    assert len(got) == 3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not rmfast.report(trainer.model).fallbacks
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_every_family_is_one_transformers_knows_or_newer():
    known = [family for family in TRIE_BACKBONES if family in CONFIG_MAPPING]
    assert len(known) >= 25
