"""Host time that rmfast adds to a call: to look at the model, to pack and to plan.

    python -m rmfast.benchmarks.host

A Llama of 8B's shape, plain and with LoRA on all linear layers. Its decoder layers lie on the meta
device, and the backbone's ``forward`` is replaced, on the instance, by one that returns a row of
zeros for each token: no module is taken out, so a call looks at as many as it would. The head and
the loss do run, on a CPU, where a GPU would have their launches. No GPU is needed.

Each figure is the least of several medians of CPU time, which what else runs there only adds to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import rmfast
from rmfast.packed import patching
from rmfast.packed.step import Step
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective
from rmfast.trie import pack

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0, "num_labels": 1,
    "vocab_size": 1000,  # of the embeddings, which are real
}  # fmt: skip
PAIRS, PROMPT, ANSWER, PIECES = 8, 128, 128, 16


def model(lora: bool, **shape: Any) -> nn.Module:
    """A patched sequence classifier whose layers have no values and do not run."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.device("meta"):
        out = LlamaForSequenceClassification(LlamaConfig(**{**SHAPE, **shape}))
    for part in (out.model.embed_tokens, out.model.norm, out.score):
        part.to_empty(device="cpu")
        nn.init.zeros_(part.weight)
    if lora:
        import peft

        peft.get_peft_model(out, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    width = out.config.hidden_size

    def nothing(input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        row = torch.zeros((), requires_grad=torch.is_grad_enabled())
        return (row.expand(*input_ids.shape, width),)

    out.model.forward = nothing
    return rmfast.patch(out)


def rows() -> list[np.ndarray]:
    """Pairs of a prompt and two answers: chosen, then rejected."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 1000, PROMPT) for _ in range(PAIRS)]
    return [np.r_[prompt, draw.integers(1, 1000, ANSWER)] for prompt in 2 * prompts]


def calls(lora: bool, **shape: Any) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """What is timed: its name, the call, and how many micro-batches it runs."""
    m, sequences = model(lora, **shape).eval(), rows()
    batch = {"input_ids": torch.from_numpy(np.stack(sequences))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    yield "padded batch, no_grad", torch.no_grad()(lambda: m(**batch)), 1
    m.train()
    yield "padded batch, gradients", lambda: m(**batch), 1
    pairs = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in zip(sequences[:PAIRS], sequences[PAIRS:], strict=True)
    ]
    packed, objective = Collator(0)(pairs), Objective()
    yield "training step", lambda: m(rmfast_step=Step(packed, objective)), 1
    m.eval()
    scorer = rmfast.Scorer(m)
    yield "Scorer, window of one piece", lambda: scorer.score(sequences), 1
    forward, trie = patching.attached(m).overrides[0], pack(sequences)
    budget = type(scorer._budget)(len(trie) // PIECES)
    count: list[Any] = []
    run = torch.no_grad()(lambda take: forward.run_pieces(trie, take, budget))
    run(lambda piece, _: count.append(piece))
    yield "Scorer, a piece", lambda: run(lambda *_: None), len(count)


def milliseconds(call: Callable[[], Any], repeats: int, each: int = 20) -> float:
    """The least of ``repeats`` medians of ``each`` calls."""
    medians = []
    for _ in range(repeats):
        times = []
        for _ in range(each):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        medians.append(statistics.median(times))
    return 1e3 * min(medians)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rmfast.benchmarks.host", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for lora in (False, True):
        for name, call, count in calls(lora, num_hidden_layers=args.layers):
            time_ = milliseconds(call, args.repeats) / count
            print(f"{'LoRA' if lora else 'plain':6} {name:28} {time_:7.2f} ms", flush=True)


if __name__ == "__main__":
    main()
