"""transformers' ``pipeline("text-classification")``, 16 texts a batch, without its sigmoid.

It takes text alone: a row's ids written out, which the folder's tokenizer reads back as they are.
"""

import torch
from transformers import pipeline

PEERS = {"pipeline": {"batch": 16}}


class Peer:
    def __init__(self, model, dtype, device, batch):
        self.pipe = pipeline(
            "text-classification", model=model, dtype=getattr(torch, dtype), device=device
        )
        self.model, self.batch = self.pipe.model, batch

    def scores(self, rows):
        texts = [" ".join(map(str, row)) for row in rows]
        found = self.pipe(texts, batch_size=self.batch, function_to_apply="none")
        return [one["score"] for one in found]
