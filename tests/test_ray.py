"""Two actors on a local Ray: one process's scores, in order, and what a killed actor had."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from rmfast import Scorer
from rmfast.commands import main
from rmfast.errors import RowError, UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rmfast[ray]'")


@pytest.fixture(scope="module")
def cluster():
    # on one machine a worker needs no more than what this process can import
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread():
    """As Ray gives its actors: sums are then the same, bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", vocab_size=tiny.WORDS, max_position_embeddings=512).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def scored(folder):
    """What one process makes of rows: scores, or the reason why there are none."""
    from rmfast import loading

    loaded = loading.load(folder)

    def score(rows, **options):
        windows = Scorer(loaded.model, loaded.tokenizer, **options).windows(enumerate(rows))
        return [[_plain(*one) for one in window] for window in windows]

    return score


def _plain(tag, one):
    return tag, str(one.error) if one.error else one.scores.tolist()


def rows(count):
    g = np.random.default_rng(0)
    texts = ["".join(g.choice([*"abc def"], g.integers(1, 40))) for _ in range(count)]
    out = [[(f"question {i // 4}", text), text] for i, text in enumerate(texts)]
    return [*out[:5], RowError("line 6 is no JSON", "overlong"), [""], *out[5:]]


def test_two_actors_score_as_one_process_does(cluster, folder, scored):
    """And a third time when one of them is killed half-way."""
    from rmfast.integrations.ray import RayScorer

    seen, given = [], rows(60)
    expected = scored(given, window=8, max_tokens=64)
    scorer = RayScorer(
        folder, actors=2, window=8, max_tokens=64, progress=lambda *done: seen.append(done)
    )
    windows = list(scorer.windows(enumerate(given)))
    assert [[_plain(*one) for one in w] for w in windows] == expected
    assert windows[1][1][1].error.kind == "overlong"
    assert scorer.stats.rows == 60 and scorer.stats.errors == 1 and scorer.stats.overlong == 1
    assert np.sum(seen, axis=0).tolist() == [scorer.stats.conversations, scorer.stats.tokens]
    assert scorer.about()["level"] == "trie" and scorer.max_tokens == 64

    windows, actor = [], scorer._actors[0].__ray_call__
    for window in scorer.windows(enumerate(given)):
        windows.append(window)
        if len(windows) == 3:
            killed = ray.get(actor.remote(lambda _: os.getpid()))
            os.kill(killed, signal.SIGKILL)
    assert [[_plain(*one) for one in w] for w in windows] == expected
    assert ray.get(actor.remote(lambda _: os.getpid())) != killed, "it was never started again"


def test_errors_come_out_as_they_were(cluster, folder, tmp_path):
    from rmfast.integrations.ray import RayScorer

    with pytest.raises(UserError, match="cannot be loaded"):
        RayScorer(str(tmp_path), actors=1)
    with pytest.raises(UserError, match="too few for 99 actors"):
        RayScorer(folder, actors=99)


def test_the_command(cluster, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [{"n": i, "prompt": f"q{i // 4}", "response": "ab"[i % 2] * i} for i in range(40)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    common = ["score", "--model", folder, "--input", "in.jsonl", "--batch-window", "8"]
    common += ["--max-tokens", "64"]
    assert main.main([*common, "--output", "one.jsonl"]) == 1  # the first response is empty
    assert main.main([*common, "--output", "two.jsonl", "--ray", "2"]) == 1
    for name in ("{}.jsonl", "{}.jsonl.errors.jsonl"):
        one, two = (Path(name.format(x)).read_text() for x in ("one", "two"))
        assert one == two
    assert one.count("\n") == 1 and "39 of 40 rows scored" in capsys.readouterr().out


def test_a_data_set(cluster, folder, scored):
    import ray.data

    from rmfast.integrations.ray import score_dataset

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    given = [{"prompt": f"q{i // 4}", "responses": ["a" * i, "b"]} for i in range(40)]
    out = score_dataset(
        ray.data.from_items(given), folder, actors=1, rows=16, max_tokens=64
    ).take_all()
    expected = [
        scores
        for window in scored(
            [[(r["prompt"], x) for x in r["responses"]] for r in given], max_tokens=64
        )
        for _, scores in window
    ]
    assert [row["prompt"] for row in out] == [row["prompt"] for row in given]
    assert out[0]["rewards"] is None and "is empty" in out[0]["reward_error"]
    got = np.array([row["rewards"] for row in out[1:]])
    assert np.allclose(got, np.array(expected[1:]), rtol=1e-4, atol=1e-5)
    assert all(row["reward_error"] is None for row in out[1:])
