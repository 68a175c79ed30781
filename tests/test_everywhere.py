"""Programs that know nothing of rmfast: ``rmfast.everywhere`` in them, ``rmfast run`` around."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)

import rmfast
import tiny
from rmfast.commands import main
from rmfast.integrations import everywhere as module
from rmfast.packed.patching import attached

UNIT = torch.finfo(torch.float32).eps
INPUTS = tiny.padded(tiny.rows())


class Reward(LlamaPreTrainedModel):
    """A scalar head of its own on a backbone, as trainers make it at run time."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        last = attention_mask.sum(1) - 1
        return self.value_head(hidden)[torch.arange(len(last)), last]


class Headless(LlamaForCausalLM):
    """A language model whose head was replaced by a scalar one, as ms-swift does it."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head, self.score = nn.Identity(), nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, **inputs):
        out = super().forward(**inputs, use_cache=False)
        out.logits = self.score(out.logits)
        return out


class Gated(Reward):
    """With a second head, that is not a scalar."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, 3)


@pytest.fixture(autouse=True)
def own_reports(monkeypatch):
    """No report of these models is printed when the tests end."""
    yield
    module._reports.clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a folder with a model."""
    folder = tmp_path_factory.mktemp("models")

    def save(
        name: str = "llama", cls: type = AutoModelForSequenceClassification, **options
    ) -> Path:
        path = folder / "-".join([name, cls.__name__, *map(str, options.values())])
        if not path.exists():
            tiny.model(name, cls=cls, **options).save_pretrained(path)
        return path

    return save


def scores(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(**INPUTS)
    return getattr(out, "logits", out)


def told(capsys) -> list[str]:
    """What rmfast has said on stderr."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("rmfast: ")]


# --- what is patched


@pytest.mark.parametrize(
    ("cls", "level"),
    [
        (AutoModelForSequenceClassification, "trie"),
        (AutoModelForTokenClassification, "backbone"),
        (Reward, "backbone"),
        (Headless, "backbone"),
    ],
)
def test_reward_models_are_patched_and_score_as_before(cls, level, saved):
    path = saved(cls=cls)
    theirs = cls.from_pretrained(path)
    with rmfast.everywhere(attention="sdpa"):
        ours = cls.from_pretrained(path)
    assert attached(theirs) is None and attached(cls.from_pretrained(path)) is None
    wanted = scores(theirs)
    keep = INPUTS["attention_mask"].bool() if wanted.ndim == 3 else ...  # of tokens, or sequences
    assert tiny.score_error(scores(ours)[keep], wanted[keep]) <= 16 * 96 * UNIT
    report = rmfast.report(ours)
    assert report.level == level and report.packed and not report.fallbacks
    assert attached(ours).options.attention == "sdpa"


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("llama", AutoModelForCausalLM, {}),
        ("llama", AutoModel, {}),
        ("llama", AutoModelForTokenClassification, {"num_labels": 2}),
        ("llama", Gated, {}),
        ("bert", AutoModel, {}),
    ],
)
def test_others_are_left_alone(name, cls, options, saved, capsys):
    with rmfast.everywhere():
        model = cls.from_pretrained(saved(name, cls, **options))
    assert attached(model) is None and told(capsys) == []


def test_a_class_that_is_named_is_patched(saved):
    with rmfast.everywhere(classes=["LlamaForCausalLM"]):
        path = saved(cls=AutoModelForCausalLM)
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert rmfast.report(model).level == "backbone" and not info["missing_keys"]
        assert attached(AutoModel.from_pretrained(path)) is None


def test_what_cannot_be_patched_is_told(saved, capsys):
    with rmfast.everywhere(pooling="mask"):
        own = Reward.from_pretrained(saved(cls=Reward))
        encoder = AutoModelForSequenceClassification.from_pretrained(saved("bert"))
    assert attached(own) is attached(encoder) is None
    refused, unknown = told(capsys)
    assert refused.startswith("rmfast: Reward stays as it was: pooling='mask' cannot be honoured")
    assert unknown.startswith("rmfast: BertForSequenceClassification stays as it was: ")


def test_a_wrong_option_is_an_error_at_once():
    with pytest.raises(TypeError, match="colour"):
        rmfast.everywhere(colour="red")
    with pytest.raises(ValueError, match="pooling must be one of"):
        rmfast.everywhere(pooling="last")


# --- where it ends


def test_the_original_is_back_however_the_block_ends(saved):
    before = vars(PreTrainedModel)["from_pretrained"]
    block = rmfast.everywhere()
    for _ in range(2):
        with pytest.raises(KeyError), block:
            assert vars(PreTrainedModel)["from_pretrained"] is not before
            raise KeyError
        assert vars(PreTrainedModel)["from_pretrained"] is before

    @rmfast.everywhere()
    def load():
        return AutoModelForSequenceClassification.from_pretrained(saved())

    assert attached(load()) is not None
    assert vars(PreTrainedModel)["from_pretrained"] is before


def test_blocks_are_nested(saved):
    before = vars(PreTrainedModel)["from_pretrained"]

    def load(cls=AutoModelForSequenceClassification):
        patch = attached(cls.from_pretrained(saved(cls=cls)))
        return patch and patch.options.max_tokens

    with rmfast.everywhere(["LlamaForCausalLM"], max_tokens=1):
        with rmfast.everywhere(max_tokens=2):
            assert load() == 2 and load(AutoModelForCausalLM) == 1
        assert load() == 1
    assert load() is None and vars(PreTrainedModel)["from_pretrained"] is before


def test_somebody_wraps_the_loader_meanwhile(saved, monkeypatch, capsys):
    """ms-swift does: its wrapper stays, and ours in it does nothing once the block has ended."""
    path = saved()
    with rmfast.everywhere():
        inner = PreTrainedModel.from_pretrained.__func__
        theirs = classmethod(lambda cls, *args, **kwargs: inner(cls, *args, **kwargs))
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", theirs)
        assert attached(AutoModelForSequenceClassification.from_pretrained(path)) is not None
    assert vars(PreTrainedModel)["from_pretrained"] is theirs
    assert attached(AutoModelForSequenceClassification.from_pretrained(path)) is None
    with rmfast.everywhere():
        assert attached(AutoModelForSequenceClassification.from_pretrained(path)) is not None
    assert vars(PreTrainedModel)["from_pretrained"] is theirs
    assert len(told(capsys)) == 2  # each model once, although the last has come by ours twice


def test_the_report_counts_calls_of_models_that_are_gone(saved, capsys):
    with rmfast.everywhere():
        model = AutoModelForSequenceClassification.from_pretrained(saved())
        idle = AutoModelForTokenClassification.from_pretrained(
            saved(cls=AutoModelForTokenClassification)
        )
    scores(model)
    model(**INPUTS, output_attentions=True)
    model.model(**INPUTS, use_cache=False)
    base = model.model
    del model
    gc.collect()
    base(**INPUTS, use_cache=False)
    del base, idle
    gc.collect()
    here = f"in process {os.getpid()}"
    assert told(capsys) == [  # at once, as the process may be killed
        "rmfast: LlamaForSequenceClassification is patched, level trie",
        "rmfast: LlamaForTokenClassification is patched, level backbone",
        f"rmfast: a call ran unpacked {here}: the argument output_attentions",
        f"rmfast: a call ran unpacked {here}: the classifier that was patched is gone",
    ]
    module._tell()
    assert capsys.readouterr().err.splitlines() == [
        "rmfast: level trie",
        f"  - LlamaForSequenceClassification {here}",
        "  + 1 call of LlamaForSequenceClassification ran packed",
        "  + 1 call of LlamaModel ran packed",
        "  > 1 call ran unpacked: the argument output_attentions",
        "  > 1 call ran unpacked: the classifier that was patched is gone",
        "rmfast: level backbone",
        f"  - LlamaForTokenClassification {here}",
        "  ! no call ran packed",
    ]


# --- rmfast run

RUN = "import sys; from rmfast.commands.main import main; sys.exit(main(['run', *sys.argv[1:]]))"


def run(*argv: str, path: str = "", **options) -> subprocess.CompletedProcess:
    root = str(Path(rmfast.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [path, root]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **options)


UNAWARE = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(**torch.load(sys.argv[2])).logits.tolist()))
"""


def test_the_workers_of_a_program_run_packed(saved, tmp_path):
    (tmp_path / "unaware.py").write_text(UNAWARE)
    torch.save(INPUTS, tmp_path / "inputs.pt")
    torchrun = (
        "--attention sdpa -- -m torch.distributed.run --standalone --nproc-per-node 1".split()
    )
    done = run(*torchrun, tmp_path / "unaware.py", saved(), tmp_path / "inputs.pt")
    assert done.returncode == 0, done.stderr
    theirs = scores(AutoModelForSequenceClassification.from_pretrained(saved()))
    ours = torch.tensor(json.loads(done.stdout))
    assert tiny.score_error(ours, theirs) <= 16 * 96 * UNIT
    assert done.stderr.count("rmfast: level trie") == 1  # nothing of the process that starts it
    assert "  + 1 call of LlamaForSequenceClassification ran packed\n" in done.stderr
    assert "unpacked" not in done.stderr


SPAWNS = """
import json, multiprocessing, sys
def look():
    heavy = [name for name in ("torch", "transformers", "rmfast") if name in sys.modules]
    startup = [folder for folder in sys.path if "startup" in folder]
    waits = type(sys.meta_path[0]).__name__ == "_Watch"
    print(json.dumps([waits, sys.theirs, sys.argv[1:], heavy, startup]), flush=True)
if __name__ == "__main__":
    look()
    child = multiprocessing.get_context("spawn").Process(target=look)
    child.start()
    child.join()
    sys.exit(int(sys.stdin.read()))
"""


def test_a_program_without_models_sees_nothing_of_it(tmp_path):
    """Its arguments, input, output and exit code go through, and another's sitecustomize runs."""
    (tmp_path / "spawns.py").write_text(SPAWNS)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.theirs = __name__")
    done = run("--", tmp_path / "spawns.py", "--", "-x", path=str(tmp_path), input="7")
    assert (done.returncode, done.stderr) == (7, "")
    seen = [True, "sitecustomize", ["--", "-x"], [], []]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [seen, seen]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["a.py", "--lr", "1"], [sys.executable, "a.py", "--lr", "1"]),
        (["--", "-m", "a.b", "x"], [sys.executable, "-m", "a.b", "x"]),
        (["--", "tool", "--", "x"], ["{tools}/tool", "--", "x"]),
    ],
)
def test_what_is_run(argv, command, monkeypatch, tmp_path):
    (tmp_path / "tool").touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    seen = []
    monkeypatch.setattr(os, "execve", lambda *call: seen.append(call))
    options = "--classes A,B --pooling mask --max-tokens 9 --no-share-prefixes".split()
    assert main.main(["run", *options, *argv]) == 0
    ((path, args, env),) = seen
    assert args == [part.format(tools=tmp_path) for part in command] and path == args[0]
    assert json.loads(env["RMFAST_EVERYWHERE"]) == {
        "classes": ["A", "B"],
        "attention": "auto",
        "pooling": "mask",
        "max_tokens": 9,
        "max_training_tokens": None,
        "share_prefixes": False,
    }
    assert os.listdir(env["PYTHONPATH"]) == ["sitecustomize.py"]
