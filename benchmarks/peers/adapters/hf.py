"""Hugging Face's own forward on right-padded batches, and the same calls on a patched model.

In file order 8 rows a batch, sorted by length 16. On a GPU also with FlexAttention, with torch's
FlashAttention (it takes no mask of pads, and a causal model needs none on the right), and with
Liger's kernels where they are installed, the batches sorted by length.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForSequenceClassification

PEERS = {
    "hf": {"batch": 8},
    "hf-sorted": {"batch": 16, "by_length": True},
    "rmfast-patched": {"batch": 16, "by_length": True, "how": "patch"},
    "hf-flex": {"batch": 16, "by_length": True, "how": "flex_attention"},
    "hf-flash": {"batch": 16, "by_length": True, "how": "flash"},
    "hf-liger": {"batch": 16, "by_length": True, "how": "liger"},
}
SHOWS = ["liger-kernel"]


class Peer:
    def __init__(self, model, dtype, device, batch, by_length=False, how=""):
        if how not in ("", "patch") and not device.startswith("cuda"):
            raise NotImplementedError("it runs on a GPU only")
        attention = {"attn_implementation": how} if how == "flex_attention" else {}
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=getattr(torch, dtype), **attention
        )
        self.model.to(device).eval()
        if how == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            # Liger's own loss would take the place of the classifier's forward
            _apply_liger_kernel_to_instance(self.model, fused_linear_cross_entropy=False)
        if how == "patch":
            import rmfast

            rmfast.patch(self.model)
        self.batch, self.by_length, self.flash = batch, by_length, how == "flash"

    @torch.inference_mode()
    def scores(self, rows):
        key = (lambda i: -len(rows[i])) if self.by_length else None
        order, scores = sorted(range(len(rows)), key=key), torch.empty(len(rows))
        kernel = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.flash else contextlib.nullcontext()
        for part in (order[i : i + self.batch] for i in range(0, len(rows), self.batch)):
            width = max(len(rows[i]) for i in part)
            ids = torch.full((len(part), width), self.model.config.pad_token_id)
            for line, i in zip(ids, part, strict=True):
                line[: len(rows[i])] = torch.tensor(rows[i])
            mask = torch.arange(width) < torch.tensor([[len(rows[i])] for i in part])
            ids, mask = ids.to(self.model.device), mask.long().to(self.model.device)
            with kernel:
                logits = self.model(ids, attention_mask=None if self.flash else mask).logits
            scores[part] = logits[:, 0].float().cpu()
        return scores.tolist()
