"""DeepSpeed's engine, ZeRO stages 0 to 3, in two processes that train together.

Stood in for are its collectives in shared memory, which it would compile: gloo's are there. The
optimizer is torch's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rmfast
import tiny

PINS = ["deepspeed==0.19.8", "hjson==3.1.0", "einops==0.8.2"]
pytest.importorskip("deepspeed", reason="deepspeed is not installed: make programs")

STAGES = [0, 1, 2, 3]
HOW = ["without", "before", "after"]  # rmfast.patch, and deepspeed.initialize


def worker(rank, folder):
    """A step of each stage; what came of it, by stage and how, goes into a file."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    found = {f"{stage} {how}": step(rank, stage, how) for stage in STAGES for how in HOW}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()


def step(rank, stage, how):
    """Scores and gradients of a step, scores after it, tokens that were run, and the report."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = tiny.model()
    if how == "before":
        rmfast.patch(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if how == "after":
        rmfast.patch(engine.module)
    tokens, embeddings = [], model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    batch = tiny.padded(tiny.rows(rank))
    scores = engine(**batch).logits
    engine.backward((scores * torch.linspace(-1, 2, len(scores))[:, None]).sum())
    grads = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
    engine.step()
    with torch.no_grad():
        after = engine(**batch).logits
    report = None if how == "without" else rmfast.report(engine.module)
    return scores.detach(), grads, after, tokens, report


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    paths = [str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder], env=env, check=True, timeout=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step(stage, how, rank, found):
    theirs, their_grads, theirs_after, whole, _ = found[rank][f"{stage} without"]
    ours, our_grads, ours_after, packed, report = found[rank][f"{stage} {how}"]
    assert tiny.score_error(ours, theirs) <= 1e-5
    assert tiny.score_error(ours_after, theirs_after) <= 1e-5
    assert tiny.score_error(theirs_after, theirs) > 1e-2
    assert tiny.grad_error(our_grads, their_grads) <= 1e-4
    assert report.level == "trie" and not report.fallbacks
    assert len(packed) == len(whole) == 2 and max(packed) < min(whole)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(worker, (Path(sys.argv[1]),), 2, start_method="spawn")
