"""Both benchmarks end to end on a tiny model, and their counts against plain ones.

No test here looks at a duration: only at what was run, counted and written down.
"""

import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmfast.benchmarks import contestants as shared
from rmfast.benchmarks import score, train

WORDS = "a fine day for a walk by the old mill said no one who knew that river in March".split()
LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM = 3, 32, 48, 4, 2, 8


def _text(prompt, start, length):
    words = itertools.islice(itertools.cycle(WORDS), start, start + length)
    return " ".join([*WORDS[:prompt], *words])


# ragged, with a shared prompt, an equal sequence, a prefix of another sequence, and nothing shared
PAIRS = [
    (_text(9, 3, 12), _text(9, 4, 5)),
    (_text(9, 3, 2), _text(9, 3, 12)),
    (_text(9, 3, 12), _text(4, 1, 7)),
    (_text(0, 5, 3), _text(0, 6, 20)),
    (_text(2, 0, 1), _text(2, 9, 30)),
]


@pytest.fixture(scope="module", autouse=True)
def imported_once():
    """Contestants are forks of a process that has imported all: spawned, each takes seconds."""
    context = multiprocessing.get_context("forkserver")
    llama = "transformers.models.llama.modeling_llama"
    context.set_forkserver_preload([shared.__name__, "transformers.models.auto", llama])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _: context)
        yield


@pytest.fixture(scope="module")
def rows():
    """Token ids of the sequences, as the tiny tokenizer has them."""
    vocabulary = _vocabulary()
    return [[vocabulary[word] for word in text.split()] for pair in PAIRS for text in pair]


def _vocabulary():
    return {word: i for i, word in enumerate(["<pad>", "<unk>", *dict.fromkeys(WORDS)])}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny llama with its tokenizer, and the pairs as JSONL."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(_vocabulary()), hidden_size=HIDDEN, intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, max_position_embeddings=128, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join([*lines, ""]))
    return folder


def _options(files, out, dtype):
    return [
        *("--model", str(files / "model"), "--data", str(files / "pairs.jsonl")),
        *("--dtype", dtype, "--batch-pairs", "2", "--sorted-batch", "3", "--threads", "1"),
        *("--rounds", "2", "--csv", str(out)),
    ]


def _read(path):
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(shared.COLUMNS)
    return {line["contestant"]: line for line in lines}


def _nodes(rows, batches):
    """Distinct prefixes, written out: no sorting, no sharing with the counted code."""
    return sum(
        len({tuple(rows[r][:n]) for r in b for n in range(1, len(rows[r]) + 1)}) for b in batches
    )


def _per_layer():
    """FLOPs of one token in the linear layers of one decoder layer."""
    heads = (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM
    return 2 * HIDDEN * (heads + 3 * MIDDLE)


def _check_counts(lines, rows, batches):
    """``batches``: what each contestant should have run together."""
    for name, line in lines.items():
        slots = sum(max(len(rows[row]) for row in batch) * len(batch) for batch in batches[name])
        nodes = _nodes(rows, batches[name])
        assert int(line["token_slots"]) == slots
        assert int(line["tokens"]) == sum(map(len, rows))
        assert int(line["trie_nodes"]) == nodes < sum(map(len, rows)) < slots
        assert int(line["tokens_run"]) == (nodes if name.startswith("rmfast") else slots)
        assert float(line["run_per_node"]) == pytest.approx(int(line["tokens_run"]) / nodes)


def _check_figures(lines):
    for line in lines.values():
        low, middle, high = (float(line[f"seconds{end}"]) for end in ("_min", "", "_max"))
        assert 0 < low <= middle <= high
        assert float(line["time_ratio"]) == pytest.approx(
            middle / float(lines["rmfast"]["seconds"])
        )
        assert float(line["sequences_per_second"]) == pytest.approx(2 * len(PAIRS) / middle)
        floor = float(line["flops"]) / float(line["matmul_rate"])
        assert float(line["floor_seconds"]) == pytest.approx(floor)
        assert float(line["floor_share"]) == pytest.approx(floor / middle)
        assert float(line["baseline_gb"]) > 0.05  # torch alone takes more
        assert float(line["peak_over_baseline_gb"]) == pytest.approx(
            float(line["peak_gb"]) - float(line["baseline_gb"])
        )
        assert line["model"] == "model" and line["data"] == "pairs.jsonl"
        assert (line["pairs"], line["threads"], line["rounds"]) == (str(len(PAIRS)), "1", "2")


def test_score(files, rows, tmp_path, capsys):
    out = tmp_path / "figures.csv"
    score.main(_options(files, out, "bfloat16"))
    lines = _read(out)
    assert list(lines) == ["hf", "hf-sorted", "rmfast"]
    file_order = [[0, 2, 1, 3], [4, 6, 5, 7], [8, 9]]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    by_length = [order[:3], order[3:6], order[6:9], order[9:]]
    _check_counts(lines, rows, {"hf": file_order, "hf-sorted": by_length, "rmfast": file_order})
    _check_figures(lines)
    assert float(lines["rmfast"]["run_per_node"]) == 1.0
    assert lines["rmfast"]["level"] == "trie"
    for line in lines.values():
        assert float(line["flops"]) > 0 and math.isfinite(float(line["score_difference"]))
        assert 0 < float(line["oracle_error"]) < 0.1  # of a standard deviation, in bf16
    assert float(lines["hf"]["oracle_ratio"]) == 1.0
    assert float(lines["hf"]["flops"]) == LAYERS * _per_layer() * int(lines["hf"]["tokens_run"])

    table = capsys.readouterr().out
    assert "model, bfloat16, cpu" in table.splitlines()[0]
    (ratio,) = (line for line in table.splitlines() if line.startswith("nodes run / trie nodes"))
    assert ratio.split()[-1] == "1.00"


def test_train(files, rows, tmp_path, capsys):
    out = tmp_path / "figures.csv"
    train.main(_options(files, out, "float32"))
    lines = _read(out)
    assert list(lines) == ["hf", "rmfast"]
    batches = [[0, 2, 1, 3], [4, 6, 5, 7], [8, 9]]
    _check_counts(lines, rows, dict.fromkeys(lines, batches))
    _check_figures(lines)
    assert float(lines["rmfast"]["run_per_node"]) == 1.0
    assert float(lines["rmfast"]["score_difference"]) < 1e-4
    assert float(lines["rmfast"]["grad_norm_ratio"]) == pytest.approx(1, abs=1e-4)
    hf, ours = lines["hf"], lines["rmfast"]
    assert float(hf["flops"]) == 3 * LAYERS * _per_layer() * int(hf["tokens_run"])
    whole = 3 * _per_layer() * int(ours["tokens_run"])  # of one layer on all nodes
    assert (LAYERS - 1) * whole < float(ours["flops"]) < LAYERS * whole
    assert "level trie" in capsys.readouterr().out


def test_counts_are_the_plain_ones(rows):
    generator = torch.Generator().manual_seed(0)
    few = [torch.randint(3, (n,), generator=generator).tolist() for n in (1, 6, 6, 7, 3, 1, 12, 9)]
    for batch in (rows, few, few[:1], [[5, 5, 5], [5, 5], [5]]):
        assert shared.trie_nodes(batch) == _nodes(batch, [range(len(batch))])
    assert shared.in_file_order(3, 2) == [[0, 2, 1, 3], [4, 5]]
    assert shared.by_length([[1], [1, 2, 3], [1, 2]], 2) == [[1, 2], [0]]
    assert shared.token_slots([[1], [1, 2, 3], [1, 2]], [[1, 2], [0]]) == 7


def test_padding():
    batch = shared.padded([[7, 8, 9], [5], [6, 4]], [2, 0], pad=1)
    assert batch["input_ids"].tolist() == [[6, 4, 1], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_lines_are_appended_below_the_same_columns_only(tmp_path):
    args = shared.parser("score", ["hf"], "").parse_args(["--model", "m", "--pairs", "1"])
    out = tmp_path / "figures.csv"
    for _ in range(2):
        shared.append_csv(out, "score", args, {"hf": {"seconds": 2.5}})
    header, *lines = out.read_text().splitlines()
    assert header == ",".join(shared.COLUMNS)
    assert len(lines) == 2 and all(",2.5," in line for line in lines)
    out.write_text("seconds,contestant\n1,hf\n")
    with pytest.raises(SystemExit, match="other columns"):
        score.main(["--csv", str(out)])


def test_a_process_that_fails_says_why(files, rows):
    job = shared.Job(
        None, str(files / "model"), "float32", "cpu", 1, False, False, rows, [[0]], 0
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"hf failed(.|\n)*nowhere"):
        shared.measure({"hf": dataclasses.replace(job, model=str(files / "nowhere"))}, 1)


def test_compare_needs_neither_rmfast_nor_hugging_face():
    def one(seconds, score):
        scores = [score, 1.0]
        return {
            "seconds": seconds,
            "peak_over_baseline_gb": 1.0,
            "scores": scores,
            "grad_norm": None,
        }

    figures = {"rmfast-bare": one(1.0, 0.0), "hf-sorted": one(4.0, 0.5)}
    shared.compare(figures)
    assert figures["hf-sorted"]["time_ratio"] == 4.0
    assert figures["hf-sorted"]["score_difference"] == pytest.approx(0.5 / math.sqrt(0.5))


def test_options_are_checked():
    parser = shared.parser("score", ["hf"], "")
    for wrong in (["--rounds", "0"], ["--dtype", "int8"], ["--contestants", "nobody"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_runs_as_a_module_of_the_checkout():
    root = Path(shared.__file__).parent.parent
    if not (root / "rmfast" / "trie.py").is_file():
        pytest.skip("rmfast is installed: there is no checkout to run from")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.score", "--help"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--batch-pairs" in done.stdout
