"""Attention equals its plain definition, padded and packed, whichever kernel a device gets."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mor.model import attention as module
from mor.model.attention import (
    PackedAttention,
    attention,
    plain_attention,
    plain_packed_attention,
    ranges_mask,
)
from mor.model.packing import pack


def equal_in_values_and_gradients(fast, plain, inputs):
    assert (fast - plain).abs().max() < 1e-12
    probe = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9), dtype=fast.dtype)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((plain * probe).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11


def draw(*shapes, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return [x.requires_grad_(requires_grad) for x in drawn]


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_plain_definition_in_values_and_gradients(heads, kv_heads, causal):
    queries, keys = (7, 7) if causal else (5, 11)
    inputs = draw((2, queries, heads, 6), (2, keys, kv_heads, 6), (2, keys, kv_heads, 6))
    visible = None
    if not causal:
        visible = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        visible[..., 0] = True
    fast, plain = attention(*inputs, visible), plain_attention(*inputs, visible)
    equal_in_values_and_gradients(fast, plain, inputs)


def rows(kind, own, device="cpu"):
    """Queries and keys: rows of equal or of any length, one of them without a token; own: the
    queries' own keys, else those of all tokens."""
    tokens, generator = torch.zeros(4, 150, dtype=torch.int64), torch.Generator().manual_seed(2)
    length = torch.tensor([[150], [97], [1], [150]])
    mask = None if kind == "equal" else torch.arange(150) < length
    documents = (torch.arange(150) // 40).expand(4, 150) if kind == "documents" else None
    if kind == "unlike":  # one long document beside many short ones
        documents = (torch.arange(150) // 5 * torch.tensor([[0], [1], [1], [1]])).expand(4, 150)
    given = (None if x is None else x.to(device) for x in (tokens, mask, documents))
    keys = pack(next(given), next(given), documents_BT=next(given))
    if kind == "equal":
        some = torch.rand(4, 150, generator=generator).topk(60).indices.sort().values
        chosen, per_row = (some + 150 * torch.arange(4)[:, None]).flatten(), 60
    else:
        drawn = torch.rand(len(keys), generator=generator) < 0.4
        chosen, per_row = (drawn & (keys.row.cpu() != 1)).nonzero().squeeze(1), None
    queries = keys.select(chosen.to(device), per_row)
    return (queries, queries) if own else (queries, keys)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["equal", "ragged", "documents", "unlike"])
def test_packed_attention_equals_its_plain_definition_in_values_and_gradients(kind, own):
    queries, keys = rows(kind, own)
    inputs = draw((len(queries), 6, 8), (len(keys), 2, 8), (len(keys), 2, 8))
    fast = PackedAttention(queries, keys)(*inputs)
    equal_in_values_and_gradients(fast, plain_packed_attention(*inputs, queries, keys), inputs)


@pytest.mark.parametrize("own", [True, False])
def test_a_long_row_does_not_make_short_ones_as_long(own, monkeypatch):
    queries, keys = rows("unlike", own)
    lines, plainly = [], module.attention

    def seen(q, k, v, *more, **settings):
        lines.append(k.shape[:2].numel())
        return plainly(q, k, v, *more, **settings)

    monkeypatch.setattr(module, "attention", seen)
    PackedAttention(queries, keys)(*draw((len(queries), 6, 8), *[(len(keys), 2, 8)] * 2))
    assert sum(lines) < 2 * len(keys) < len(keys.count) * keys.longest / 5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["equal", "ragged", "documents"])
def test_flex_attention_sees_what_the_definition_sees(kind, monkeypatch):
    monkeypatch.setattr(module, "_compiled_flex", lambda: flex_attention)
    queries, keys = rows(kind, own=False)
    settings = dict(dtype=torch.float32, requires_grad=False)
    inputs = draw((len(queries), 6, 16), (len(keys), 2, 16), (len(keys), 2, 16), **settings)
    fast = PackedAttention(queries, keys).flex(*inputs)
    plain = plain_packed_attention(*inputs, queries, keys)
    assert (fast - plain).abs().max() < 1e-5


def by_blocks(q, k, v, *, block_mask, enable_gqa, kernel_options):
    """FlexAttention as its kernels read a mask: blocks listed as whole are seen as they are, in
    those listed as partial the rule decides, all others are skipped."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    size, pairs = module.FLEX_BLOCK, (q.shape[2], k.shape[2])
    visible = torch.zeros(pairs, dtype=torch.bool)
    query, key = (torch.arange(n) for n in pairs)
    rule = block_mask.mask_mod(0, 0, query[:, None], key)
    for counts, lists, seen in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, rule),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, torch.ones_like(rule)),
    ):
        for i, (count, found) in enumerate(zip(counts[0, 0].tolist(), lists[0, 0], strict=True)):
            for j in found[:count].tolist():
                tile = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                assert not visible[tile].any(), "a block is listed twice"
                visible[tile] = seen[tile]
    out = plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible[None])
    return out.transpose(1, 2)


@pytest.mark.parametrize("kind", ["equal", "ragged", "documents"])
def test_rows_in_one_line_of_flex_attention_equal_the_definition(kind, monkeypatch):
    """In values and gradients, from the blocks that the kernel visits. Nothing is padded: with
    documents that would be several times the tokens."""
    monkeypatch.setattr(module, "_compiled_flex", lambda: by_blocks)
    queries, keys = rows(kind, own=False)
    inputs = draw((len(queries), 6, 8), (len(keys), 2, 8), (len(keys), 2, 8))
    fast = PackedAttention(queries, keys).flex(*inputs)
    equal_in_values_and_gradients(fast, plain_packed_attention(*inputs, queries, keys), inputs)


@pytest.mark.parametrize("lengths", [[1], [150], [700, 1, 300, 128, 128], [40] * 20])
def test_the_blocks_of_ranges_are_those_of_all_pairs(lengths):
    """And no block counts as seen whole that is not, nor as partial that is."""
    generator, length = torch.Generator().manual_seed(3), torch.tensor(lengths)
    begin = (length.cumsum(0) - length).repeat_interleave(length)
    key = torch.arange(sum(lengths))
    chosen = torch.rand(len(key), generator=generator) < 0.7
    chosen[-1] = True
    first, last = begin[chosen], key[chosen]
    mask = ranges_mask(first, last, len(key))
    plain = create_block_mask(mask.mask_mod, 1, None, len(first), len(key), device="cpu")
    assert torch.equal(mask.to_dense(), plain.to_dense())
    whole = mask.full_kv_num_blocks[0, 0].tolist()
    seen = (first[:, None] <= key) & (key <= last[:, None])
    for block, count in enumerate(whole):
        of_queries = seen[block * 128 : (block + 1) * 128].all(0)
        assert count == sum(c.all() for c in of_queries.split(128) if len(c) == 128)


@pytest.mark.parametrize(
    ("dtype", "masked", "expands"),
    [
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
        (torch.float32, False, True),
        (torch.float32, True, True),
    ],
)
def test_on_cuda_groups_are_expanded_where_only_the_slow_kernel_takes_them(
    dtype, masked, expands, monkeypatch
):
    seen = {}

    def kernel(q, k, v, *, attn_mask, is_causal, enable_gqa):
        seen.update(kv_heads=k.shape[1], enable_gqa=enable_gqa)
        return q

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(module, "_kernels", lambda *_, **__: module.nullcontext())
    with torch._subclasses.FakeTensorMode():
        q, k = (torch.empty(2, 9, n, 8, device="cuda", dtype=dtype) for n in (6, 2))
        mask = torch.empty(2, 9, 9, device="cuda", dtype=torch.bool) if masked else None
        attention(q, k, k, mask)
    assert seen == dict(kv_heads=6 if expands else 2, enable_gqa=not expands)


def test_on_cuda_each_kind_of_rows_gets_its_kernel():
    with torch._subclasses.FakeTensorMode():
        half, full = (
            torch.empty(5, 6, 16, device="cuda", dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
    chosen = {
        (kind, own): PackedAttention(*rows(kind, own))._kernel(half).__name__
        for kind in ("equal", "ragged", "documents")
        for own in (True, False)
    }
    flex = "flex" if module.importlib.util.find_spec("triton") else "padded"
    assert chosen == {
        ("equal", True): "padded",
        ("ragged", True): "varlen",
        ("documents", True): "varlen",
        ("equal", False): flex,
        ("ragged", False): flex,
        ("documents", False): flex,
    }
    assert PackedAttention(*rows("ragged", True))._kernel(full).__name__ == "padded"


@pytest.mark.parametrize(
    ("major", "masked", "repeated", "cudnn"),
    [
        (9, False, True, True),
        (9, False, False, False),
        (9, True, True, False),
        (10, False, True, False),
        (8, False, True, False),
    ],
)
def test_cudnn_runs_only_without_a_mask_on_hopper_for_shapes_that_repeat(
    major, masked, repeated, cudnn, monkeypatch
):
    seen = []

    def kernel(q, *_, **__):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", kernel)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 9, 6, 8, device="cuda", dtype=torch.bfloat16)
        mask = torch.empty(2, 9, 9, device="cuda", dtype=torch.bool) if masked else None
        attention(q, q, q, mask, repeated=repeated)
    assert seen == [cudnn] and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_shape_counts_as_repeated_after_many_passes_and_never_within_one(monkeypatch):
    """cuDNN makes a plan for each shape. Capacities that warm up give a new one every step, and
    ragged rows every pass; and a pass that changed its kernel could not be recomputed."""
    asked = []

    def spy(q, k, v, mask, *, repeated=False):
        asked.append(repeated)
        return q

    monkeypatch.setattr(module, "attention", spy)
    monkeypatch.setattr(module, "_PASSES", module.Counter())

    def passes(queries, count):
        q = torch.zeros(len(queries), 2, 8)
        for _ in range(count):
            asked.clear()
            layers = PackedAttention(queries, queries)
            for _ in range(3):
                layers(q, q, q)
            assert len(set(asked)) == 1
        return asked[0]

    whole, ragged = pack(torch.zeros(2, 30, dtype=torch.int64)), rows("ragged", True)[0]
    assert not passes(whole, module.REPEATED) and passes(whole, 1)
    for width in range(2, 20):
        assert not passes(pack(torch.zeros(2, width, dtype=torch.int64)), 1)
    assert not passes(ragged, module.REPEATED + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["equal", "ragged", "documents"])
def test_packed_attention_on_a_gpu(kind, own, dtype):
    queries, keys = rows(kind, own)
    inputs = draw((len(queries), 6, 16), (len(keys), 2, 16), (len(keys), 2, 16))
    plain = plain_packed_attention(*inputs, queries, keys)
    plain.sum().backward()
    placed = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    queries, keys = rows(kind, own, "cuda")
    fast = PackedAttention(queries, keys)(*placed)
    fast.sum().backward()
    most = 1e-3 if dtype == torch.float32 else 3e-2
    assert (fast.double().cpu() - plain).abs().max() < most
    for a, b in zip(placed, inputs, strict=True):
        assert (a.grad.double().cpu() - b.grad).norm() < 3 * most * b.grad.norm()
