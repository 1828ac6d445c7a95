"""Tokens without padding, and back."""

import pytest
import torch

from mor.model.packing import pack
from tests.conftest import random_tokens


def test_packing_round_trip_with_holes_and_empty_rows():
    tokens = random_tokens(4, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    packed = pack(tokens, mask)
    assert packed.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0]
    assert packed.rows.tolist() == [0, 2, 3]
    padded = packed.pad(packed.ids, fill=-1)
    assert padded.shape == (3, 6) and padded[2].tolist() == [int(tokens[3, 5]), *[-1] * 5]
    assert torch.equal(packed.unpad(padded), packed.ids)
    assert torch.equal(packed.unpack(packed.ids, fill=-1), tokens.masked_fill(~mask, -1))
    assert torch.equal(
        packed.ids[packed.last_index()], torch.stack([tokens[0, 3], tokens[2, 5], tokens[3, 5]])
    )
    with pytest.raises(ValueError, match="must be equal"):
        pack(tokens, mask[:, :3])
