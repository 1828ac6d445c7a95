"""The tokens that take part in a pass, packed without padding.

Everything between embedding and head works on packed tokens: linear layers see ``(M, D)`` for the M
tokens that really take part, whatever rows of the batch they come from. Only attention needs rows,
and pads for as long as it lasts. So padding, tokens that left early and rows that are finished all
cost nothing, and need no rule of their own.

B rows of the batch · T columns · A rows that hold at least one token · K tokens in the fullest row
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

    ids: token ids. row: the sequence it belongs to. position: number of real tokens before it
    in its sequence, cached ones included. place: where it stands in the flattened batch. per_row:
    tokens in each row, where every row has the same number (then padding is a view), else None.
    """

    ids: Tensor
    row: Tensor
    position: Tensor
    place: Tensor
    num_rows: int
    batch_shape: tuple[int, int]
    per_row: int | None

    def __len__(self) -> int:
        return self.row.numel()

    def select(self, index: Tensor, per_row: int | None = None) -> PackedTokens:
        """The tokens at ``index`` (ascending)."""
        return replace(
            self,
            ids=self.ids[index],
            row=self.row[index],
            position=self.position[index],
            place=self.place[index],
            per_row=per_row,
        )

    @cached_property
    def count(self) -> Tensor:
        """Tokens in each row."""
        if self.per_row is not None:
            return torch.full((self.num_rows,), self.per_row, device=self.row.device)
        return tally(self.row, self.num_rows)

    @cached_property
    def _counts(self) -> list[int]:
        """Tokens in each row, on the host: the one time that shapes make it wait for the device."""
        return self.count.tolist()

    @cached_property
    def rank(self) -> Tensor:
        """Rank of each token among those of its row."""
        return _rank(self.row, self.num_rows)

    @cached_property
    def rows(self) -> Tensor | None:
        """Rows that hold tokens, (A,); None if all do."""
        if self.per_row is not None or 0 not in self._counts:
            return None
        return torch.tensor(
            [row for row, n in enumerate(self._counts) if n], device=self.row.device
        )

    @cached_property
    def lane(self) -> Tensor | None:
        """For each row its place among ``rows``; None if every row has tokens."""
        return None if self.rows is None else (self.count > 0).cumsum(0) - 1

    @property
    def longest(self) -> int:
        """Tokens in the fullest row."""
        return max(self._counts) if self.per_row is None else self.per_row

    def rows_alike(self) -> list[Tensor]:
        """Rows that hold tokens in groups, each as truth values, (num_rows,): none of a group is
        twice as long as another. Empty where attention, padded, costs at most twice as much for all
        rows together: they are alike enough."""
        if self.per_row is not None:
            return []
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(self._counts):
            if count:
                groups.setdefault(count.bit_length(), []).append(row)
        cost = sum(
            len(rows) * max(self._counts[row] for row in rows) ** 2 for rows in groups.values()
        )
        if sum(map(len, groups.values())) * self.longest**2 <= 2 * cost:
            return []
        found = torch.zeros(len(groups), self.num_rows, dtype=torch.bool)
        for group, rows in zip(found, groups.values(), strict=True):
            group[rows] = True
        return [*found.to(self.row.device)]

    @cached_property
    def _lines(self) -> tuple[int, int]:
        """Shape (A, K) of the padded tokens."""
        return self.num_rows if self.rows is None else len(self.rows), self.longest

    @cached_property
    def _line_place(self) -> Tensor:
        """Where each token stands among the flattened (A, K) lines."""
        lane = self.row if self.lane is None else self.lane[self.row]
        return lane * self._lines[1] + self.rank

    def pad(self, x: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (A, K, ...): one line per row that holds tokens, filled up at the end."""
        if self.per_row is not None:
            return x.view(self.num_rows, self.per_row, *x.shape[1:])
        lines, width = self._lines
        out = x.new_full((lines * width, *x.shape[1:]), fill)
        return out.index_copy(0, self._line_place, x).view(lines, width, *x.shape[1:])

    def unpad(self, x_AK: Tensor) -> Tensor:
        """(A, K, ...) -> (M, ...): the reverse of :meth:`pad`."""
        if self.per_row is not None:
            return x_AK.reshape(len(self), *x_AK.shape[2:])
        return take(x_AK.flatten(0, 1), self._line_place)

    def unpack(self, x: Tensor, fill: float = 0) -> Tensor:
        """(M, ...) -> (B, T, ...): back to the places in the batch."""
        rows, columns = self.batch_shape
        if len(self) == rows * columns:
            return x.view(rows, columns, *x.shape[1:])
        out = x.new_full((rows * columns, *x.shape[1:]), fill)
        return out.index_copy(0, self.place, x).view(rows, columns, *x.shape[1:])

    def last_index(self) -> Tensor:
        """Index of the last token of each row that holds tokens, (A,)."""
        count = self.count if self.rows is None else self.count[self.rows]
        return count.cumsum(0) - 1


def pack(
    tokens_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    start: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> PackedTokens:
    """Pack the tokens where ``mask_BT`` is true (all of them if None).

    start: tokens that each sequence already has in the cache. documents_BT: a number for the
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
        place = torch.arange(B * T, device=device)
        per_row: int | None = T
    else:
        place = mask_BT.bool().flatten().nonzero().squeeze(1)
        per_row = None
    row, num_rows = place // T, B
    if documents_BT is not None:
        row, num_rows, per_row = _split_rows(row, documents_BT.flatten()[place])
    position = place % T if per_row == T else _rank(row, num_rows)
    if start is not None:
        position = position + start[row]
    return PackedTokens(
        ids=tokens_BT.flatten()[place],
        row=row,
        position=position,
        place=place,
        num_rows=num_rows,
        batch_shape=(B, T),
        per_row=per_row,
    )


def _split_rows(row: Tensor, document: Tensor) -> tuple[Tensor, int, None]:
    """Rows cut where the document changes: (row of each token, number of rows, tokens per row)."""
    if not len(row):
        return row, 0, None
    begins = torch.ones_like(row)
    begins[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
    new = begins.cumsum(0) - 1
    return new, int(new[-1]) + 1, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy(0, index, grad), None


def take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for distinct indices: the gradient is a copy, without sums or sorting."""
    taken: Tensor = _Take.apply(x, index)  # type: ignore[no-untyped-call]
    return taken


def tally(index: Tensor, length: int) -> Tensor:
    """Counts of 0..length-1; unlike ``bincount``, the host does not wait for the device."""
    return index.new_zeros(length).index_add_(0, index, torch.ones_like(index))


def _rank(row: Tensor, num_rows: int) -> Tensor:
    """Number of tokens of the same row before each token (rows ascending)."""
    count = tally(row, num_rows)
    start = count.cumsum(0) - count
    return torch.arange(len(row), device=row.device) - start[row]
