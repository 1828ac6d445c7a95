"""The tokens that take part in a pass, packed without padding.

Everything between embedding and head works on packed tokens: linear layers see ``(M, D)`` for the M
tokens that really take part, whatever rows of the batch they come from. Only attention needs rows,
and pads for as long as it lasts. So padding, tokens that left early and rows that are finished all
cost nothing, and need no rule of their own.

B rows of the batch · T columns · M tokens · A rows that hold at least one token · K tokens in the
fullest row
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """Tokens sorted by row, then by position.

    id_M: token ids. row_M: the sequence it belongs to. position_M: number of real tokens before it
    in its sequence, cached ones included. place_M: where it stands in the flattened batch. per_row:
    tokens in each row, where every row has the same number (then padding is a view), else None.
    """

    id_M: Tensor
    row_M: Tensor
    position_M: Tensor
    place_M: Tensor
    num_rows: int
    batch_shape: tuple[int, int]
    per_row: int | None

    def __len__(self) -> int:
        return self.row_M.numel()

    def select(self, index_K: Tensor, per_row: int | None = None) -> PackedTokens:
        """The tokens at ``index_K`` (ascending)."""
        return replace(
            self,
            id_M=self.id_M[index_K],
            row_M=self.row_M[index_K],
            position_M=self.position_M[index_K],
            place_M=self.place_M[index_K],
            per_row=per_row,
        )

    @cached_property
    def count_B(self) -> Tensor:
        """Tokens in each row."""
        if self.per_row is not None:
            return torch.full((self.num_rows,), self.per_row, device=self.row_M.device)
        return tally(self.row_M, self.num_rows)

    @cached_property
    def _counts(self) -> list[int]:
        """Tokens in each row, on the host: the one time that shapes make it wait for the device."""
        return self.count_B.tolist()

    @cached_property
    def slot_M(self) -> Tensor:
        """Rank of each token among those of its row."""
        return _rank(self.row_M, self.num_rows)

    @cached_property
    def rows(self) -> Tensor | None:
        """Rows that hold tokens, (A,); None if all do."""
        if self.per_row is not None or 0 not in self._counts:
            return None
        return torch.tensor(
            [row for row, n in enumerate(self._counts) if n], device=self.row_M.device
        )

    @cached_property
    def lane_B(self) -> Tensor | None:
        """For each row its place among ``rows``; None if every row has tokens."""
        return None if self.rows is None else (self.count_B > 0).cumsum(0) - 1

    @cached_property
    def _lines(self) -> tuple[int, int]:
        """Shape (A, K) of the padded tokens."""
        return self.num_rows if self.rows is None else len(self.rows), max(self._counts)

    @cached_property
    def _line_place_M(self) -> Tensor:
        """Where each token stands among the flattened (A, K) lines."""
        lane_M = self.row_M if self.lane_B is None else self.lane_B[self.row_M]
        return lane_M * self._lines[1] + self.slot_M

    def pad(self, x_M: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (A, K, ...): one line per row that holds tokens, filled up at the end."""
        if self.per_row is not None:
            return x_M.view(self.num_rows, self.per_row, *x_M.shape[1:])
        lines, width = self._lines
        out = x_M.new_full((lines * width, *x_M.shape[1:]), fill)
        return out.index_copy(0, self._line_place_M, x_M).view(lines, width, *x_M.shape[1:])

    def unpad(self, x_AK: Tensor) -> Tensor:
        """(A, K, ...) -> (M, ...): the reverse of :meth:`pad`."""
        if self.per_row is not None:
            return x_AK.reshape(len(self), *x_AK.shape[2:])
        return take(x_AK.flatten(0, 1), self._line_place_M)

    def unpack(self, x_M: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (B, T, ...): back to the places in the batch."""
        rows, columns = self.batch_shape
        if len(self) == rows * columns:
            return x_M.view(rows, columns, *x_M.shape[1:])
        out = x_M.new_full((rows * columns, *x_M.shape[1:]), fill)
        return out.index_copy(0, self.place_M, x_M).view(rows, columns, *x_M.shape[1:])

    def last_index(self) -> Tensor:
        """Index of the last token of each row that holds tokens, (A,)."""
        count_A = self.count_B if self.rows is None else self.count_B[self.rows]
        return count_A.cumsum(0) - 1


def pack(
    tokens_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    start_B: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> PackedTokens:
    """Pack the tokens where ``mask_BT`` is true (all of them if None).

    start_B: tokens that each sequence already has in the cache. documents_BT: a number for the
    document that each token belongs to; where it changes along a line, a sequence of its own
    begins. Holes and padding on either side are fine: a token's position counts the real tokens
    before it.
    """
    B, T = tokens_BT.shape
    device = tokens_BT.device
    for name, given in (("mask", mask_BT), ("documents", documents_BT)):
        if given is not None and given.shape != tokens_BT.shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, tokens {tuple(tokens_BT.shape)}; they "
                "must be equal"
            )
    if mask_BT is None or bool(mask_BT.all()):
        place_M = torch.arange(B * T, device=device)
        per_row: int | None = T
    else:
        place_M = mask_BT.bool().flatten().nonzero().squeeze(1)
        per_row = None
    row_M, num_rows = place_M // T, B
    if documents_BT is not None:
        row_M, num_rows, per_row = _split_rows(row_M, documents_BT.flatten()[place_M])
    position_M = place_M % T if per_row == T else _rank(row_M, num_rows)
    if start_B is not None:
        position_M = position_M + start_B[row_M]
    return PackedTokens(
        id_M=tokens_BT.flatten()[place_M],
        row_M=row_M,
        position_M=position_M,
        place_M=place_M,
        num_rows=num_rows,
        batch_shape=(B, T),
        per_row=per_row,
    )


def _split_rows(row_M: Tensor, document_M: Tensor) -> tuple[Tensor, int, None]:
    """Rows cut where the document changes: (row of each token, number of rows, tokens per row)."""
    if not len(row_M):
        return row_M, 0, None
    begins_M = torch.ones_like(row_M)
    begins_M[1:] = (row_M[1:] != row_M[:-1]) | (document_M[1:] != document_M[:-1])
    new_M = begins_M.cumsum(0) - 1
    return new_M, int(new_M[-1]) + 1, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_M: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.rows = len(x_M)
        return x_M.index_select(0, index_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        return grad_K.new_zeros(ctx.rows, *grad_K.shape[1:]).index_copy(0, index_K, grad_K), None


def take(x_M: Tensor, index_K: Tensor) -> Tensor:
    """``x_M[index_K]`` where no index occurs twice: then the gradient is a copy, and needs neither
    sums nor sorting."""
    taken: Tensor = _Take.apply(x_M, index_K)  # type: ignore[no-untyped-call]
    return taken


def tally(index_M: Tensor, length: int) -> Tensor:
    """How often each of 0..length-1 occurs; unlike ``bincount`` it does not make the host wait for
    the device."""
    return index_M.new_zeros(length).index_add_(0, index_M, torch.ones_like(index_M))


def _rank(row_M: Tensor, num_rows: int) -> Tensor:
    """Number of tokens of the same row before each token (rows ascending)."""
    count_B = tally(row_M, num_rows)
    start_B = count_B.cumsum(0) - count_B
    return torch.arange(len(row_M), device=row_M.device) - start_B[row_M]
