"""What a type checker makes of a user's program, where rmfast is an installed package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: rmfast[test]")

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "typing"
CONFIG = """
[mypy]
strict = true
# these take longer than all the rest
[mypy-transformers.*,sympy.*,torch._dynamo.*,torch._inductor.*,torch.distributed.*,torch.export.*]
follow_imports = skip
[mypy-torch.fx.*,torch.utils.*]
follow_imports = skip
"""
FOUND = re.compile(r"^.*/(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> set[tuple[str, int, str]]:
    """What mypy finds: program, line, and name of the mistake."""
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-pretty"]
    done = subprocess.run(
        [*command, *sorted(PROGRAMS.glob("*.py"))],
        cwd=folder,  # from the root, rmfast would be a part of the program
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"Found {len(FOUND.findall(done.stdout))} errors" in done.stdout, done.stdout
    return {(program, int(line), code) for program, line, code in FOUND.findall(done.stdout)}


def test_a_right_program_passes(found):
    assert not [one for one in found if one[0] == "user"]


def test_mistakes_are_found(found):
    lines = (PROGRAMS / "wrong.py").read_text().splitlines()
    planted = [(i, re.search(r"  # ([\w-]+)$", line)) for i, line in enumerate(lines, start=1)]
    planted = {("wrong", i, comment[1]) for i, comment in planted if comment}
    assert len(planted) == 5 and {one for one in found if one[0] == "wrong"} == planted
