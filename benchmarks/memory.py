"""How much memory `rmfast score` takes while a long file of short rows goes through it.

    python -m rmfast.benchmarks.memory --rows 1000000

The command runs in a process of its own, with a tiny random model; its resident memory is read
every second, beside the rows that its state says are done. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import rmfast
from rmfast.demo import embedded

_SETTLED = 50_000  # rows, after which memory should be flat
_WORDS = "a river moved its bed and nobody in the town could say where the bridge had been".split()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rmfast.benchmarks.memory", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: %(default)s")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        _model(Path(folder) / "model")
        with open(Path(folder) / "in.jsonl", "w") as file:
            file.writelines(_lines(args.rows))
        readings = list(_watch(Path(folder)))
    for rows, megabytes in readings[:: max(1, len(readings) // 20)]:
        print(f"{rows:>10,} rows  {megabytes:8.1f} MB")
    settled = [megabytes for rows, megabytes in readings if rows >= _SETTLED]
    middle = sorted(settled)[len(settled) // 2]
    print(
        f"after {_SETTLED:,} rows: {min(settled):.1f} to {max(settled):.1f} MB, "
        f"{min(settled) / middle - 1:+.1%} to {max(settled) / middle - 1:+.1%} of the median; "
        f"{len(settled)} readings"
    )


def _model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(embedded.checkpoint())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lines(count: int) -> Iterator[str]:
    draw = random.Random(0)
    for i in range(count):
        text = " ".join(draw.choices(_WORDS, k=draw.randint(3, 12)))
        yield json.dumps({"id": i, "text": text}) + "\n"


def _watch(folder: Path) -> Iterator[tuple[int, float]]:
    """Rows done and megabytes resident, once a second until the command ends."""
    root = str(Path(rmfast.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = ["-c", "from rmfast.commands.main import main; raise SystemExit(main())", "score"]
    command += ["--model", "model"]
    command += ["--input", "in.jsonl", "--output", "out.jsonl"]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": path}
    )
    while process.poll() is None:
        time.sleep(1)
        with contextlib.suppress(OSError, ValueError, StopIteration):
            rows = json.loads((folder / ".out.jsonl.state.json").read_text())["rows"]
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            resident = next(line for line in lines if line.startswith("VmRSS"))
            yield rows, int(resident.split()[1]) / 1024
    if process.returncode:
        raise SystemExit(process.returncode)


if __name__ == "__main__":
    main()
