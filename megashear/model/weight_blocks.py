"""Multi-tensor arithmetic on the masked weights that a rank owns, in blocks of rows.

All views are made once. A step calls a few `torch._foreach_*` and batched products for each block
list, not for each parameter: their number depends on the elements, not on the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.hardware import BLOCK_ELEMENTS


@dataclass(frozen=True)
class Matrices:
    """Parameters of one shape [n, k] (a vector is a column) and the scales of their axes.

    Attributes:
        weights: [n, k] each, views of the parameters.
        scales: float32 [number, n] and [number, k]; None is all ones. Rewritten each step.
    """

    weights: list[Tensor]
    scales: tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Piece:
    """A range of rows of a matrix, and which of their flattened positions this rank owns."""

    number: int
    rows: range
    inside: slice

    @property
    def positions(self) -> int:
        return self.inside.stop - self.inside.start


def _pieces(number: int, width: int, positions: range, most: int) -> Iterator[_Piece]:
    """Yield the rows that positions of a matrix touch, in pieces of at most `most` elements."""
    rows = range(positions.start // width, -(-positions.stop // width))
    step = max(1, most // width)
    for first in rows[::step] if positions else ():
        part = range(first, min(first + step, rows.stop))
        begin, end = part.start * width, part.stop * width
        inside = slice(max(positions.start, begin) - begin, min(positions.stop, end) - begin)
        yield _Piece(number, part, inside)


class Blocks:
    """Blocks of rows of matrices of one width, at most one block of each matrix.

    Args:
        matrices: the matrices.
        pieces: the rows of each block.
    """

    def __init__(self, matrices: Matrices, pieces: Sequence[_Piece]) -> None:
        self._matrices, self._pieces = matrices, pieces
        self._blocks = [matrices.weights[p.number][_slice(p.rows)] for p in pieces]
        of_rows, of_columns = matrices.scales
        self._scales = []
        if of_rows is not None:
            self._scales.append([of_rows[p.number][_slice(p.rows), None] for p in pieces])
        if of_columns is not None:
            self._scales.append([of_columns[p.number] for p in pieces])
        pairs = zip(self._blocks, pieces, strict=True)
        self._parts = [block.view(-1)[piece.inside] for block, piece in pairs]
        self._originals: list[Tensor] = []
        self._gradients: _Gradients | None = None

    @staticmethod
    def of(matrices: Matrices, positions: Sequence[range]) -> list[Blocks]:
        """Return blocks that hold these flattened positions of each matrix."""
        most = BLOCK_ELEMENTS[matrices.weights[0].device.type]
        found: list[Blocks] = []
        pieces: list[_Piece] = []
        width = matrices.weights[0].shape[1]
        for number, of_matrix in enumerate(positions):
            for piece in _pieces(number, width, of_matrix, most):
                rows = max(len(p.rows) for p in (*pieces, piece))
                full = (len(pieces) + 1) * rows * width > most
                if pieces and (full or pieces[-1].number == number):
                    found.append(Blocks(matrices, pieces))
                    pieces = []
                pieces.append(piece)
        return [*found, Blocks(matrices, pieces)] if pieces else found

    def set_masters(self, masters: Sequence[Tensor | None], owned: Sequence[range]) -> None:
        """Let `restore` read the float32 master weights, or a copy put aside where there is none.

        Args:
            masters: of each matrix, the float32 weights at the owned positions, flattened.
            owned: the positions of each matrix that this rank owns.
        """
        for block, piece in zip(self._parts, self._pieces, strict=True):
            master = masters[piece.number]
            if master is None:
                self._originals.append(torch.empty_like(block))
                continue
            width = self._matrices.weights[0].shape[1]
            begin = piece.rows.start * width + piece.inside.start - owned[piece.number].start
            self._originals.append(master[begin : begin + piece.positions])
        (self._copied,) = {masters[piece.number] is None for piece in self._pieces}

    def put_aside(self) -> None:
        """Copy the weights that no float32 master holds."""
        if self._copied:
            torch._foreach_copy_(self._originals, self._parts)

    def restore(self) -> None:
        """Restore the weights from before the multiplication, at the owned positions only."""
        torch._foreach_copy_(self._parts, self._originals)

    def multiply(self) -> None:
        """Multiply the blocks by their scales, rounding once."""
        _multiply(self._blocks, self._scales)

    @property
    def size(self) -> int:
        """Return the elements of scratch memory that the chain rule needs."""
        rows = max(len(piece.rows) for piece in self._pieces)
        return len(self._pieces) * rows * self._matrices.weights[0].shape[1]

    def bind(self, gradients: Sequence[Tensor], scratch: Tensor) -> None:
        """Set where the chain rule reads gradients.

        Args:
            gradients: of each matrix, [n, k]; values outside the owned positions do not count.
            scratch: float32, flat, of at least `size` elements.
        """
        self._gradients = _Gradients(self._matrices, self._pieces, gradients, scratch)

    def chain_rule(self, totals: Sequence[Tensor | None]) -> None:
        """Turn gradients G of the multiplied weights into those of the scales and the weights.

        d r = (G * W * c).sum(columns) and d c = (G * W * r).sum(rows) are added to totals; G
        becomes r * G * c.

        Args:
            totals: float32 [number, n] and [number, k]; None if not wanted.
        """
        assert self._gradients is not None
        self._gradients.add_to(totals, self._originals)
        _multiply(self._gradients.blocks, self._scales)


class _Gradients:
    """Views of gradients, and of the scratch memory that holds the products G * W of all blocks."""

    def __init__(
        self,
        matrices: Matrices,
        pieces: Sequence[_Piece],
        gradients: Sequence[Tensor],
        scratch: Tensor,
    ) -> None:
        rows, (n, width) = max(len(p.rows) for p in pieces), matrices.weights[0].shape
        self.blocks = [gradients[p.number][_slice(p.rows)] for p in pieces]
        self._parts = [b.view(-1)[p.inside] for b, p in zip(self.blocks, pieces, strict=True)]
        self._products = scratch[: len(pieces) * rows * width].view(len(pieces), rows, width)
        flat = self._products.flatten(1)
        self._of_parts = [flat[i, p.inside] for i, p in enumerate(pieces)]
        self._has_gaps = sum(p.positions for p in pieces) < flat.numel()
        device = scratch.device
        self._numbers = torch.tensor([p.number for p in pieces], device=device)
        # Rows that a shorter block lacks are 0 in the products: they may be added anywhere.
        of_rows = torch.arange(rows, device=device) + torch.tensor(
            [[p.rows.start] for p in pieces], device=device
        )
        self._rows = (self._numbers[:, None] * n + of_rows.clamp(max=n - 1)).flatten()
        self._scales = matrices.scales

    def add_to(self, totals: Sequence[Tensor | None], weights: list[Tensor]) -> None:
        """Add the gradients of both scales."""
        products, (d_rows, d_columns) = self._products, totals
        of_rows, of_columns = self._scales
        if d_rows is None and d_columns is None:
            return
        if self._has_gaps:
            products.zero_()
        torch._foreach_copy_(self._of_parts, weights)
        torch._foreach_mul_(self._of_parts, self._parts)
        if d_rows is not None:
            if of_columns is None:
                sums = products.sum(2)
            else:
                sums = products @ of_columns.index_select(0, self._numbers)[:, :, None]
            d_rows.view(-1).index_add_(0, self._rows, sums.flatten())
        if d_columns is not None:
            if of_rows is None:
                sums = products.sum(1)
            else:
                scales = of_rows.view(-1).index_select(0, self._rows)
                sums = (scales.view(len(products), 1, -1) @ products)[:, 0]
            d_columns.index_add_(0, self._numbers, sums)


def _multiply(blocks: list[Tensor], scales: Sequence[list[Tensor]]) -> None:
    if blocks[0].dtype == torch.float32 or len(scales) == 1:
        for scale in scales:
            torch._foreach_mul_(blocks, scale)
        return
    first, second = scales
    products = torch._foreach_mul(blocks, first)  # float32: rounded once, at the end
    torch._foreach_mul_(products, second)
    torch._foreach_copy_(blocks, products)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)
