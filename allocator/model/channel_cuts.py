"""The inventory of a model whose MLPs are cut into channel blocks: pieces in the place of gate_proj and up_proj.

The model's files stay as they are: a piece is a view of some rows of a stored tensor (see `ArrangedTensor`).
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

from allocator.contract.channel_blocks import CUT, REORDERED, ChannelBlocks, ChannelOrder
from allocator.contract.errors import InputError
from allocator.contract.modules import row_block_name
from allocator.contract.safetensors_file import StoredTensor
from allocator.model.inventory import Inventory, Module

__all__ = ["ArrangedTensor", "channel_layout", "cut_unsorted", "in_channel_order"]

_MOST_CHUNKS = 8
"""Channels are laid out for at most so many ranks: more than eight GPUs seldom share one layer."""


@dataclass(frozen=True)
class ArrangedTensor(StoredTensor):
    """Some rows of the tensor `source`, or all its columns in another order; what has no order stands as it stood."""

    source: StoredTensor
    rows: "array[int] | None" = None
    columns: "array[int] | None" = None

    @property
    def in_files(self) -> tuple[StoredTensor, ...]:
        return self.source.in_files


def _gated_mlps(inventory: Inventory) -> dict[str, tuple[Module, Module, Module]]:
    """By name of an MLP (`model.layers.0.mlp`) its modules gate_proj, up_proj and down_proj."""
    by_name = {module.name: module for module in inventory.modules}
    found = {}
    for index in range(inventory.blocks):
        prefix = inventory.block_prefix(index)
        names = [prefix + local for local in (*CUT, REORDERED)]
        if all(name in by_name for name in names):
            gate, up, down = (by_name[name] for name in names)
            found[gate.name.rpartition(".")[0]] = gate, up, down
    return found


def channel_layout(inventory: Inventory, blocks: int) -> ChannelBlocks:
    """The layout of the model's channels in `blocks` pieces.

    Raises InputError where the model cannot be cut so: experts, gate_proj and up_proj stored as one, biases, modules
    that stay at 16 bits, or a number that does not divide the intermediate size.
    """
    instead = "use --granularity module"
    if blocks < 2:
        raise InputError(f"--channel-blocks {blocks}: a module is cut into 2 pieces or more; {instead} for whole ones")
    if inventory.shape.experts is not None:
        raise InputError(f"{inventory.folder}: experts are not cut into channel blocks; {instead}")
    mlps = _gated_mlps(inventory)
    if len(mlps) != inventory.blocks:
        raise InputError(
            f"{inventory.folder}: {inventory.architecture} has no {', '.join(CUT)} and {REORDERED} in every block, "
            f"whose channels could be sorted and cut; {instead}"
        )
    wide = {gate.shape[0] for gate, _, _ in mlps.values()}
    for gate, up, _ in mlps.values():
        for module in (gate, up):
            if module.why_16 is not None:
                raise InputError(f"{module.name}: it stays at 16 bits ({module.why_16}); {instead}")
    biases = [t.name for t in inventory.others if t.name.endswith(tuple(f"{local}.bias" for local in CUT))]
    if biases:
        raise InputError(f"{inventory.folder}: {biases[0]}: modules with a bias are not cut; {instead}")
    fitting = [n for n in range(2, 65) if all(size % n == 0 for size in wide)]
    if blocks not in fitting:
        raise InputError(
            f"--channel-blocks {blocks} does not divide the intermediate size {', '.join(map(str, sorted(wide)))}; "
            f"possible are {', '.join(map(str, fitting)) or 'none: ' + instead}"
        )
    chunks = _MOST_CHUNKS
    while any(size // blocks % chunks for size in wide):
        chunks //= 2
    return ChannelBlocks(blocks=blocks, chunks=chunks)


def in_channel_order(inventory: Inventory, order: ChannelOrder | None) -> Inventory:
    """The same model with its channels in `order`, and cut into its pieces; itself for None. It computes the same.

    Raises InputError when the order is of another model.
    """
    if order is None:
        return inventory
    mlps = _gated_mlps(inventory)
    sizes = {name: gate.shape[0] for name, (gate, _, _) in mlps.items()}
    given = {name: len(order.order(name)) for name in order.orders}
    if sizes != given:
        raise InputError(f"{inventory.folder}: the order of its channels is of another model; learn it again")
    modules = tuple(arranged for module in inventory.modules for arranged in _arranged(module, order))
    return replace(inventory, modules=modules, channels=order)


def cut_unsorted(inventory: Inventory, blocks: int | None) -> Inventory:
    """The modules that the model has when it is cut into `blocks` pieces, in no order yet; itself for None.

    For names, shapes and bytes, which are those of any order. Raises InputError as `channel_layout` does.
    """
    if blocks is None:
        return inventory
    layout = channel_layout(inventory, blocks)
    orders = {name: ChannelOrder.text(range(gate.shape[0])) for name, (gate, _, _) in _gated_mlps(inventory).items()}
    return in_channel_order(inventory, ChannelOrder(blocks=blocks, chunks=layout.chunks, orders=orders))


def _arranged(module: Module, order: ChannelOrder) -> Iterator[Module]:
    columns = order.columns(module.name)
    if columns is not None:
        yield replace(module, tensor=_view(module.tensor, module.name, module.shape, columns=columns))
        return
    if module.name.rpartition(".")[0] not in order.orders:
        yield module
        return
    shape = (module.shape[0] // order.blocks, module.shape[1])
    for number in range(order.blocks):
        name = row_block_name(module.name, number)
        fused = None if module.fused_group is None else row_block_name(module.fused_group, number)
        tensor = _view(module.tensor, name, shape, rows=order.rows(name))
        rows = order.rows_of(number, shape[0])
        yield replace(module, name=name, shape=shape, fused_group=fused, tensor=tensor, rows=rows)


def _view(
    stored: StoredTensor,
    name: str,
    shape: tuple[int, int],
    rows: "array[int] | None" = None,
    columns: "array[int] | None" = None,
) -> ArrangedTensor:
    return ArrangedTensor(
        name=f"{name}.weight", dtype=stored.dtype, shape=shape, path=stored.path, start=stored.start, source=stored,
        rows=rows, columns=columns,
    )  # fmt: skip
