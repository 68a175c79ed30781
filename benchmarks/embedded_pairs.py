"""Makes the files of ``rmfast/demo`` of the documentation of Python's standard library.

    python -m rmfast.benchmarks.embedded_pairs FOLDER

The files in the repository were made with Python 3.11.7; other versions give other pairs.

The question names a function, class or method; chosen is the beginning of its docstring, rejected
that of a sibling in the same class or module. Each question comes twice, with two siblings, and
every text is chosen as often as it is rejected: only question and answer together tell which is
better. An easy task on purpose, to be learnt in a minute: names are kept only where their words are
in their own docstring and less than half of them in a sibling's.
"""

from __future__ import annotations

import gzip
import importlib
import inspect
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TRAIN = """
    argparse base64 bisect bz2 cmd codecs codeop collections configparser contextlib csv
    datetime decimal difflib doctest email.utils enum fileinput ftplib functools gzip hashlib heapq
    http.cookiejar imaplib ipaddress itertools json linecache locale logging mailbox math mimetypes
    optparse os pathlib pdb pickletools platform poplib pprint pstats pydoc random re selectors
    shlex smtplib socket sqlite3 ssl stat struct subprocess sysconfig tarfile threading timeit
    tokenize tracemalloc types unicodedata urllib.request venv weakref webbrowser zipfile
""".split()  # not sys and inspect: libraries replace what is in there


_HELD_OUT = """
    array asyncio calendar cmath copy dis email.message fractions gettext glob graphlib html
    http.client operator queue shutil socketserver statistics string tempfile textwrap time
    traceback typing unittest.case unittest.mock urllib.parse uuid wave xml.etree.ElementTree zlib
""".split()


_QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}`.",
    "Describe `{}` in a few words.",
)


_WORDS = 50  # of a docstring
_MODULE = 16  # questions from one module at most
_SIBLINGS = range(3, 7)  # questions from one class, or from the functions of a module


def main() -> None:
    for split, groups in _groups().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(groups)]
        file = Path(sys.argv[1], f"{split}.jsonl.gz")
        file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def rows(groups: list[list[tuple[str, str]]]) -> Iterator[dict[str, Any]]:
    """The preference pairs of groups of siblings."""
    for group in groups:
        for i, (name, text) in enumerate(group):
            question = random.Random(name).choice(_QUESTIONS).format(name)
            for step in (1, 2):
                sides = {"chosen": text, "rejected": group[(i + step) % len(group)][1]}
                yield {
                    "name": name,
                    **{side: _messages(question, answer) for side, answer in sides.items()},
                }


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    contents = (("user", question), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in contents]


def _groups() -> dict[str, list[list[tuple[str, str]]]]:
    """By split: siblings as (name, docstring); no two docstrings anywhere are much alike."""
    seen: list[frozenset[str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at a deprecated name may warn
        return {
            split: [group for module in modules for group in _module_groups(module, seen)]
            for split, modules in (("held-out", _HELD_OUT), ("train", _TRAIN))
        }


def _module_groups(module: str, seen: list[frozenset[str]]) -> list[list[tuple[str, str]]]:
    order = random.Random(module)
    out: list[list[tuple[str, str]]] = []
    for siblings in _siblings(module):
        order.shuffle(siblings)
        groups: list[list[tuple[str, str]]] = []
        for name, text in siblings:
            words = frozenset(re.findall("[a-z]+", text.lower()))
            if _named_in(name, text) < 1 or any(_alike(words, other) for other in seen):
                continue
            seen.append(words)
            for group in groups:
                if len(group) < _SIBLINGS[-1] and _told_apart(name, text, group):
                    group.append((name, text))
                    break
            else:
                groups.append([(name, text)])
        for group in groups:
            if len(group) in _SIBLINGS and sum(map(len, out)) + len(group) <= _MODULE:
                out.append(group)
    return out


def _siblings(module: str) -> Iterator[list[tuple[str, str]]]:
    """Public names with their docstrings: the methods of each class, then the module's own."""
    try:
        found = vars(importlib.import_module(module))
    except ImportError:  # left out of some builds of Python
        return
    own = _own(module, found)
    for name, value in own.items():
        if inspect.isclass(value) and not name.startswith("_"):
            methods = {k: v for k, v in vars(value).items() if inspect.isroutine(v)}
            yield _documented(f"{module}.{name}", _own(module, methods))
    yield _documented(module, own)


def _own(module: str, members: dict[str, object]) -> dict[str, object]:
    """Classes and routines that are the module's: libraries add theirs while they are imported."""
    return {
        name: value
        for name, value in sorted(members.items())
        if getattr(value, "__module__", None) in (module, f"_{module}", None)
        and (inspect.isclass(value) or inspect.isroutine(value))
    }


def _documented(place: str, members: dict[str, object]) -> list[tuple[str, str]]:
    out = []
    for name, value in members.items():
        doc = getattr(value, "__doc__", None)
        text = inspect.cleandoc(doc) if isinstance(doc, str) else ""  # a slot may bear the name
        # functions written in C may begin with their signature, the others never do
        text = re.sub(r"^(?:[\w.]+\([^\n]*\)[^\n]*\n+)+", "", text)
        words = text.split()
        if not name.startswith("_") and len(words) >= 8 and words[0] != ">>>":
            out.append((f"{place}.{name}", " ".join(words[:_WORDS])))
    return out


def _told_apart(name: str, text: str, siblings: list[tuple[str, str]]) -> bool:
    return all(
        _named_in(name, other) < 0.5 and _named_in(sibling, text) < 0.5
        for sibling, other in siblings
    )


def _named_in(name: str, text: str) -> float:
    """Share of the words in a name whose first four letters begin a word of the text."""
    parts = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name.rsplit(".", 1)[-1])
    begins = {word[:4] for word in re.findall("[a-z]{3,}", text.lower())}
    hits = [part.lower()[:4] in begins for part in parts if len(part) >= 3]
    return sum(hits) / len(hits) if hits else 0.0


def _alike(left: frozenset[str], right: frozenset[str]) -> bool:
    return len(left & right) > 0.4 * len(left | right)


if __name__ == "__main__":
    main()
