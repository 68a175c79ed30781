"""Paths that may not meet, the lock of an output, and what a full disk says."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmfast import resume
from rmfast.errors import UserError

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")


# --- paths


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "model", "full", "empty"):
        Path(name).mkdir()
    for name in ("in.jsonl", "data/a.jsonl", "data/b.jsonl", "model/config.json", "full/x"):
        Path(name).write_text(name)
    Path("link.jsonl").symlink_to("in.jsonl")
    os.link("in.jsonl", "hard.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    "inputs, outputs, said",
    [
        ({"--input": "in.jsonl"}, {"--json": "in.jsonl"}, "--json in.jsonl is the input"),
        ({"--input": "in.jsonl"}, {"--json": "./data/../in.jsonl"}, "is the input"),
        ({"--input": "in.jsonl"}, {"--json": "link.jsonl"}, "is the input"),
        ({"--input": "in.jsonl"}, {"--json": "hard.jsonl"}, "is the input"),
        ({"--input": "link.jsonl"}, {"--json": "in.jsonl"}, "is the input"),
        ({"--input": "link.jsonl,data/b.jsonl"}, {"--json": "data/b.jsonl"}, "is the input"),
        ({"--input": "data/*.jsonl"}, {"--json": "data/a.jsonl"}, "is the input"),
        ({"--input": "data/*.jsonl"}, {"--json": "data/new.jsonl"}, "is the input"),
        ({"--input": "data"}, {"--json": "data/deep/new"}, "lies in a folder that --input reads"),
        (
            {"--model": "data"},
            {"--json": "data/config.json"},
            "the name of a file of --model: name",
        ),
        ({"--tokenizer": "data"}, {"--scores": "data/vocab.txt"}, "a file of --tokenizer"),
        ({"--ref-model": "data"}, {"--figure": "data/model.safetensors"}, "a file of --ref-model"),
        ({"--model": "model"}, {"--output": "model/."}, "--output model/. is the model"),
        ({"--model": "org/name"}, {"--output": "org/name"}, "is the model"),
        ({}, {"--json": "new", "--scores": Path("empty/../new")}, "new is the json"),
        ({}, {"--json": "full/x"}, "--json full/x already exists: --overwrite"),
        ({}, {"--output": "full"}, "--output full already exists: --overwrite"),
    ],
)
def test_paths_that_meet(folder, inputs, outputs, said):
    for overwrite in (False, True):
        if overwrite and "already" in said:
            resume.check_paths(inputs, outputs, overwrite)
            continue
        with pytest.raises(UserError, match=said):
            resume.check_paths(inputs, outputs, overwrite)


def test_paths_that_do_not_meet(folder):
    inputs = {"--input": "data/*.jsonl", "--model": "model", "--chat-template": None}
    outputs = {"--json": "data/new.json", "--scores": "model/s", "--output": "empty", "--x": None}
    resume.check_paths(inputs, outputs, overwrite=False)
    resume.check_paths({"--input": "org/name"}, {"--output": "name"}, overwrite=False)
    resume.check_paths({"--model": "data"}, {"--json": "data/eval.json"}, overwrite=True)


# --- locks


@pytest.mark.parametrize("name", ["o.jsonl", "empty"])
def test_one_run_at_a_time(folder, name):
    path = Path(name)
    before = sorted(folder.rglob("*"))
    with resume.locked(path):
        said = rf"{name} is being .* \(process {os.getpid()} on "
        with pytest.raises(UserError, match=said), resume.locked(path):
            pass
        with resume.locked(folder / "other.jsonl"):
            pass
    with resume.locked(path):  # and again
        pass
    assert sorted(folder.rglob("*")) == before


def test_a_lock_ends_with_its_process(folder):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with resume.locked(Path("o.jsonl")):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(UserError, match=rf"process {child} on"), resume.locked(Path("o.jsonl")):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert Path(".o.jsonl.lock").exists()
    with resume.locked(Path("o.jsonl")):
        pass


def test_where_nothing_can_be_locked_it_says_so(folder, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setitem(
        sys.modules, "fcntl", type("fcntl", (), {"flock": flock, "LOCK_EX": 2, "LOCK_NB": 4})
    )
    with resume.locked(Path("o.jsonl")):
        pass
    said = capsys.readouterr().err
    assert "! o.jsonl cannot be locked (" in said and "Operation not supported)" in said


# --- a full disk


@pytest.mark.parametrize(
    "write",
    [
        lambda: Path("x").write_bytes(b"x" * 9999),
        lambda: save_file({"x": torch.zeros(9999)}, "x"),
        lambda: torch.save(torch.zeros(9999), "x"),
        lambda: resume.write_whole(Path("x"), "x" * 9999),
    ],
)
def test_what_cannot_be_written_is_told(folder, write):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"cannot be written: .*--resume"),
            resume.saving(folder),
        ):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_other_errors_are_not_of_the_disk(folder):
    with pytest.raises(RuntimeError, match="a bug"), resume.saving(folder):
        raise RuntimeError("a bug")
