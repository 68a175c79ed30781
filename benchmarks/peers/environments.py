"""The alternatives in ``adapters/``, and an environment for each whose packages are not here.

An environment is a folder of packages in front of this Python's own: torch is the same for all. An
adapter's ``PINS`` say what is in it.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import rmfast

ADAPTERS = Path(__file__).parent / "adapters"


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One entry of an adapter's ``PEERS``."""

    name: str
    file: Path
    options: dict[str, Any]  # of its Peer
    pins: list[str]
    trains: bool


def alternatives(folder: Path = ADAPTERS) -> dict[str, Alternative]:
    """All of a folder, by name. The files are read, not run: their packages are elsewhere."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        said = constants(file, ("PEERS", "PINS", "TRAINS"))
        for name, options in said["PEERS"].items():
            pins, trains = said.get("PINS", []), said.get("TRAINS", False)
            found[name] = Alternative(name, file, options, pins, trains)
    return found


def constants(file: Path, names: Collection[str]) -> dict[str, Any]:
    """Values of those names that are assigned at the top of a file of Python."""
    return {
        line.targets[0].id: ast.literal_eval(line.value)
        for line in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", None) in names
    }


def packages(one: Alternative, build: Path) -> Path | None:
    """The folder of its packages, made when it is missing or its pins have changed."""
    if not one.pins:
        return None
    folder = build / "env" / one.file.stem
    mark = folder / ".complete"
    lists = [one.file.parent / pin[3:] for pin in one.pins if pin.startswith("-r ")]
    wanted = "\n".join([*one.pins, *(file.read_text() for file in lists)])
    if not mark.is_file() or mark.read_text() != wanted:
        import uv

        print(f"{folder}: installing", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--no-config", "--no-deps"]
        command += ["--python", sys.executable, "--target", folder.resolve()]
        command += [part for pin in one.pins for part in pin.split()]
        subprocess.run(command, check=True, cwd=one.file.parent)
        mark.write_text(wanted)
    return folder


def environment(
    one: Alternative, build: Path, python: dict[str, str]
) -> tuple[str, dict[str, str]]:
    """The Python that runs it, and the environment variables.

    Args:
        one: the alternative.
        build: where environments are.
        python: by adapter, another Python, which has its packages already.
    """
    own = Path(rmfast.__file__).parent.parent
    if one.file.stem in python:
        return python[one.file.stem], {**os.environ, "PYTHONPATH": str(own)}
    folder = packages(one, build)
    paths = [str(path.resolve()) for path in (folder, own) if path is not None]
    return sys.executable, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
