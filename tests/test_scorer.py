"""The scorer: Hugging Face's scores whatever the budget, the window and the order."""

import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmfast
import tiny
from rmfast import Scorer
from rmfast.data import Pair
from rmfast.data.form import Form
from rmfast.errors import DataError, RowError
from rmfast.packed import patching, pieces
from rmfast.packed.attention import Carried
from rmfast.score import memory
from rmfast.score.bulk import evaluating

TALK = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yes"}]


def draw(seed, *lengths):
    g = np.random.default_rng(seed)
    return [g.integers(3, tiny.VOCAB, n).tolist() for n in lengths]


def groups(seed=0):
    """Long prefixes inside long prefixes, a duplicate, a prefix of another row, and strangers."""
    p, q, a, b, c, d, e = draw(seed, 20, 15, 5, 3, 30, 40, 1)
    return [p + a, p[:7], p + q + b, c, p + q + d, p + q, e, p + q + d, p + q[:9] + c, p + q + a]


def one_by_one(model, rows):
    """Hugging Face, a row at a time: nothing padded, nothing shared."""
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor([r])).logits[0, 0].item() for r in rows])


# --- pieces


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 20),
)
def test_pieces_are_the_trie(rows, most):
    """Each node in one piece; what it sees inside the piece is what it sees in the whole trie."""
    trie = rmfast.pack(rows)
    end, start, seen = trie.subtree_end.numpy(), 0, []
    path = np.array([], int)
    for _ in range(len(trie)):
        piece = pieces.cut(trie, start, most)
        own = np.arange(start, piece.stop)
        nodes = np.concatenate([path, own])
        assert piece.start == start and 1 <= own.size <= most and piece.carried == path.size
        assert np.array_equal(piece.trie.input_ids, trie.input_ids[nodes])
        assert np.array_equal(piece.trie.position_ids, trie.position_ids[nodes])
        inside = piece.trie.subtree_end.numpy()
        for q in own:
            ancestors = [k for k in range(q + 1) if q < end[k]]
            at = path.size + q - start
            assert nodes[[k for k in range(at + 1) if at < inside[k]]].tolist() == ancestors
        assert nodes[piece.trie.pool_index.numpy()].tolist() == trie.pool_index[piece.rows].tolist()
        seen += piece.rows.tolist()
        assert piece.old == np.isin(nodes[piece.keep.numpy()], path).all()
        assert not piece.old or piece.keep.tolist() == list(range(len(piece.keep)))
        path, start = nodes[piece.keep.numpy()], piece.stop
        if start == len(trie):
            break
    assert sorted(seen) == list(range(len(rows))) and not path.size


def test_a_cut_is_made_where_little_is_carried():
    p, *rest = draw(0, 10, 6, 6, 6, 6)
    trie = rmfast.pack([p + r for r in rest])
    piece = pieces.cut(trie, 0, 20)
    assert piece.stop == 16 and len(piece.keep) == 10  # between two answers, not inside one


def test_what_was_carried_already_is_handed_on_without_a_copy():
    p, *rest = draw(0, 10, 6, 6, 6, 6)
    piece = pieces.cut(rmfast.pack([p + r for r in rest]), 16, 10)
    layer, before = torch.nn.Module(), (torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    carried = Carried(piece.carried, piece.keep, {layer: before}, piece.old)
    joined = carried.join(layer, *torch.randn(2, 1, 2, 6, 4))
    for old, kept, whole in zip(before, carried.after[layer], joined, strict=True):
        assert torch.equal(kept, whole[:, :, piece.keep]) and kept.data_ptr() == old.data_ptr()


@pytest.mark.parametrize("family", "llama gemma3_text gpt_oss gpt2 deepseek_v3 phi3".split())
def test_carried_keys_and_values(family):
    """fp64, so that what is left is the model's own fp32 parts."""
    model = tiny.model(family, torch.float64)
    rows = groups()
    expected = one_by_one(model, rows)
    for most in (1, 4, 13, 30, 1000):
        scorer = Scorer(model, max_tokens=most)
        error = np.abs(scorer.score(rows) - expected.astype(np.float32)).max()
        assert error <= 1e-6 * expected.std(), (most, error)
        assert scorer.stats.tokens_run == scorer.stats.nodes == len(rmfast.pack(rows))


def test_compiled_layers_carry_too():
    model = tiny.model("llama", num_hidden_layers=2)
    expected = one_by_one(model, groups())
    for layer in model.model.layers:  # inductor takes seconds, and test_compose.py has it
        layer.compile(dynamic=True, backend="eager")
    got = Scorer(model, max_tokens=12).score(groups())
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()


# --- the same scores


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.integers(1, 80), window=st.integers(1, 12))
def test_scores_do_not_depend_on_budget_window_and_order(seed, most, window):
    model, rows, expected = _llama(seed % 3)
    order = np.random.default_rng(seed).permutation(len(rows))
    scorer = Scorer(model, max_tokens=most, window=window)
    got = scorer.score([rows[i] for i in order])
    assert np.abs(got - expected[order]).max() <= 1e-4 * expected.std()
    assert scorer.stats.nodes <= scorer.stats.tokens
    assert scorer.stats.tokens_run == scorer.stats.nodes


@functools.cache
def _llama(seed):
    model, rows = tiny.model("llama"), groups(seed)
    return model, rows, one_by_one(model, rows)


@pytest.mark.parametrize("family", ["llama", "bloom", "jamba", "bert"])
@pytest.mark.parametrize("pooling", ["hf", "mask"])
def test_pad_tokens_inside_and_at_the_end(family, pooling):
    """Hugging Face's rule goes by the token, whatever it is there for."""
    if family == "bert" and pooling == "mask":
        pytest.skip("BERT does not score by its last token, and pooling='mask' is refused")
    model = tiny.model(family)
    rows = [[5, 6, 0], [5, 6], [0, 7, 0, 0], [0, 0], [5, 0, 6]]
    kept = {"hf": [[5, 6], [5, 6], [0, 7], [0], [5, 0, 6]], "mask": rows}[pooling]
    rows, kept = (rows, kept) if family != "bert" else (rows, rows)
    expected = one_by_one(model, kept) if pooling == "hf" else _last(model, rows)
    got = Scorer(model, pooling=pooling).score(rows)
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()


def _last(model, rows):
    """Scores of the last token, by way of a pad token that no row has."""
    before, model.config.pad_token_id = model.config.pad_token_id, 96
    expected = one_by_one(model, rows)
    model.config.pad_token_id = before
    return expected


def test_without_a_pad_token():
    for family in ("llama", "bloom"):
        model = tiny.model(family, pad_token_id=None)
        rows = groups()
        expected = one_by_one(model, rows)
        assert np.abs(Scorer(model).score(rows) - expected).max() <= 1e-4 * expected.std()


def test_a_model_with_a_head_of_its_own():
    class Valued(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny.model("llama").model
            self.value = torch.nn.Linear(32, 1)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.model(input_ids, attention_mask=attention_mask)[0]
            last = attention_mask.sum(1) - 1
            return type("Out", (), {"logits": self.value(hidden)[range(len(last)), last]})

    model, rows = Valued(), groups()
    rows += [[*row, tiny.PAD] for row in rows[:3]]  # its rule is not to pass over the pad token
    with torch.no_grad():
        expected = [model(x := torch.tensor([r]), torch.ones_like(x)).logits.item() for r in rows]
    scorer = Scorer(model, max_tokens=150)
    assert rmfast.report(model).level == "backbone"
    assert np.abs(scorer.score(rows) - expected).max() <= 1e-4 * np.std(expected)
    assert scorer.stats.nodes < scorer.stats.tokens_run


READS = {
    "the last attended": (lambda h, ids, mask: h[range(len(h)), mask.sum(1) - 1], False),
    "the mean": (lambda h, ids, mask: (h * mask[..., None]).sum(1) / mask.sum(1)[:, None], False),
    "the last": (lambda h, ids, mask: h[:, -1], True),
    "the mean of all": (lambda h, ids, mask: h.mean(1), True),
    "the last 3": (lambda h, ids, mask: h[range(len(h)), (ids == 3).cumsum(1).argmax(1)], False),
    "the last 0": (lambda h, ids, mask: h[range(len(h)), (ids == 0).cumsum(1).argmax(1)], True),
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_reads_pads_gets_none(reads, dtype):
    take, counts = READS[reads]

    class Valued(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny.model("llama", dtype).model
            self.config = self.model.config
            self.value = torch.nn.Linear(32, 1).to(dtype)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.model(input_ids, attention_mask=attention_mask)[0]
            return types.SimpleNamespace(logits=self.value(take(hidden, input_ids, attention_mask)))

    model, rows = Valued(), [[*row, 3, 0] if "0" in reads else [*row, 3] for row in groups()]
    with torch.no_grad():
        expected = [model(x := torch.tensor([r]), torch.ones_like(x)).logits.item() for r in rows]
    scorer = Scorer(model, max_tokens=150)
    error = np.abs(scorer.score(rows) - expected).max() / np.std(expected)
    assert error <= (1e-4 if dtype is torch.float32 else 0.1)
    said = [text for text in scorer.about()["warnings"] if "reads what pads a batch" in text]
    assert bool(said) is counts


def test_a_model_that_records_its_training():
    """Texts of a model that rmfast trained become the tokens of the training."""
    model = tiny.model("llama", vocab_size=tiny.WORDS, max_position_embeddings=512)
    tokenizer = tiny.tokenizer()
    Form(False, True, False, None, 40, "hf").record(model.config)
    scorer = Scorer(model, tokenizer)
    texts, pairs = ["a b", ("a ", "b")], [{"prompt": "a ", "chosen": "b", "rejected": "c"}]
    want = one_by_one(model, [[*tokenizer(x)["input_ids"], 2] for x in ("a b", "a c")])
    assert np.allclose(scorer.score(texts), want[0], atol=1e-5)
    assert np.allclose(scorer.score_pairs(pairs), want, atol=1e-5)
    assert np.allclose(scorer.score_pairs([("a b", "a c")]), want, atol=1e-5)
    with pytest.raises(DataError, match="row 0: 41 tokens, more than max_length 40"):
        scorer.score(["x" * 40])
    assert scorer.about()["form"] == {
        "text": "as it is", "end_of_text": True, "bos": False, "max_length": 40,
        "as_recorded_in_training": True, "warnings": [],
    }  # fmt: skip
    other = Scorer(model, tokenizer, chat=True, end_of_text=False, max_length=99)
    plain = tokenizer.apply_chat_template([{**TALK[0], "content": "a"}, TALK[1]])["input_ids"]
    assert np.allclose(other.score([("a", "yes")]), one_by_one(model, [plain]), atol=1e-5)


def test_a_window_of_rope_that_depends_on_the_length():
    """Rows beyond the limit run alone, as Hugging Face runs the first row of all."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.model("llama", rope_parameters=rope, max_position_embeddings=32)
    rows = groups()
    expected = np.concatenate([one_by_one(copy.deepcopy(model), [row]) for row in rows])
    scorer = Scorer(model, max_length=1000, window=3)
    assert np.abs(scorer.score(rows) - expected).max() <= 1e-4 * expected.std()
    assert scorer.stats.tokens_run > scorer.stats.nodes


def test_scores_of_one_run_are_rounded_alike():
    """Rows that run padded, beside rows that run packed, of a model in bf16."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    options = {"rope_parameters": rope, "max_position_embeddings": 32}
    model, exact = (tiny.model("llama", kind, **options) for kind in (torch.bfloat16, torch.double))
    exact.load_state_dict(model.state_dict())
    rows = [row for seed in range(4) for row in groups(seed)]
    # a model each: a long row's frequencies are kept, and change the next one's score
    oracle, theirs = (
        np.concatenate([one_by_one(copy.deepcopy(m), [row]) for row in rows])
        for m in (exact, model)
    )
    scorer = Scorer(model, max_length=1000)
    ours = scorer.score(rows)
    long = np.array([len(row) >= 32 for row in rows])
    assert 5 < long.sum() < len(rows) - 5 and rmfast.report(model).fallbacks
    for which in (long, ~long):
        rounded = torch.from_numpy(ours[which]).bfloat16().float().numpy() == ours[which]
        assert rounded.mean() < 0.2, "2 to the -16 of them by chance"
        error, their_error = (np.linalg.norm((x - oracle)[which]) for x in (ours, theirs))
        assert error <= 1.1 * their_error + 2**-8 * np.abs(oracle).max()
    assert not any("fp32" in warning for warning in scorer.about()["warnings"])


def test_a_model_that_was_changed_since():
    model = tiny.model("mistral")
    scorer = Scorer(model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3
    expected = one_by_one(model, groups())
    assert np.abs(scorer.score(groups()) - expected).max() <= 1e-4 * expected.std()
    assert rmfast.report(model).fallbacks


def test_a_model_that_was_unpatched_or_patched_anew():
    for change in (rmfast.unpatch, lambda m: rmfast.patch(m, pooling="mask")):
        model = tiny.model("llama")
        scorer = Scorer(model)
        change(model)
        with pytest.raises(RuntimeError, match="since this Scorer was made"):
            scorer.score([[5]])


# --- a model that is patched already


def test_what_the_model_was_patched_with_stays():
    options = {
        "share_prefixes": False, "prune_last_layer": False, "pooling": "mask",
        "attention": "sdpa", "max_tokens": 24, "max_training_tokens": 9, "cuda_graphs": True,
    }  # fmt: skip
    for family in ("llama", "bloom"):
        model = rmfast.patch(tiny.model(family), **options)
        patch = patching.attached(model)
        assert dataclasses.asdict(patch.options) == options
        rows = [[5, 6, 0], [5, 6], [0, 7, 0, 0]]
        scorer = Scorer(model)
        assert patching.attached(model) is patch and scorer.max_tokens == 24
        got = scorer.score(rows)
        expected = _last(tiny.model(family), rows)
        assert np.abs(got - expected).max() <= 1e-4 * expected.std()
        named = Scorer(model, pooling="hf", attention="auto", max_tokens=30)
        now = options | {"pooling": "hf", "attention": "auto"}
        assert dataclasses.asdict(patching.attached(model).options) == now
        assert named.max_tokens == 30
        expected = one_by_one(tiny.model(family), [[5, 6], [5, 6], [0, 7]])
        assert np.abs(named.score(rows) - expected).max() <= 1e-4 * expected.std()


def test_a_limit_of_none_is_none_of_the_scorers(monkeypatch):
    monkeypatch.setattr(memory, "most_tokens", lambda *_: 77)
    for limit, most in ((None, 77), (0, 77), (50, 50)):
        model = rmfast.patch(tiny.model("llama"), max_tokens=limit)
        assert Scorer(model).max_tokens == most
        assert patching.attached(model).options.max_tokens == limit


def test_a_patch_that_is_refused_leaves_the_one_that_was_there():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = tiny.model("llama").model, torch.nn.Linear(32, 1)

    model = rmfast.patch(Own(), share_prefixes=False)
    patch = patching.attached(model)
    for refused in (rmfast.patch, Scorer):
        with pytest.raises(ValueError, match="cannot be honoured"):
            refused(model, pooling="mask")
        assert patching.attached(model) is patch and patch.active
        assert model.model.__dict__["forward"] is patch.overrides[0]


def test_two_scorers_of_one_model():
    model, rows = tiny.model("llama"), groups()
    first, second = Scorer(model), Scorer(model, max_tokens=20)
    assert np.allclose(first.score(rows), second.score(rows), atol=1e-5)


# --- threads


def together(works, times=1):
    """What functions give that threads call at once, each so often."""
    gate = threading.Barrier(len(works))

    def one(work):
        gate.wait()
        return [work() for _ in range(times)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
            return [future.result() for future in [pool.submit(one, work) for work in works]]
    finally:
        sys.setswitchinterval(before)


def test_threads_that_share_a_model_that_trains():
    """Each finds it in eval mode, however often another one leaves that."""
    model = tiny.model("llama", attention_dropout=0.5)
    rows = [groups(seed) for seed in range(4)]
    alone = [Scorer(model, max_tokens=40).score(some) for some in rows]
    model.train()
    shared = Scorer(model, max_tokens=40)
    scorers = [shared, shared, Scorer(model, max_tokens=40), Scorer(model, max_tokens=25)]
    works = [
        functools.partial(scorer.score, some) for scorer, some in zip(scorers, rows, strict=True)
    ]
    for want, got in zip(alone, together(works, 5), strict=True):
        for scores in got:
            assert np.abs(scores - want).max() <= 1e-4 * want.std()
    assert all(module.training for module in model.modules())
    assert shared.stats.conversations == 2 * 5 * 10 == shared.stats.rows


def test_threads_whose_rows_change_the_rotary_frequencies():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.model("llama", rope_parameters=rope, max_position_embeddings=32)
    scorer = Scorer(model, max_length=1000)
    rows = [draw(seed, 40 + seed, 33, 60, 5) for seed in range(3)]
    alone = [scorer.score(some) for some in rows]
    works = [functools.partial(scorer.score, some) for some in rows]
    for want, got in zip(alone, together(works, 5), strict=True):
        assert all(np.abs(scores - want).max() <= 1e-4 * want.std() for scores in got)


def test_bars_of_two_streams_at_once(capsys, monkeypatch):
    counts = []

    class Bar:
        def __init__(self, total, **_):
            counts.append(0)
            self.at = len(counts) - 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            counts[self.at] += count

    monkeypatch.setattr("tqdm.tqdm", Bar)
    scorer = Scorer(tiny.model("llama"), progress=True, window=2)
    rows = groups()
    for _ in zip(scorer.stream(rows), scorer.stream(rows[:6]), strict=False):
        pass
    assert counts == [8, 6]  # windows of two: the seventh row was read, and there was no other


# --- what goes in and comes out


def test_every_kind_of_input_in_order():
    model = tiny.model("llama", vocab_size=tiny.WORDS, max_position_embeddings=512)
    tokenizer = tiny.tokenizer()
    given = ["plain", TALK, ("hé", "yes"), "ünïcödé 🙂 \x00", tokenizer("plain")["input_ids"]]
    scorer = Scorer(model, tokenizer)
    got = scorer.score(given)
    expected = one_by_one(model, [x.tolist() for x in scorer.encoder(given)])
    assert got.dtype == np.float32 and got.shape == (5,)
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
    assert got[1] == got[2] and got[0] == got[4]
    pairs = [(TALK, "plain"), {"prompt": "hé", "chosen": "yes", "rejected": "no"},
             Pair("yes", "no", "hé"), {"chosen": TALK, "rejected": TALK}]  # fmt: skip
    both = scorer.score_pairs(pairs)
    assert both.shape == (4, 2) and both.dtype == np.float32
    ended = scorer.score(["plain</s>"])[0]  # as TRL ends a side
    assert np.allclose(both[0], [got[1], ended]) and np.array_equal(both[1], both[2])
    assert both[3, 0] == both[3, 1]


def test_pairs_of_token_ids_and_pairs_that_cannot_be_scored():
    scorer = Scorer(tiny.model("llama"), tiny.tokenizer())
    ids = scorer.score_pairs([{"chosen": [5, 6], "rejected": [7]}, ([5, 6], [7])])
    assert np.allclose(ids[0], ids[1])
    for bad, reason in (
        ({"chosen": "a"}, '"rejected" is missing'),
        ({"chosen": "a", "rejected": "b", "context": "q"}, 'has "context", which seems to'),
        ({"chosen": "a", "rejected": TALK}, '"chosen", "rejected" must all be text'),
        (Pair([5, 6], [7], "hé"), '"chosen" message 0 must be an object'),
        (Pair("a", "b", 3), '"prompt" must be text or a list of messages'),
    ):
        with pytest.raises(DataError, match=f"^row 1: {reason}"):
            scorer.score_pairs([("a", "b"), bad])


class Table:  # what pandas and polars have in common
    columns = ("text", "id")

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return 2


SINGLE = ["hello", b"hello", TALK, TALK[:1], ("a", "b"), (TALK[:1], "b"), (TALK[:1], TALK[1:])]
SINGLE += [[1, 2, 3], np.array([1, 2]), torch.tensor([1, 2]), TALK[0], Table()]


@pytest.mark.parametrize("given", SINGLE, ids=lambda given: type(given).__name__)
def test_one_conversation_is_no_list_of_them(given):
    """Most could be gone through: letters, keys, the two texts of a tuple."""
    scorer = Scorer(tiny.model(vocab_size=tiny.WORDS), tiny.tokenizer())
    message = "conversations must be a list of conversations, not a"
    for score in (
        scorer.score,
        lambda given: list(scorer.stream(given)),
        lambda given: list(scorer.windows([("tag", given)])),
    ):
        with pytest.raises(TypeError, match=message):
            score(given)
    assert not scorer.stats.conversations


@pytest.mark.parametrize(
    "given",
    ["hi", ("a", "b"), {"chosen": "a", "rejected": "b"}, Pair("a", "b")],
    ids=lambda given: type(given).__name__,
)
def test_one_pair_is_no_list_of_them(given):
    scorer = Scorer(tiny.model(vocab_size=tiny.WORDS), tiny.tokenizer())
    with pytest.raises(TypeError, match="pairs must be a list of pairs"):
        scorer.score_pairs(given)
    with pytest.raises(DataError, match=r"row 1: a pair is \(chosen, rejected\) .* not this str"):
        scorer.score_pairs([("a", "b"), "cd"])


def test_tuples_of_many_are_lists():
    scorer = Scorer(tiny.model(vocab_size=tiny.WORDS), tiny.tokenizer())
    many = ("a", "b", "cd")
    assert np.array_equal(scorer.score(many), scorer.score([*many]))
    pairs = (("a", "b"), ("c", "d"))
    assert np.array_equal(scorer.score_pairs(pairs), scorer.score_pairs([*pairs]))
    assert scorer.score(([5, 6], [7])).shape == (2,)


def test_nothing_and_one():
    scorer = Scorer(tiny.model("llama"))
    assert scorer.score([]).shape == (0,) and scorer.score_pairs([]).shape == (0, 2)
    assert list(scorer.stream(iter([]))) == [] and list(scorer.windows([])) == []
    assert scorer.score([[5]]).shape == (1,)


def test_stream_reads_no_more_than_it_must():
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield [5 + i % 7]

    scorer = Scorer(tiny.model("llama"), window=4)
    stream = scorer.stream(endless())
    got = list(itertools.islice(stream, 10))
    stream.close()
    time.sleep(0.3)
    now = len(read)
    assert now <= 24, "the windows before, the one in hand, the one waiting and the one being made"
    assert np.allclose(got[:3], got[7:10])
    time.sleep(0.3)
    assert len(read) == now
    assert not any(
        t.name.startswith("rmfast-encode") and t.is_alive() for t in threading.enumerate()
    )


def test_an_error_of_the_reader_is_raised_here():
    def rows():
        yield 1, [[5]]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Scorer(tiny.model("llama")).windows(rows()))


def test_rows_of_several_and_rows_that_cannot_be_read():
    scorer = Scorer(tiny.model("llama"), window=3)
    rows = [[[5], [6, 7]], RowError("not JSON"), [[5], [], [8]], [], [[5]], [[9], [9], [9], [9]]]
    windows = list(scorer.windows(zip("abcdef", rows, strict=True)))
    assert [[tag for tag, _ in w] for w in windows] == [["a", "b"], ["c"], ["d", "e", "f"]]
    flat = [scored for w in windows for _, scored in w]
    assert flat[0].lengths.tolist() == [1, 2] and flat[5].scores.shape == (4,)
    assert [str(one.error) for one in flat[1:4]] == [
        "not JSON", "conversation 2 of 3: it is empty", "it holds no conversation",
    ]  # fmt: skip
    assert flat[0].scores[0] == flat[4].scores[0]
    assert (scorer.stats.rows, scorer.stats.errors, scorer.stats.conversations) == (3, 3, 7)


def test_a_bad_row_is_named():
    scorer = Scorer(tiny.model("llama"))
    with pytest.raises(DataError, match=r"^row 2: it is empty"):
        scorer.score([[5], [6], []])


def test_too_long():
    rows = [[5, 6], [5, 6, 7, 8], [9]]
    model = tiny.model("llama")
    with pytest.raises(DataError, match=r"^row 1: 4 tokens, more than max_length 3.*truncate_left"):
        Scorer(model, max_length=3).score(rows)
    skipping = Scorer(model, max_length=3, on_overlong="skip")
    assert np.isnan(skipping.score(rows)).tolist() == [False, True, False]
    assert skipping.stats.overlong == 1 and skipping.stats.errors == 0
    with pytest.raises(DataError, match="row 1: it is empty"):
        skipping.score([[5], []])
    cut = Scorer(model, max_length=3, on_overlong="truncate_left").score(rows)
    assert np.allclose(cut[1], one_by_one(model, [[6, 7, 8]]), rtol=1e-4)
    with pytest.raises(DataError, match="max_length 128"):  # the model's own
        Scorer(model).score([[5] * 129])


def test_normalised_and_squashed():
    model = tiny.model("llama")
    raw = Scorer(model).score(groups()).astype(float)
    with pytest.raises(ValueError, match="mean and std"):
        Scorer(model, normalize=True)
    model.config.mean, model.config.std = 0.5, 2.0
    normal = (raw - 0.5) / 2
    assert np.allclose(Scorer(model, normalize=True).score(groups()), normal, rtol=1e-5, atol=1e-6)
    both = Scorer(model, normalize=True, sigmoid=True).score(groups())
    assert np.allclose(both, 1 / (1 + np.exp(-normal)), rtol=1e-5)


def test_options_are_checked():
    model = tiny.model("llama")
    for options, words in (({"max_tokens": 0}, "max_tokens"), ({"window": 0}, "window")):
        with pytest.raises(ValueError, match=words):
            Scorer(model, **options)
    with pytest.raises(ValueError, match="3 labels"):
        Scorer(tiny.model("llama", num_labels=3))


def test_scores_that_are_not_finite_are_errors():
    model = tiny.model("llama")
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="row 0: its score is nan"):
        Scorer(model).score([[5]])


def test_the_model_is_left_in_the_mode_it_was_in():
    for training in (True, False):
        model = tiny.model("llama").train(training)
        Scorer(model).score([[5]])
        assert model.training is training
        assert all(m.training is training for m in model.modules())


def test_frozen_parts_stay_in_the_mode_they_were_in():
    class Merging(torch.nn.Module):
        """Its weights are merged while it is in eval mode, as some adapters have it."""

        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    def parts(model):
        return [m.training for m in model.modules()]

    model = tiny.model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.eval()
    model.model.extra, model.model.other = Merging(), torch.nn.ModuleList([model.model.layers[0]])
    before = parts(model)
    assert len(set(before)) == 2
    scorer = Scorer(model, max_tokens=20)
    inside = []
    model.model.norm.register_forward_pre_hook(
        lambda *_: inside.append((any(parts(model)), model.model.extra.merged))
    )
    scorer.score(groups())
    assert parts(model) == before and set(inside) == {(False, True)}
    assert not model.model.extra.merged
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert parts(model) == before
    model.eval().model.layers[2].train()
    before = parts(model)
    scorer.score(groups())
    assert parts(model) == before


def test_progress(capsys):
    seen = []
    model = tiny.model("llama")
    Scorer(model, max_tokens=20, progress=lambda *done: seen.append(done)).score(groups())
    assert np.sum(seen, axis=0).tolist() == [10, sum(map(len, groups()))]
    Scorer(model, progress=True).score(groups())
    assert "10/10" in capsys.readouterr().err


# --- memory


class Full:
    """Stands for a device that holds so many tokens and no more."""

    def __init__(self, model, tokens, error):
        self.tokens, self.error, self.calls = tokens, error, []
        model.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls.append(args[0].numel())
        if args[0].numel() > self.tokens:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_out_of_memory_halves_the_budget(family, error):
    model = tiny.model(family)
    expected = one_by_one(model, groups())
    full = Full(model, 80, error)
    scorer = Scorer(model, max_tokens=400)
    got = scorer.score(groups())
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
    assert scorer.max_tokens < 400 and scorer.stats.halvings >= 1
    assert max(full.calls) > 80, "the hook never raised"
    before = len(full.calls)
    assert np.allclose(scorer.score(groups()), got, atol=1e-5)
    assert max(full.calls[before:]) <= 80, "what was learnt is kept"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_memory_that_somebody_else_took_for_a_while(family, monkeypatch):
    """The size comes back, step by step; the scores were the same all along."""
    monkeypatch.setattr(pieces, "_PATIENCE", 4)
    model = tiny.model(family)
    expected = one_by_one(model, groups())
    full = Full(model, 80, torch.OutOfMemoryError("CUDA out of memory"))
    scorer = Scorer(model, max_tokens=400)
    sizes = []
    for times in range(16):
        if times == 2:
            full.tokens = 10**6
        assert np.abs(scorer.score(groups()) - expected).max() <= 1e-4 * expected.std()
        sizes.append(scorer.max_tokens)
    assert sizes[1] < 400 and sizes[1:] == sorted(sizes[1:]) and sizes[-1] == 400
    assert scorer.stats.halvings == scorer._budget.doublings > 1


def test_a_call_of_a_patched_model_grows_back_too():
    model = rmfast.patch(tiny.model("llama"), max_tokens=64)
    batch = tiny.padded(groups())
    full = Full(model, 40, torch.OutOfMemoryError("CUDA out of memory"))
    with torch.no_grad():
        want = model(**batch).logits
        assert "at most 32 tokens run at once: memory ran out 1 times, and it was" in str(
            rmfast.report(model)
        )
        full.tokens = 64
        for _ in range(12):
            assert tiny.score_error(model(**batch).logits, want) <= 1e-4
    said = "at most 64 tokens run at once: memory ran out 1 times, and it was halved; it was "
    assert said + "doubled again 1 times" in str(rmfast.report(model))


def test_a_size_that_does_not_fit_is_tried_ever_more_rarely():
    budget, tried = pieces.Budget(1000), []

    def work(most):
        tried.append(budget.tokens)
        if budget.tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    for _ in range(2000):
        budget.attempt(work, 300, size=budget.tokens)
    failed = [i for i, tokens in enumerate(tried) if tokens > 300]
    waits = np.diff(failed).tolist()
    assert waits == [1, *(2**i * 32 + 1 for i in range(len(waits) - 1))] and len(waits) == 6
    assert budget.halvings == len(failed) and budget.tokens == 250
    for _ in range(5000):  # and once there is memory again it is soon used
        budget.attempt(work, 1000, size=budget.tokens)
    assert budget.tokens == 1000 and budget.doublings == budget.halvings
    for most, size in ((600, 500), (1000, 1000)):
        for _ in range(200):
            budget.attempt(work, most, size=budget.tokens)
        assert budget.tokens == size
    for _ in range(3 * 32):
        budget.attempt(work, 10**9, size=budget.tokens)
    assert budget.tokens == 1000, "never more than it began with"


def test_out_of_memory_in_the_middle_runs_nothing_again():
    """The third piece does not fit: only that one runs again, in halves."""
    model = tiny.model("llama")
    rows = [list(r) for r in zip(*[range(3 + i, 40 + i) for i in range(30)], strict=True)]
    rows = [r + [5] * 8 for r in rows]
    expected = one_by_one(model, rows)
    calls = []

    def hook(module, args):
        calls.append(args[0].numel())
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(hook)
    scorer = Scorer(model, max_tokens=100)
    got = scorer.score(rows)
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
    assert sum(calls) == calls[2] + scorer.stats.nodes


def test_memory_that_runs_out_after_a_piece_was_scored():
    """What is scored again, in smaller pieces, counts once."""
    model = tiny.model("llama")
    expected, calls = one_by_one(model, groups()), []

    def progress(*_):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    scorer = Scorer(model, max_tokens=40, progress=progress)
    got = scorer.score(groups())
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
    assert scorer.stats.halvings == 1


def test_other_errors_are_not_taken_for_memory():
    model = tiny.model("llama")
    Full(model, 10, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        Scorer(model, max_tokens=400).score(groups())


def test_nothing_fits():
    model = tiny.model("llama")
    Full(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryError, match=r"16 tokens at a time .*smaller"):
        Scorer(model, max_tokens=64).score(groups())


def test_the_budget_is_what_memory_holds(monkeypatch):
    model = tiny.model("llama")
    token = memory.bytes_a_token(model.config, torch.float32)
    monkeypatch.setattr(pieces, "_MOST", {"cpu": 4096, "cuda": 4096})
    for free, most in ((10**12, 4096), (2000 * token, 1152), (0, 64), (None, 4096)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert Scorer(model).max_tokens == most


def test_the_budget_is_an_estimate_and_nothing_runs(monkeypatch):
    model = tiny.model("llama")
    Full(model, 0, RuntimeError("it ran"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    Scorer(model)
    cpu = torch.device("cpu")
    smollm = types.SimpleNamespace(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64,
    )  # fmt: skip
    layer = 2 * (4 * 576 + 2 * (9 + 2 * 3) * 64 + 3 * 1536) + 8 * 576
    carried = 2 * 2 * 3 * 64 * 30
    assert memory.bytes_a_token(smollm, torch.bfloat16) == layer + carried == 45312
    assert memory.bytes_a_token(smollm, torch.bfloat16, False) == layer + 4 * 1024 * 9
    assert memory.most_tokens(smollm, torch.bfloat16, cpu, True) == 4096
    for family in ("bloom", "gpt2", "deepseek_v3", "gpt_oss", "jamba", "bert"):
        assert memory.bytes_a_token(tiny.model(family).config, torch.float32) > 1000


def test_the_free_memory_of_this_machine():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 0
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_equal_conversations_score_equal(family):
    """To the last bit, wherever they are: a tie is a tie."""
    draw = np.random.default_rng(0)
    scorer = rmfast.Scorer(tiny.model(family), max_tokens=64)
    for count in range(1, 40, 3):
        rows = [draw.integers(3, tiny.VOCAB, draw.integers(2, 30)).tolist() for _ in range(count)]
        rows += [[5, 6, 7, 8, 9, 10]] * 5
        places = draw.permutation(len(rows))
        scores = scorer.score([rows[i] for i in places])
        assert len(set(scores[places >= count])) == 1
    assert scorer.stats.conversations == sum(count + 5 for count in range(1, 40, 3))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_around_the_model_are_heard(kind):
    model, rows = tiny.model("llama"), groups()
    expected = one_by_one(model, rows)

    def after(module, args, out):
        out.logits = 3 * out.logits
        return out

    def before(module, args, kwargs):
        ids = kwargs["input_ids"]
        other = 3 + ids % (tiny.VOCAB - 3)  # never the pad token
        return args, {**kwargs, "input_ids": other.where(ids != tiny.PAD, ids)}

    if kind == "register_forward_hook":
        model.register_forward_hook(after)
        expected = 3 * expected
    else:
        model.register_forward_pre_hook(before, with_kwargs=True)
        expected = one_by_one(model, rows)
    scorer = Scorer(model, max_tokens=150)
    assert np.abs(scorer.score(rows) - expected).max() <= 1e-4 * expected.std()
    assert "forward hooks on the model" in str(rmfast.report(model))


def test_small_passes_say_nothing_of_the_size_that_ran_out():
    budget = pieces.Budget(1000)

    def work(size):
        if size > 600:
            raise torch.OutOfMemoryError("out of memory")
        return size

    for _ in range(50):
        size = budget.tokens
        while budget.attempt(work, size, size=size) is None:
            size = budget.tokens
        for _ in range(40):
            assert budget.attempt(work, 10, size=10)
    assert budget.halvings <= 2  # as many as there were passes of a size that matters


def test_an_iterator_that_blocks_holds_up_no_exit():
    code = """
import time
from rmfast.score.windows import ahead
def items():
    yield 1
    time.sleep(60)
given = ahead(items())
assert next(given) == 1
given.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_reading_ahead_goes_on_after_the_main_thread_has_ended():
    code = """
import threading, time
from rmfast.score.windows import ahead
def work():
    time.sleep(0.5)
    print(list(ahead(iter(range(5)))), flush=True)
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 1, 2, 3, 4]\n", done.stderr
