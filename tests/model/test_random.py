"""Random numbers by hashing."""

import torch

from mor.model.random import hash_uniform


def test_hash_uniform_is_uniform_and_stateless():
    draws = hash_uniform(3, torch.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5e-3 and abs(draws.var() - 1 / 12) < 2e-3
    assert torch.equal(draws[77], hash_uniform(3, 77))
    assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.01
    assert (
        abs(torch.corrcoef(torch.stack([draws, hash_uniform(4, torch.arange(100_000))]))[0, 1])
        < 0.01
    )
