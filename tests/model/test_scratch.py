"""Keys and values of a forward without a cache: each strategy reads the entries that it says."""

import pytest
import torch

from mor.model.attention import plain_packed_attention
from mor.model.kv_cache import LEFT
from mor.model.packing import pack
from mor.model.scratch import Scratch


def draw(count, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, heads, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("padded", [False, True])
def test_a_recursion_reads_its_own_entries_or_the_first_ones_or_both(padded):
    tokens_BT = torch.zeros(2, 6, dtype=torch.int64)
    mask_BT = torch.arange(6) < torch.tensor([[6], [4]]) if padded else None
    everyone = pack(tokens_BT, mask_BT)
    some = torch.tensor([1, 2, 5, 6, 9])
    selected = everyone.select(some)
    first, own = ((draw(n, 2, 1), draw(n, 2, 2)) for n in (len(everyone), len(some)))
    q = draw(len(some), 4, 3)
    mixed = tuple(a.index_copy(0, some, b) for a, b in zip(first, own, strict=True))
    expected = {
        (2,): plain_packed_attention(q, *own, selected, selected),
        (1,): plain_packed_attention(q, *first, selected, everyone),
        (1, 2): plain_packed_attention(q, *mixed, selected, everyone),
    }
    for reads, wanted in expected.items():
        scratch = Scratch(kept=(1,))
        scratch.open(0, (0,), everyone)
        one = scratch.open(1, (1,), everyone)
        assert one.writes
        one.write(0, *first)
        two = scratch.open(2, reads, selected)
        assert two.writes == (2 in reads)
        if two.writes:
            two.write(0, *own)
        torch.testing.assert_close(two.attend(0, q), wanted, atol=1e-12, rtol=1e-12)


def test_tokens_that_left_are_read_by_their_last_entries():
    """In two goes, beside new entries of the others."""
    everyone = pack(torch.zeros(2, 4, dtype=torch.int64), None)
    gone, then, still = (torch.tensor(some) for some in ([0, 5, 6], [1, 7], [2, 3, 4]))
    entries = draw(8, 2, 1), draw(8, 2, 2)
    scratch, q = Scratch(kept=(LEFT,)), draw(3, 4, 3)
    scratch.open(0, (0,), everyone)
    for some in (gone, then):
        kv = scratch.open(LEFT, (LEFT,), everyone.select(some))
        kv.write(0, *(each[some] for each in entries))
    kv = scratch.open(3, (LEFT, 3), everyone.select(still))
    kv.write(0, *(each[still] for each in entries))
    wanted = plain_packed_attention(q, *entries, everyone.select(still), everyone)
    torch.testing.assert_close(kv.attend(0, q), wanted, atol=1e-12, rtol=1e-12)
