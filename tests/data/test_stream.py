"""Batches: a function of seed and position."""

import numpy as np
import pytest
import torch

from mor.data.stream import DataState, Part, TokenData
from mor.data.tokenizer import byte_tokenizer

BYTES = byte_tokenizer().text_bytes


def test_batches_are_a_function_of_seed_and_position():
    data = TokenData([Part(np.arange(101), np.array([101]))], 1, 100, BYTES)
    stream = data.batches(3, 10, seed=1, state=DataState())
    seen = [next(stream) for _ in range(9)]
    again = data.batches(3, 10, seed=1, state=seen[3][1])
    for batch, state in seen[4:]:
        other, other_state = next(again)
        assert torch.equal(batch.tokens_BT, other.tokens_BT) and state == other_state
    rows = torch.cat([batch.tokens_BT for batch, _ in seen])
    assert torch.equal(rows[:, 1:], torch.cat([batch.targets_BT for batch, _ in seen])[:, :-1])
    assert sorted(rows[:10, 0].tolist()) == list(range(0, 100, 10)), (
        "an epoch visits every window once"
    )
    assert rows[:10, 0].tolist() != rows[10:20, 0].tolist(), "epochs differ in order"


def split_up(tokens, ends, borders):
    """The same stream in several parts."""
    parts, start = [], 0
    for border in [*borders, len(tokens)]:
        parts.append(Part(tokens[start:border], ends[(ends > start) & (ends <= border)] - start))
        start = border
    return TokenData(parts, len(ends), 100, BYTES)


@pytest.mark.parametrize("length", [2, 11, 20, 21, 25])
def test_every_token_but_the_first_is_scored_once(length):
    data = TokenData([Part(np.arange(length), np.array([length]))], 1, length, BYTES)
    scored = list(data.scored(10, batch_size=2, documents=True))
    targets = [i for some in scored for i in some.batch.targets_BT.flatten().tolist()]
    assert targets == list(range(1, length))
    assert [i for some in scored for i in some.windows] == list(range(-(-(length - 1) // 10)))
    assert all(some.batch.tokens_BT.shape == some.batch.documents_BT.shape for some in scored)
    with pytest.raises(ValueError, match="no token to predict"):
        next(TokenData([Part(np.arange(1), np.array([1]))], 1, 1, BYTES).scored(10))


def test_windows_cross_the_borders_of_shards():
    tokens = np.arange(100)
    ends = np.array([3, 10, 30, 31, 60, 95, 100])
    whole, parts = split_up(tokens, ends, []), split_up(tokens, ends, [10, 31, 60])
    assert len(whole) == len(parts) == 100 and parts.num_documents == 7
    for start in range(0, 95, 7):
        stop = min(start + 33, 100)
        assert torch.equal(parts.tokens(start, stop), torch.arange(start, stop))
        a, b = whole.documents(start, stop), parts.documents(start, stop)
        assert torch.equal(a - a[0], b - b[0])
    assert whole.documents(0, 12).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2], (
        "the end token begins the next one"
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(world_size):
    data = split_up(np.arange(200), np.array([50, 200]), [50])
    whole = data.batches(2 * world_size, 9, seed=5, state=DataState(4), documents=True)
    ranks = [
        data.batches(
            2, 9, seed=5, state=DataState(4), rank=r, world_size=world_size, documents=True
        )
        for r in range(world_size)
    ]
    for _ in range(8):
        batch, state = next(whole)
        pieces = [next(r) for r in ranks]
        for name in batch._fields:
            assert torch.equal(
                getattr(batch, name), torch.cat([getattr(b, name) for b, _ in pieces])
            ), name
        assert {s for _, s in pieces} == {state}
