"""rmfast beside what else scores and trains reward models: one run, one report.

    python -m rmfast.benchmarks.peers --only rmfast vllm --workloads pairs --size 0.25 --rounds 3

docs/peers.md says how to read what it writes, and how to add an alternative.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rmfast.benchmarks import contestants
from rmfast.benchmarks.peers import environments, harness, models, report, workloads

BASELINES = {False: "hf-sorted", True: "trl"}  # of scoring and of training: they always run


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m rmfast.benchmarks.peers",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, cuda = out.add_argument, torch.cuda.is_available()
    known = environments.alternatives()
    others = [name for name in workloads.NAMES if cuda or name != "dualkv"]
    add("--only", nargs="+", choices=[*known], metavar="NAME", default=[*known],
        help=f"alternatives, of {', '.join(known)}; the baselines run besides")  # fmt: skip
    add("--workloads", nargs="+", choices=workloads.NAMES, default=others, help="what they run")
    add("--size", type=float, default=1.0, help="scales the workloads")
    add("--rounds", type=int, default=3, help="timed rounds, after an untimed one")
    add("--starts", type=int, default=1,
        help="how often all processes are started anew, each time for as many rounds: where its "
        "memory lies makes one process faster than the next")  # fmt: skip
    add("--data", type=Path, help="pairs, as rmfast train reads them; default: the embedded ones")
    add("--model", help="reward model, folder or hub name; default: the embedded one")
    add("--dtype", choices=contestants.DTYPES, default="bfloat16", help="of weights and arithmetic")
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--python", nargs="+", default=[], metavar="ADAPTER=PYTHON",
        help="run an adapter with a Python that has its packages already")  # fmt: skip
    add("--build", type=Path, default=Path("build/peers"), help="environments, models, logs")
    add("--out", type=Path, help="folder of the report; default: report in --build")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    report.check()
    known = environments.alternatives()
    chosen = {name: known[name] for name in dict.fromkeys((*BASELINES.values(), *args.only))}
    names = ["main", "tiny", *(["attention"] if "dualkv" in args.workloads else [])]
    folders = {name: models.folder(args.build, name, args.model) for name in names}
    known_ids = {name: models.vocabulary(path) for name, path in folders.items()}
    tokenizer = str(models.original(args.model))
    works = [*workloads.made(args.workloads, args.data, args.size, known_ids, tokenizer)]
    kinds = {chosen[name].trains for name in args.only}
    works = [work for work in works if work.trains in kinds]
    contest = harness.Contest(
        chosen, args.build, folders, args.dtype, args.device,
        dict(text.split("=", 1) for text in args.python),
        lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    kind = lambda work: (work.trains, work.model)  # noqa: E731  whose processes are the same
    rows = []
    for (trains, _), some in itertools.groupby(sorted(works, key=kind), kind):
        found = contest.run([*some], BASELINES[trains], args.rounds, args.starts)
        rows += report.compared(found, BASELINES[trains], contest.versions)
    out = args.out or args.build / "report"
    print(report.write(out, rows, report.facts(args), args.size))


if __name__ == "__main__":
    main()
