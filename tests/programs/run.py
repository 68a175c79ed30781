"""Programs that people run reward models in, their real code, without and with the patch.

    python tests/programs/run.py --only openrlhf verl --speed

Each file here is one program. Its ``PINS`` are put into a folder of packages in front of this
Python's own, without their dependencies: torch stays as it is. What is missing then is stood in for
in the file, which says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rmfast.benchmarks.peers import environments

HERE = Path(__file__).resolve().parent
PROGRAMS = {file.stem[5:]: file for file in sorted(HERE.glob("test_*.py"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=[*PROGRAMS], metavar="NAME")
    parser.add_argument("--speed", action="store_true", help="time them, too, on SmolLM2-135M")
    parser.add_argument("--build", type=Path, default=Path("build/programs"), help="environments")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        pins = environments.constants(PROGRAMS[name], ["PINS"]).get("PINS", [])
        one = environments.Alternative(name, PROGRAMS[name], {}, pins, False)
        python, variables = environments.environment(one, args.build, {})
        command = [python, "-m", "pytest", "-q", "--disable-warnings", *["--speed"] * args.speed]
        print(f"--- {name}", flush=True)
        if subprocess.run(
            [*command, PROGRAMS[name]], env={**variables, "HF_HUB_OFFLINE": "1"}
        ).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
