"""sentence-transformers' CrossEncoder: sequence classifiers, Qwen3-Reranker's form, its trainer."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import tiny

PINS = [
    "sentence-transformers==6.2.0", "scikit-learn==1.9.1", "scipy==1.17.1", "joblib==1.6.0",
    "cloudpickle==3.1.3", "narwhals==2.29.0", "threadpoolctl==3.8.0",
]  # fmt: skip
pytest.importorskip("sentence_transformers", reason="it is not installed: make programs")

from sentence_transformers.cross_encoder import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    losses,
)

PAIRS = [("a question", answer) for answer in ("yes, so it is", "no", "yes, so what", "no")]
PAIRS += [("another question", "yes"), ("a question", "yes, so it is, and has always been")]
TEMPLATE = (
    "Judge by yes or no."
    '{% for m in messages %} {{ "Query" if m.role == "query" else "Document" }}: {{ m.content }}'
    "{% endfor %} Answer:"
)


def encoder(folder, language=False):
    tokenizer = tiny.tokenizer(template=False)
    options = {"vocab_size": tiny.WORDS}
    if language:
        tokenizer.add_tokens(["yes", "no"])
        tokenizer.chat_template = TEMPLATE
        options = {"vocab_size": len(tokenizer), "cls": AutoModelForCausalLM}
    tiny.model("qwen3", max_position_embeddings=256, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu")


def scores(encoder, **options):
    options |= {"convert_to_tensor": True, "activation_fn": torch.nn.Identity()}
    return encoder.predict(PAIRS, show_progress_bar=False, **options)


@pytest.mark.parametrize("batch_size", [32, 3])
def test_a_sequence_classifier(batch_size, tmp_path, same):
    one = encoder(tmp_path)
    (report,) = same(lambda: scores(one, batch_size=batch_size), one.model)
    assert report.level == "trie"


def test_a_language_model_that_answers_yes_or_no(tmp_path, same):
    """As Qwen3-Reranker: pads on the left, logits of the last token alone."""
    one = encoder(tmp_path, language=True)
    (report,) = same(lambda: scores(one), one.model)
    assert report.level == "backbone"


def test_the_encoder_itself_is_patched(tmp_path, same):
    one = encoder(tmp_path)
    same(lambda: scores(one), one)


LABELS = {
    losses.BinaryCrossEntropyLoss: [1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
    losses.LambdaLoss: [[1.0, 0.0, 0.5]] * 2,
}


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("loss", LABELS)
def test_the_loss_of_its_trainer(loss, language, tmp_path, same):
    one, labels = encoder(tmp_path / "model", language), LABELS[loss]
    query, answer = zip(*PAIRS, strict=True)
    if loss is losses.LambdaLoss:
        query, answer = query[:2], [list(answer[:3]), list(answer[3:])]
    data = Dataset.from_dict({"query": query, "answer": answer, "label": labels})
    args = CrossEncoderTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    trainer = CrossEncoderTrainer(one, args, data, loss=loss(one))
    batch = next(iter(trainer.get_train_dataloader()))
    (report,) = same(lambda: trainer.compute_loss(one, dict(batch)), one.model)
    assert report.level == ("backbone" if language else "trie")
