"""sentence-transformers' ``CrossEncoder.predict``, 32 texts a batch (its default), no sigmoid.

It takes pairs of texts: the two halves of a row's ids written out, which the folder's tokenizer
reads back as they are, one behind the other.
"""

import torch
from sentence_transformers import CrossEncoder

PEERS = {"cross-encoder": {"batch": 32}}
PINS = [
    "sentence-transformers==6.2.0", "scikit-learn==1.9.1", "scipy==1.17.1", "joblib==1.6.0",
    "cloudpickle==3.1.3", "narwhals==2.29.0", "threadpoolctl==3.8.0",
]  # fmt: skip
SHOWS = ["sentence-transformers"]


class Peer:
    def __init__(self, model, dtype, device, batch):
        options, raw = {"dtype": getattr(torch, dtype)}, torch.nn.Identity()
        self.encoder = CrossEncoder(
            model,
            num_labels=1,
            device=device,
            model_kwargs=options,
            activation_fn=raw,
        )
        self.model, self.batch = self.encoder.model, batch

    def scores(self, rows):
        pairs = [[text(row[: len(row) // 2]), text(row[len(row) // 2 :])] for row in rows]
        return self.encoder.predict(pairs, batch_size=self.batch, show_progress_bar=False).tolist()


def text(ids):
    return " ".join(map(str, ids))
