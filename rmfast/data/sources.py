"""Which files a source names, of which kind they are, and the lines in them."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rmfast.errors import DataError, RowError

KINDS = ".jsonl, .csv (.gz or .zst after it, too) or .parquet"
_ENDINGS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "csv"}


def file_format(path: str | Path) -> tuple[str, str | None] | None:
    """``"jsonl"``, ``"csv"`` or ``"parquet"``, and ``"gz"``, ``"zst"`` or None; None: unknown."""
    name = str(path).lower()
    if name.endswith(".parquet"):
        return "parquet", None
    packed = next((end for end in ("gz", "zst") if name.endswith(f".{end}")), None)
    kind = _ENDINGS.get(os.path.splitext(name.removesuffix(f".{packed}"))[1][1:])
    return None if kind is None else (kind, packed)


def need(library: str, purpose: str) -> None:
    """Raise DataError where an optional library is not installed."""
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise DataError(f"{purpose} needs {library}: pip install 'rmfast[data]'")


def find(source: str) -> list[str]:
    """The files that a source names, all of one kind; none: a folder, or a name on the hub."""
    if os.path.isdir(source):
        return []
    found: list[str] = []
    for part in [source] if os.path.isfile(source) else source.split(","):
        files = [part] if os.path.isfile(part) else sorted(glob.glob(part, recursive=True))
        files = [file for file in files if os.path.isfile(file)]
        if not files:
            if file_format(source) is None and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
                return []
            raise DataError(f"{part}: no such file or folder")
        found += files
    for file in found:
        if file_format(file) is None:
            raise DataError(f"{file}: its name must end with {KINDS}, to say what it is")
    kinds = {file_format(file)[0] for file in found}
    if len(kinds) > 1:
        raise DataError(f"{source}: files of {' and '.join(sorted(kinds))}: name one kind")
    if len(set(map(os.path.realpath, found))) < len(found):
        raise DataError(f"{source}: a file is named twice")
    return found


def spooled() -> Any:
    """What comes from stdin, in a file that is deleted with the object, and its digest."""
    file, digest = tempfile.NamedTemporaryFile(suffix=".jsonl"), hashlib.sha256()  # noqa: SIM115
    try:
        while data := sys.stdin.buffer.read(1 << 20):
            file.write(data)
            digest.update(data)
        file.flush()
    except OSError as error:
        raise DataError(f"stdin cannot be kept in {file.name}: {error.strerror}") from None
    file.digest = digest.hexdigest()[:16]
    return file


def lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The lines of an open file, unpacked, without a byte order mark; RowError: it is damaged."""
    try:
        for number, line in enumerate(_unpacked(file, path)):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:  # of the disk
            raise
        name = {"gz": "gzip", "zst": "zstd"}[file_format(path)[1]]
        raise RowError(f"damaged {name} file, nothing after this is read: {error}") from None


def _unpacked(file: BinaryIO, path: str) -> Iterable[bytes]:
    packed = file_format(path)[1]
    if packed is None:
        return file
    if packed == "gz":
        return gzip.GzipFile(fileobj=file)
    need("pyarrow", path)
    import pyarrow

    other = open(os.dup(file.fileno()), "rb")  # noqa: SIM115 (pyarrow closes what it is given)
    return io.BufferedReader(pyarrow.CompressedInputStream(other, "zstd"))
