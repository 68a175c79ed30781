"""Hugging Face's backbone on rows laid end to end (no pads), FlashAttention's varlen kernel.

As many rows a call as 16,384 tokens hold, in file order; the score head on their last tokens.
"""

import itertools

import torch
from transformers import AutoModelForSequenceClassification

PEERS = {"flash-varlen": {"tokens": 16_384}}
SHOWS = ["flash-attn"]


class Peer:
    def __init__(self, model, dtype, device, tokens):
        import flash_attn  # noqa: F401  raises what is shown where it is missing

        if not device.startswith("cuda"):
            raise NotImplementedError("it runs on a GPU only")
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="flash_attention_2"
        )
        self.model.to(device).eval()
        self.most, self.device = tokens, device

    @torch.inference_mode()
    def scores(self, rows):
        parts = [[]]
        for row in rows:
            if parts[-1] and sum(map(len, parts[-1])) + len(row) > self.most:
                parts.append([])
            parts[-1].append(row)
        return [score for part in parts for score in self.call(part)]

    def call(self, rows):
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0).int().to(self.device)
        starts, longest = torch.nn.functional.pad(ends, (1, 0)), int(lengths.max())
        ids = torch.tensor(list(itertools.chain(*rows)), device=self.device)[None]
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)[None]
        hidden = self.model.base_model(
            ids, position_ids=positions, use_cache=False,
            cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest,
        )[0]  # fmt: skip
        return self.model.score(hidden[0, ends - 1])[:, 0].float().cpu().tolist()
