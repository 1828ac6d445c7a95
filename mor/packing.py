"""The tokens that take part in a pass, packed without padding.

Everything between embedding and head works on packed tokens: linear layers see ``(M, D)`` for the M
tokens that really take part, whatever rows of the batch they come from. Only attention needs rows,
and pads for as long as it lasts. So padding, tokens that left early and rows that are finished all
cost nothing, and need no rule of their own.

B rows of the batch · T columns · M tokens · A rows that hold at least one token · K tokens in the fullest row
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """Tokens sorted by row, then by position.

    id_M: token ids. row_M: row in the batch. column_M: column in the batch. position_M: number of
    real tokens before it in its sequence, cached ones included. per_row: tokens in each row, where
    every row has the same number (then padding is a view), else None.
    """

    id_M: Tensor
    row_M: Tensor
    column_M: Tensor
    position_M: Tensor
    num_rows: int
    num_columns: int
    per_row: int | None

    def __len__(self) -> int:
        return self.row_M.numel()

    def select(self, index_K: Tensor, per_row: int | None = None) -> PackedTokens:
        """The tokens at ``index_K`` (ascending)."""
        return replace(
            self,
            id_M=self.id_M[index_K],
            row_M=self.row_M[index_K],
            column_M=self.column_M[index_K],
            position_M=self.position_M[index_K],
            per_row=per_row,
        )

    @cached_property
    def count_B(self) -> Tensor:
        """Tokens in each row."""
        if self.per_row is not None:
            return torch.full((self.num_rows,), self.per_row, device=self.row_M.device)
        return torch.bincount(self.row_M, minlength=self.num_rows)

    @cached_property
    def slot_M(self) -> Tensor:
        """Rank of each token among those of its row."""
        start_B = self.count_B.cumsum(0) - self.count_B
        return torch.arange(len(self), device=self.row_M.device) - start_B[self.row_M]

    @cached_property
    def rows(self) -> Tensor | None:
        """Rows that hold tokens, (A,); None if all do."""
        if self.per_row is not None or bool((self.count_B > 0).all()):
            return None
        return self.count_B.nonzero().squeeze(1)

    @cached_property
    def lane_B(self) -> Tensor | None:
        """For each row its place among ``rows``; None if every row has tokens."""
        return None if self.rows is None else (self.count_B > 0).cumsum(0) - 1

    @cached_property
    def _padded_place(self) -> tuple[Tensor, Tensor, int, int]:
        lane_M = self.row_M if self.lane_B is None else self.lane_B[self.row_M]
        num_lanes = self.num_rows if self.rows is None else self.rows.numel()
        return lane_M, self.slot_M, num_lanes, int(self.count_B.max())

    def pad(self, x_M: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (A, K, ...): one line per row that holds tokens, filled up at the end."""
        if self.per_row is not None:
            return x_M.view(self.num_rows, self.per_row, *x_M.shape[1:])
        lane_M, slot_M, num_lanes, width = self._padded_place
        out = x_M.new_full((num_lanes, width, *x_M.shape[1:]), fill)
        return out.index_put((lane_M, slot_M), x_M)

    def unpad(self, x_AK: Tensor) -> Tensor:
        """(A, K, ...) -> (M, ...): the reverse of :meth:`pad`."""
        if self.per_row is not None:
            return x_AK.reshape(len(self), *x_AK.shape[2:])
        lane_M, slot_M, _, _ = self._padded_place
        return x_AK[lane_M, slot_M]

    def unpack(self, x_M: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (B, T, ...): back to the batch's own columns."""
        if self.per_row == self.num_columns:
            return x_M.view(self.num_rows, self.num_columns, *x_M.shape[1:])
        out = x_M.new_full((self.num_rows, self.num_columns, *x_M.shape[1:]), fill)
        return out.index_put((self.row_M, self.column_M), x_M)

    def last_index(self) -> Tensor:
        """Index of the last token of each row that holds tokens, (A,)."""
        count_A = self.count_B if self.rows is None else self.count_B[self.rows]
        return count_A.cumsum(0) - 1


def pack(tokens_BT: Tensor, mask_BT: Tensor | None = None, start_B: Tensor | None = None) -> PackedTokens:
    """Pack the tokens where ``mask_BT`` is true (all of them if None).

    start_B: tokens that each sequence already has in the cache. Holes and padding on either side
    are fine: a token's position counts the real tokens before it.
    """
    B, T = tokens_BT.shape
    device = tokens_BT.device
    if mask_BT is not None and mask_BT.shape != tokens_BT.shape:
        raise ValueError(f"mask has shape {tuple(mask_BT.shape)}, tokens {tuple(tokens_BT.shape)}; they must be equal")
    if mask_BT is None or bool(mask_BT.all()):
        row_M = torch.arange(B, device=device).repeat_interleave(T)
        column_M = torch.arange(T, device=device).repeat(B)
        per_row: int | None = T
        position_M = column_M
    else:
        row_M, column_M = mask_BT.bool().nonzero(as_tuple=True)
        per_row = None
        position_M = (mask_BT.long().cumsum(1) - 1)[row_M, column_M]
    if start_B is not None:
        position_M = position_M + start_B[row_M]
    return PackedTokens(
        id_M=tokens_BT[row_M, column_M],
        row_M=row_M,
        column_M=column_M,
        position_M=position_M,
        num_rows=B,
        num_columns=T,
        per_row=per_row,
    )
