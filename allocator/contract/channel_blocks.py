"""Channel blocks: modules of an MLP cut into pieces of output channels, each with a width of its own.

The intermediate channels of a gated MLP may stand in any order, if gate_proj and up_proj have their rows and down_proj
its columns in the same one: it computes the same. A model with channel blocks has them in the order of their
importance, and gate_proj and up_proj are not one module each but `blocks` of them, from the most to the least
important, `[N / blocks, K]`, named `...mlp.gate_proj.rows.0` and so on. All that is done to modules is done to these.

So that every rank of tensor parallelism, which takes consecutive rows and consecutive columns, gets its share of every
piece, the channels are laid out in `chunks`: chunk 0 has the first `1 / chunks` of each piece, piece after piece, chunk
1 the next. Of piece j of width w, row r is the channel `(r // s * blocks + j) * s + r % s`, s being w / chunks; that
is also its column in down_proj.
"""

import base64
import binascii
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import Field, model_validator

from allocator.contract.documents import Strict
from allocator.contract.errors import InputError
from allocator.contract.modules import Rows, original_shapes, parent_of, row_block_of

__all__ = ["CUT", "REORDERED", "ChannelBlocks", "ChannelOrder", "Parents"]

CUT = ("mlp.gate_proj", "mlp.up_proj")
"""The modules of a block that are cut into pieces, by their names inside it."""
REORDERED = "mlp.down_proj"
"""The module whose columns stand in the order of the channels."""


class ChannelBlocks(Strict):
    """Into how many pieces gate_proj and up_proj are cut, and in how many chunks the channels are laid out."""

    blocks: int = Field(ge=2, le=1024)
    chunks: int = Field(ge=1, le=64)

    def check_ranks(self, tensor_parallel_size: int) -> None:
        """Raises InputError unless every rank can have its share of each piece."""
        if self.chunks % tensor_parallel_size:
            possible = [size for size in range(1, self.chunks + 1) if self.chunks % size == 0]
            raise InputError(
                f"channel blocks are laid out in {self.chunks} chunks, which tensor_parallel_size "
                f"{tensor_parallel_size} does not divide; possible are {possible}, and any with --granularity module "
                "in gamma learn"
            )

    def rows_of(self, piece: int, width: int) -> Rows:
        """Where the rows of piece `piece`, which has `width` of them, stand among all channels of the layout."""
        share = width // self.chunks
        return Rows(piece * share, share, self.chunks, self.blocks * share)


@dataclass(frozen=True)
class Parents:
    """The original model's modules, of which those of a document are rows.

    shapes: by name of the document's modules. layout: how they are cut, None where each is a whole one.
    """

    shapes: Mapping[str, tuple[int, int]]
    layout: ChannelBlocks | None

    @property
    def granularity(self) -> str:
        """For people."""
        return "whole modules" if self.layout is None else f"{self.layout.blocks} channel blocks"

    def rows(self) -> dict[str, dict[str, Rows]]:
        """By name of an original module the modules that it became, by name, each with its rows of it, first rows
        first: whoever wrote the document may have sorted the names, 10 before 2."""
        found: dict[str, dict[str, Rows]] = {}
        for name, (count, _) in self.shapes.items():
            piece = row_block_of(name)
            rows = Rows(0, count) if piece is None or self.layout is None else self.layout.rows_of(piece[1], count)
            found.setdefault(parent_of(name), {})[name] = rows
        return {parent: dict(sorted(of.items(), key=lambda item: item[1].first)) for parent, of in found.items()}

    def original_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the original modules."""
        return original_shapes(self.shapes)

    def check_ranks(self, tensor_parallel_size: int) -> None:
        """Raises InputError unless every rank can have its share of each module's rows."""
        if self.layout is not None:
            self.layout.check_ranks(tensor_parallel_size)

    def check(self) -> None:
        """Raises ValueError unless the modules are whole without a `layout`, and with one have all the pieces that it
        says: as many, of one shape, in both of the modules that are cut."""
        pieces: dict[str, dict[int, tuple[int, int]]] = {}
        for name, shape in self.shapes.items():
            piece = row_block_of(name)
            if piece is not None:
                pieces.setdefault(piece[0], {})[piece[1]] = shape
        layout = self.layout
        if layout is None:
            if pieces:
                raise ValueError(f"{next(iter(pieces))}: cut into pieces, but there are no channel_blocks")
            return
        if not pieces:
            raise ValueError(f"channel_blocks say {layout.blocks} pieces, but no module is cut")
        for parent, found in pieces.items():
            mlp = _mlp(parent, CUT)
            if (
                not mlp
                or parent in self.shapes
                or sorted(found) != list(range(layout.blocks))
                or len({*found.values()}) > 1
            ):
                raise ValueError(
                    f"{parent}: has pieces {sorted(found)}, channel_blocks say {layout.blocks} of one shape"
                )
            rows = found[0][0]
            if rows % layout.chunks:
                raise ValueError(f"{parent}: pieces of {rows} rows cannot be laid out in {layout.chunks} chunks")
            down = self.shapes.get(f"{mlp}.{REORDERED.rpartition('.')[2]}")
            others = [pieces.get(f"{mlp}.{local.rpartition('.')[2]}", {}).get(0) for local in CUT]
            if others[0] != others[1] or down is None or down[1] != rows * layout.blocks:
                raise ValueError(f"{mlp}: {', '.join(CUT)} and {REORDERED} are not cut into the same channels")


class ChannelOrder(ChannelBlocks):
    """The channels of every block, in `bank.json`.

    `orders` has, by the name of the block's MLP (`model.layers.0.mlp`), the base64 text of little-endian uint32
    numbers: the channel of the original model that stands at each place of the layout.
    """

    orders: dict[str, str]

    @model_validator(mode="after")
    def _are_orders(self) -> "ChannelOrder":
        for name in self.orders:
            order = self.order(name)
            if sorted(order) != list(range(len(order))) or len(order) % (self.blocks * self.chunks):
                raise ValueError(
                    f"{name}: {len(order)} channels in {self.blocks} blocks and {self.chunks} chunks are no order"
                )
        return self

    @property
    def layout(self) -> ChannelBlocks:
        """What a reader of the checkpoint has to know: all but the orders."""
        return ChannelBlocks(blocks=self.blocks, chunks=self.chunks)

    def order(self, mlp: str) -> "array[int]":
        """The original's channels in the order of the layout. Raises ValueError if the text is not base64."""
        try:
            content = base64.b64decode(self.orders[mlp], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{mlp}: the order is not base64 text ({error})") from None
        order = array("I")
        order.frombytes(content)
        if sys.byteorder == "big":
            order.byteswap()
        return order

    def rows(self, name: str) -> "array[int] | None":
        """The rows of the original module that piece `name` has; None for a whole module."""
        piece = row_block_of(name)
        if piece is None or (mlp := _mlp(piece[0], CUT)) not in self.orders:
            return None
        order = self.order(mlp)
        return array("I", (order[at] for at in self.rows_of(piece[1], len(order) // self.blocks).numbers()))

    def columns(self, name: str) -> "array[int] | None":
        """The columns of the original module in the order of module `name`; None where they stand as they stood."""
        mlp = _mlp(name, (REORDERED,))
        return self.order(mlp) if mlp in self.orders else None

    @staticmethod
    def text(order: Iterable[int]) -> str:
        """An order as it stands in `orders`."""
        numbers = array("I", order)
        if sys.byteorder == "big":
            numbers.byteswap()
        return base64.b64encode(numbers.tobytes()).decode()


def _mlp(name: str, which: tuple[str, ...]) -> str:
    """The name of the MLP that has `name` as one of its modules `which`; empty if there is none."""
    for local in which:
        if name.endswith("." + local):
            return name.rpartition(".")[0]
    return ""
