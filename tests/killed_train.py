"""``rmfast train`` in forks of one process, killed and gone on with: see test_train.py.

Reads a job from stdin, and prints what became of each try as JSON.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import processes
import torch
from processes import status
from safetensors.torch import load_file
from transformers import trainer

from rmfast import resume
from rmfast.train import job as train_job
from rmfast.train import watch

WATCHED = {module.__file__ for module in (resume, train_job, trainer, watch)}
forked = functools.partial(processes.forked, watched=WATCHED)


def weights(folder: Path) -> str | None:
    """All bits of the model that a run left."""
    file = folder / "model.safetensors"
    if not file.exists():
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def metrics(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def main() -> None:
    torch.set_num_threads(1)  # a fork has one thread only
    watch._can_draw = lambda: False  # pictures take half of the time
    job = json.load(sys.stdin)
    folder = Path(job["folder"])
    argv = ["train", *job["argv"], "--output"]
    whole = folder / "whole"
    reading, writing = os.pipe()
    code = status(forked([*argv, str(whole)], log=folder / "whole.log", calls=writing))
    most = int(os.read(reading, 99))
    want = (weights(whole), metrics(whole))
    print(json.dumps({"do": "whole", "code": code, "weights": want[0]}), flush=True)
    for share in job["shares"]:
        one = folder / str(share)
        ended = status(forked([*argv, str(one)], log=folder / "log", at=int(most * share)))
        left = sorted(x.name for x in one.glob("checkpoints/*"))
        code = status(forked([*argv, str(one), "--resume"], log=folder / f"{share}.log"))
        same = (weights(one), metrics(one)) == want
        print(json.dumps({"do": "kill", "ended": ended, "left": left, "code": code,
                          "same": same}), flush=True)  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        one, log = folder / number.name, folder / f"{number.name}.log"
        child = forked([*argv, str(one)], log=log)
        while last_step(one) < 1:
            time.sleep(0.005)
        os.kill(child, number)
        ended, step = status(child), last_step(one)
        code = status(forked([*argv, str(one), "--resume"], log=folder / f"{number.name}.again"))
        print(json.dumps({"do": "stop", "ended": ended, "step": step, "said": log.read_text(),
                          "code": code, "same": weights(one) == want[0]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
