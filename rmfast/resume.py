"""What runs share that can be stopped and resumed: their state on the disk, and signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rmfast.errors import UserError

State = TypeVar("State")

_OF_MODELS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
# settings whose values are digests or times: an error only says that they changed
_DIGESTS = ("time of", "a file of", "the text of", "the preferences of")


# --- the state of a run


def stored(file: Path, kind: type[State]) -> State | None:
    """The state that an earlier run left in ``file``; None: there is no such file.

    Args:
        kind: a dataclass, whose fields the file holds as JSON.
    """
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): --overwrite starts again") from None


def same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError unless the settings that decide the result are those of the earlier run."""
    for name in {**before, **now}:
        then, value = before.get(name), now.get(name)
        if then == value:
            continue
        if None not in (then, value) and name.startswith(_DIGESTS):
            change = "changed"
        else:
            change = f"was {_shown(then)}, now it is {_shown(value)}"
        raise UserError(
            f"--resume continues the same run only, and {name} {change}; --overwrite starts again"
        )


def _shown(value: Any) -> str:
    """The value of an option in an error message."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def model_identity(name: str) -> dict[str, Any]:
    """Settings that tell a model from another one, and from itself before its folder changed."""
    folder = Path(name)
    if not folder.is_dir():
        return {"--model": name}
    paths = sorted(path for path in folder.iterdir() if path.suffix in _OF_MODELS)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return {"--model": str(folder.resolve()), "a file of --model": digest(stats)}


def digest(value: Any) -> str:
    """A digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def versions(*names: str) -> dict[str, str]:
    """The versions of rmfast, torch, transformers and the packages named."""
    found = {}
    for name in ("rmfast", "torch", "transformers", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name] = "unknown"
    return found


# --- writing


@contextlib.contextmanager
def saving(path: Path, advice: str = "; --resume continues from what is saved") -> Iterator[None]:
    """Turn an error of the disk into a UserError that names the file, or else ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written: {error.strerror or error}{advice}"
        ) from error


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a finished file to its own name, so that it survives a crash of the machine."""
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
    """Replace a file by this JSON, at one moment."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    put_in_place(beside, path)


# --- signals


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, the only one that receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
