"""The packed trie against a plain dictionary trie, and its mask rule against explicit paths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmfast
from rmfast import reference
from rmfast.ops import _cpu as cpu

# Few token values and short rows: prefixes, duplicates and nesting all come up often.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


def paths_of(trie):
    """Each sequence's nodes, walked from the definition: ancestors are the ranges that hold it."""
    end = trie.subtree_end.tolist()
    return [[k for k in range(node + 1) if node < end[k]] for node in trie.pool_index.tolist()]


def dictionary_trie(rows):
    """Every distinct prefix, as a set of tuples."""
    return {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}


def check(trie, rows, positions=None):
    ids, pos = trie.input_ids.tolist(), trie.position_ids.tolist()
    paths = paths_of(trie)
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        assert [ids[k] for k in path] == list(row)
        assert [pos[k] for k in path] == (positions[i] if positions else list(range(len(row))))
    assert [path.tolist() for path in trie.paths()] == paths
    end = trie.subtree_end.tolist()
    for k in range(len(trie)):  # preorder: ranges nest, none cross
        assert k < end[k] <= len(trie)
        assert all(end[j] <= end[k] for j in range(k, end[k]))
    assert set().union(*map(set, paths)) == set(range(len(trie)))  # no node without a sequence


@settings(max_examples=1000, deadline=None)
@given(sequences)
def test_equals_a_dictionary_trie(rows):
    trie = rmfast.pack(rows)
    assert len(trie) == len(dictionary_trie(rows))
    check(trie, rows)


@settings(max_examples=300, deadline=None)
@given(sequences)
def test_without_sharing_every_row_has_its_own_root(rows):
    trie = rmfast.pack(rows, share_prefixes=False)
    assert len(trie) == sum(map(len, rows))
    assert trie.input_ids.tolist() == [token for row in rows for token in row]
    check(trie, rows)


@settings(max_examples=1000, deadline=None)
@given(sequences, st.sampled_from([None, 1, 2, 3]))
def test_mask_rule_against_explicit_paths(rows, window):
    trie = rmfast.pack(rows)
    every = torch.arange(len(trie))
    allowed = reference.trie_mask(every, every, trie.subtree_end, trie.position_ids, window)
    want = torch.zeros_like(allowed)
    for path in paths_of(trie):
        for depth, q in enumerate(path):
            first = 0 if window is None else max(0, depth - window + 1)
            want[q, path[first : depth + 1]] = True
    assert torch.equal(allowed, want)


@settings(max_examples=300, deadline=None)
@given(sequences, st.sampled_from([None, 2]), st.booleans(), st.floats(0, 0.99))
def test_bundles_cover_the_mask_exactly_once(rows, window, pooled, first):
    trie = rmfast.pack(rows)
    queries = trie.pooled if pooled else torch.arange(int(first * len(trie)), len(trie))
    want = reference.trie_mask(
        queries, torch.arange(len(trie)), trie.subtree_end, trie.position_ids, window
    )
    got = torch.zeros(want.shape, dtype=torch.int)
    given = queries if pooled else None
    for bundle in cpu.bundles(trie.subtree_end, trie.position_ids, given, len(queries), window):
        real = ~bundle.hidden
        if bundle.repeats is not None:
            real &= ~bundle.repeats
        for rows_, keys, seen in zip(bundle.queries, bundle.keys, real[:, 0], strict=True):
            got.index_put_((rows_[:, None], keys[None, :]), seen.int(), accumulate=True)
    assert torch.equal(got, want.int())


@settings(max_examples=300, deadline=None)
@given(sequences, st.booleans(), st.data())
def test_padded_batches(rows, left, data):
    length = max(map(len, rows)) + data.draw(st.integers(0, 2))
    ids, mask = torch.full((len(rows), length), 9), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        start = length - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    trie, want = rmfast.pack(ids, mask), rmfast.pack(rows)
    for name in ("input_ids", "position_ids", "subtree_end", "pool_index"):
        assert torch.equal(getattr(trie, name), getattr(want, name)), name


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_holes_in_the_mask_keep_their_distance(batch, length, data):
    bits = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = torch.tensor([data.draw(bits) for _ in range(batch)])
    ids = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 1), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    trie = rmfast.pack(ids, mask)
    rows = [ids[b][mask[b]].tolist() for b in range(batch)]
    columns = [mask[b].nonzero().flatten().tolist() for b in range(batch)]
    positions = [[c - row[0] for c in row] for row in columns]
    check(trie, rows, positions)
    prefixes = {
        tuple(zip(row[:n], pos[:n], strict=True))
        for row, pos in zip(rows, positions, strict=True)
        for n in range(1, len(row) + 1)
    }
    assert len(trie) == len(prefixes)


def test_position_ids_are_part_of_a_nodes_identity():
    ids = torch.tensor([[5, 6], [5, 6], [5, 6]])
    trie = rmfast.pack(ids, position_ids=torch.tensor([[0, 1], [3, 4], [0, 2]]))
    assert len(trie) == 5
    check(trie, ids.tolist(), [[0, 1], [3, 4], [0, 2]])
    assert len(rmfast.pack(ids, position_ids=torch.tensor([[7, 8]]))) == 2


def test_dtypes_and_kinds_of_rows():
    trie = rmfast.pack([np.array([1, 2]), torch.tensor([1, 3]), (4,)])
    assert [getattr(trie, n).dtype for n in ("input_ids", "position_ids", "pool_index")] == [
        torch.int64
    ] * 3
    assert trie.subtree_end.dtype == torch.int32
    check(trie, [[1, 2], [1, 3], [4]])
    check(rmfast.pack(torch.tensor([[1, 2], [1, 3]], dtype=torch.int32)), [[1, 2], [1, 3]])
    check(rmfast.pack([list(range(5))]), [list(range(5))])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([],), "empty"),
        (([[1], []],), "row 1 has no token"),
        (([[1], [2, -1]],), "row 1 has token id -1"),
        (([[2**31]],), "row 0 has token id"),
        (
            (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]])),
            "row 1 has no",
        ),
        ((torch.ones(2, 3, dtype=torch.long), torch.ones(2, 2)), "does not match"),
        ((torch.ones(3, dtype=torch.long),), r"\[B, T\]"),
        ((torch.ones(0, 3, dtype=torch.long),), "empty"),
        (([[1]], torch.ones(1, 1)), "padded batch"),
        (([1, 2, 3],), r"row 0 must be integers \[t\], got int64 \[\]"),
        ((torch.tensor([1, 2, 3]).unbind(),), "row 0 must be integers"),
        (([[1], [[2], [3]]],), r"row 1 must be integers \[t\], got int64 \[2, 1\]"),
        (([[[2], [3, 4]]],), "row 0 must be integers .* got lists of unequal lengths"),
        (("12",), "row 0 must be integers"),
        (([[1], ["2", "3"]],), "row 1 must be integers"),
        (([[1], [2.5, 3]],), "row 1 must be integers .* got float64"),
        (([[1], [True, False]],), "row 1 must be integers .* got bool"),
        (([[1], torch.ones(2, dtype=torch.bfloat16)],), "row 1 must be integers .* got torch.bf"),
        (([[1], [None, 2]],), "row 1 must be integers .* got object"),
        ((torch.ones(2, 3),), r"input_ids must be integers \[B, T\], got float32"),
        ((torch.ones(2, 3, dtype=torch.bool),), "input_ids must be integers"),
    ],
)
def test_misuse_names_the_row(args, message):
    with pytest.raises(ValueError, match=message):
        rmfast.pack(*args)


def test_position_ids_of_another_shape():
    with pytest.raises(ValueError, match="position_ids"):
        rmfast.pack(torch.ones(2, 3, dtype=torch.long), position_ids=torch.zeros(2, 2).long())
    with pytest.raises(ValueError, match="position_ids must be integers"):
        rmfast.pack(torch.ones(2, 3, dtype=torch.long), position_ids=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="row 1 has position id -1"):
        rmfast.pack(torch.ones(2, 1, dtype=torch.long), position_ids=torch.tensor([[0], [-1]]))
