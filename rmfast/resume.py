"""What runs that can be stopped and resumed share: files put in place whole, digests, signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rmfast.errors import UserError


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; --resume "
            "goes on from the last checkpoint"
        ) from error


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a finished file to where it belongs, so that it outlives a crash of the machine."""
    with open(beside, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: Path, value: Any) -> None:
    """Replace a file by this JSON in one moment."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    put_in_place(beside, path)


_OF_MODELS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UserError(
            f"{where}: cannot be written: {error.strerror or error}; what was done is kept, and "
            "--resume goes on"
        ) from error


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone hears of signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def model_identity(name: str) -> dict[str, Any]:
    """What tells a model from another, or from itself before somebody changed its folder."""
    folder = Path(name)
    if not folder.is_dir():
        return {"--model": name}
    about = sorted(f for f in folder.iterdir() if f.suffix in _OF_MODELS)
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in about]
    return {"--model": str(folder.resolve()), "a file of --model": digest(files)}


def digest(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def short(value: Any) -> str:
    """A value of an option, for people."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def versions(*names: str) -> dict[str, str]:
    """The versions of rmfast, torch, transformers and the packages named."""
    return {name: _version(name) for name in ("rmfast", "torch", "transformers", *names)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
