"""RewardBench's own pipeline, 8 texts a batch in file order, as its command calls it.

Its class is loaded from its file: the package would import fastchat and more. What is stood in
for: the texts (a row's ids written out, which the folder's tokenizer reads back), and, without a
GPU, the ``.to("cuda")`` that it calls.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PEERS = {"rewardbench": {"batch": 8}}
PINS = ["rewardbench==0.1.4"]


class Peer:
    def __init__(self, model, dtype, device, batch):
        (folder,) = importlib.util.find_spec("rewardbench").submodule_search_locations
        spec = importlib.util.spec_from_file_location(
            "pipeline", Path(folder) / "models/pipeline.py"
        )
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).to(device)
        tokenizer = AutoTokenizer.from_pretrained(model)
        if not device.startswith("cuda"):
            made = tokenizer._encode_plus
            tokenizer._encode_plus = lambda *args, **kwargs: stay(made(*args, **kwargs))
        self.pipe = code.RewardBenchPipeline("text-classification", self.model, tokenizer)
        self.batch = batch

    def scores(self, rows):
        found, longest = [], max(map(len, rows))
        for start in range(0, len(rows), self.batch):
            texts = [" ".join(map(str, row)) for row in rows[start : start + self.batch]]
            found += self.pipe(texts, max_length=longest)[:, 0].float().cpu().tolist()
        return found


def stay(encoded):
    encoded.to = lambda _: encoded
    return encoded
