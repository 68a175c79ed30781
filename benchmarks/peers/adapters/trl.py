"""Training: an epoch of TRL's ``RewardTrainer``, its model plain and patched, and of rmfast's.

8 pairs a step in file order, all else as TRL sets it (AdamW, gradient checkpointing; fp32 weights
under bf16 autocast), but a learning rate of 0: each pass then trains the same weights, and its
losses and gradient norms can be compared. Rows are chosen, rejected, chosen, ...
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

PEERS = {"trl": {}, "trl-patched": {"how": "patch"}, "rmfast-trainer": {"how": "rmfast"}}
TRAINS = True
SHOWS = ["trl"]


class Peer:
    def __init__(self, model, dtype, device, how=""):
        if how == "rmfast":
            from rmfast.train.trainer import RewardConfig, RewardTrainer
        else:
            from trl import RewardConfig, RewardTrainer
        self.trainer, self.tokenizer = RewardTrainer, AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype="float32")
        self.folder = tempfile.TemporaryDirectory()
        self.args = RewardConfig(
            output_dir=self.folder.name, num_train_epochs=1, per_device_train_batch_size=8,
            bf16=dtype == "bfloat16", fp16=dtype == "float16", learning_rate=0.0, max_length=None,
            train_sampling_strategy="sequential", use_cpu=device == "cpu", save_strategy="no",
            report_to="none", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        if how == "patch":
            import rmfast

            rmfast.patch(self.model)

    def train(self, rows):
        data = Dataset.from_dict({"chosen_ids": rows[::2], "rejected_ids": rows[1::2]})
        trainer = self.trainer(
            self.model, self.args, train_dataset=data, processing_class=self.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
        return {name: [line[name] for line in logged] for name in ("loss", "grad_norm")}
