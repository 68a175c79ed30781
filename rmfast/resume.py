"""What runs share that can be stopped and resumed: their paths, locks, state, and signals."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any, TypeVar

from rmfast.errors import UserError

State = TypeVar("State")

_OF_MODELS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
# settings whose values are digests or times: an error only says that they changed
_DIGESTS = ("time of", "a file of", "the files of", "the text of", "the preferences of")
# what safetensors and torch.save say in errors of their own when they cannot write
_FULL_DISK = ("Error while serializing", "unexpected pos", "PytorchStreamWriter failed")
# options that name models: an output may lie in the folder of one
_MODELS = ("--model", "--ref-model", "--tokenizer")
# what models and tokenizers are read from
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model|jinja|py|index\.json)$|(config|generation_config|adapter_config|"
    r"tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$|(vocab|merges)\.txt$"
)


def check_paths(inputs: dict[str, Any], outputs: dict[str, Any], overwrite: bool) -> None:
    """See that no two paths of a command meet, and that nothing is lost that exists.

    Args:
        inputs, outputs: paths by the names of their options, ``"--input"``; None: not given. An
            input may be a pattern, several paths with commas between them, or a name on the hub.
        overwrite: outputs may be there: they may be replaced, or are checked elsewhere.
    """
    places = [(name, place) for name, value in inputs.items() for place in _places(value)]
    for name, value in outputs.items():
        if value is None:
            continue
        path = os.path.realpath(value)
        for other, place in places:
            if _meet(path, place, other in inputs):
                known = other.removeprefix("--")
                raise UserError(f"{name} {value} is the {known}: give it another name")
            inside = os.path.isdir(place) and Path(place) in Path(path).parents
            if inside and other in inputs and other not in _MODELS:
                raise UserError(f"{name} {value} lies in a folder that {other} reads: name another")
            if inside and other in _MODELS and _MODEL_FILE.match(os.path.basename(path)):
                raise UserError(f"{name} {value} has the name of a file of {other}: name another")
        is_there = bool(os.listdir(path)) if os.path.isdir(path) else os.path.exists(path)
        if is_there and not overwrite:
            raise UserError(f"{name} {value} already exists: --overwrite replaces it")
        places.append((name, path))


def _places(value: Any) -> list[str]:
    """What an input names: a path, or several and patterns, these with the files that match."""
    if value is None or str(value) == "-":
        return []
    parts = [str(value)] if os.path.exists(value) else str(value).split(",")
    found = [path for part in parts for path in (part, *glob.glob(part, recursive=True))]
    return list(map(os.path.realpath, found))


def _meet(path: str, other: str, is_input: bool) -> bool:
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    patterns = (other, other.replace("**/", "")) if is_input and not os.path.exists(other) else ()
    return path == other or any(PurePath(path).match(pattern) for pattern in patterns)


def make_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """Make the folder of ``--output``, which may be there; raises UserError where it cannot be."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    check_paths(inputs, {"--output": folder}, overwrite=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing an output, a file or a folder that is there.

    The lock ends with its process, however that ends. UserError: another process has it.
    """
    at = Path(os.path.realpath(path))  # of a link, what it leads to
    name = at / ".lock" if at.is_dir() else at.with_name(f".{at.name}.lock")
    with saving(path):
        file = open(name, "ab+", buffering=0)  # noqa: SIM115 (closed below)
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            is_ours = False  # not found: another run has ended, and deleted it, just now
        except (OSError, ImportError) as error:
            warning = f"! {path} cannot be locked ({error}): let no other run write it"
            print(warning, file=sys.stderr)
            is_ours = True
        if not is_ours:
            file.seek(0)
            who = file.read(200).decode(errors="replace")
            words = "wait for it, or name another output"
            raise UserError(f"{path} is being written by another run{who}: {words}")
        with contextlib.suppress(OSError):  # a full disk is told when something is lost
            file.truncate(0)
            file.write(f" (process {os.getpid()} on {platform.node()})".encode())
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


def stored(file: Path, kind: type[State]) -> State | None:
    """The dataclass that an earlier run left in ``file`` as JSON; None: there is no such file."""
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
        if then == value or (name not in before and not value):  # an option that is newer
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


def model_identity(option: str, name: str | None) -> dict[str, Any]:
    """Settings that tell a model from another one, and from itself before its folder changed."""
    if name is None or not Path(name).is_dir():
        return {option: name}
    folder = Path(name)
    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths = [path for path in names if path.suffix in _OF_MODELS]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return {option: str(folder.resolve()), f"a file of {option}": digest(stats)}


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


@contextlib.contextmanager
def saving(path: Path, advice: str = "; --resume continues from what is saved") -> Iterator[None]:
    """Turn an error of the disk into a UserError that names the file, or else ``path``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(said in str(error) for said in _FULL_DISK):
            raise
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise UserError(f"{name or path}: cannot be written: {reason or error}{advice}") from error


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
    """Replace a file by this text, or by this value as JSON, at one moment."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(value, encoding="utf-8")
    put_in_place(beside, path)


@contextlib.contextmanager
def handling(handler: Callable[..., None], *numbers: int) -> Iterator[None]:
    """Let a function handle these signals."""
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread, which alone hears of signals
        for number in numbers:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def told_to_stop() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM end the run as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    return handling(stop, signal.SIGTERM)


def interrupted(command: str, what_is_kept: str = "") -> int:
    """Say that a command was interrupted; returns its exit code."""
    print(f"\nrmfast {command}: interrupted{what_is_kept}", file=sys.stderr)
    return 130
