"""What a constraints file pins goes together, and is to be had from PyPI as it is."""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # the oldest Python of each
    "constraints.txt": "3.11",
    "constraints-oldest.txt": "3.10",
    "constraints-train.txt": "3.11",
    "constraints-gpu.txt": "3.12",
}


def resolve(file: Path, python: str) -> subprocess.CompletedProcess:
    """All pins together, for Linux and this Python or a newer one; nothing is installed."""
    uv = pytest.importorskip("uv", reason="uv is not installed: rmfast[test]").find_uv_bin()
    env = {k: v for k, v in os.environ.items() if not k.startswith("UV_")}
    command = [uv, "pip", "compile", file, "--universal", "--python-version", python]
    command += ["--no-config", "--no-python-downloads"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("Failed to fetch|error sending request", done.stderr):
        pytest.skip("PyPI cannot be reached")
    return done


@pytest.mark.parametrize("name", FILES)
def test_pins_resolve_against_plain_pypi(name):
    done = resolve(ROOT / name, FILES[name])
    assert done.returncode == 0, done.stderr


def test_pins_that_do_not_go_together_are_found(tmp_path):
    """torch 2.13.0 of PyPI needs triton 3.7.1; a CPU build of it does not say so."""
    file = tmp_path / "constraints.txt"
    file.write_text("torch==2.13.0\ntriton==3.9.0\n")
    done = resolve(file, "3.11")
    assert done.returncode and "torch==2.13.0 depends on triton" in done.stderr


OLDEST = {
    "constraints-oldest.txt": ("", "torch transformers triton numpy"),
    "constraints-train.txt": ("train", "transformers trl"),
}


@pytest.mark.parametrize("file", OLDEST)
def test_the_oldest_are_what_setup_promises(file):
    extra, names = OLDEST[file]
    pinned = {}
    for line in (ROOT / file).read_text().splitlines():
        if "==" in line:
            one = Requirement(line)
            pinned[one.name.lower()] = str(one.specifier).removeprefix("==")
    promised = {}
    for text in importlib.metadata.requires("rmfast"):
        one = Requirement(text)
        of_extra = one.marker is not None and "extra" in str(one.marker)
        if of_extra == bool(extra) and (not of_extra or one.marker.evaluate({"extra": extra})):
            for limit in one.specifier:
                promised[one.name] = limit.version
    for name in names.split():
        assert pinned[name] in (promised[name], promised[name] + ".0"), name
