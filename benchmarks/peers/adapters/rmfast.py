"""``rmfast.Scorer`` as it comes: it sees 1,024 rows at a time, and packs them itself."""

import torch
from transformers import AutoModelForSequenceClassification

import rmfast

PEERS = {"rmfast": {}}
SHOWS = ["triton"]


class Peer:
    def __init__(self, model, dtype, device):
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).to(device)
        self.scorer = rmfast.Scorer(self.model)

    def scores(self, rows):
        return self.scorer.score(rows).tolist()
