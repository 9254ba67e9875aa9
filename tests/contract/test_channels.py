"""Channel blocks in documents: what a layout means, and what contradicts itself is refused."""

import pytest
from pydantic import ValidationError

from allocator.contract.channel_blocks import ChannelBlocks, ChannelOrder, Parents
from allocator.contract.checkpoint import CheckpointConfig
from allocator.contract.errors import ContractError
from allocator.contract.modules import Rows, kind_name, layer_name, original_shapes, parent_of, row_block_of

LAYOUT = ChannelBlocks(blocks=2, chunks=2)
MLP = "model.layers.0.mlp"


def pieces(**changed: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    shapes = {f"{MLP}.{name}_proj.rows.{i}": (8, 32) for name in ("gate", "up") for i in range(2)}
    shapes |= {f"{MLP}.down_proj": (32, 16), "model.layers.0.self_attn.q_proj": (32, 32)}
    given = {f"{MLP}.{name.replace('__', '.')}": shape for name, shape in changed.items()}
    return {name: shape for name, shape in (shapes | given).items() if shape is not None}


def test_every_channel_has_one_place_and_every_chunk_a_share_of_each_piece() -> None:
    layout = ChannelBlocks(blocks=3, chunks=4)
    places = [layout.rows_of(piece, 8).numbers() for piece in range(3)]
    assert sorted(place for of_piece in places for place in of_piece) == list(range(24))
    for chunk in range(4):  # consecutive rows of a piece are the rank's columns of down_proj
        for of_piece in places:
            assert {place // 6 for place in of_piece[2 * chunk : 2 * chunk + 2]} == {chunk}


def test_names_of_pieces() -> None:
    assert row_block_of(f"{MLP}.up_proj.rows.11") == (f"{MLP}.up_proj", 11)
    assert row_block_of(f"{MLP}.up_proj") is None
    assert parent_of(f"{MLP}.up_proj.rows.11") == f"{MLP}.up_proj"
    assert original_shapes(pieces())[f"{MLP}.gate_proj"] == (16, 32)
    assert kind_name(f"{MLP}.up_proj.rows.11") == "model.layers.*.mlp.up_proj"
    assert layer_name(f"{MLP}.up_proj.rows.11", "gate_up_proj") == f"{MLP}.gate_up_proj.rows.11"
    assert layer_name(f"{MLP}.up_proj", "gate_up_proj") == f"{MLP}.gate_up_proj"


def test_a_document_says_of_which_rows_its_modules_are() -> None:
    rows = Parents(dict(sorted(pieces().items(), reverse=True)), LAYOUT).rows()
    assert rows["model.layers.0.self_attn.q_proj"] == {"model.layers.0.self_attn.q_proj": Rows(0, 32)}
    assert list(rows[f"{MLP}.up_proj"]) == [f"{MLP}.up_proj.rows.0", f"{MLP}.up_proj.rows.1"]
    assert rows[f"{MLP}.up_proj"][f"{MLP}.up_proj.rows.1"].numbers() == [4, 5, 6, 7, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("shapes", "layout", "reason"),
    [
        (pieces(), None, "cut into pieces, but there are no channel_blocks"),
        ({"lm_head": (8, 8)}, LAYOUT, "no module is cut"),
        (pieces(up_proj__rows__1=None), LAYOUT, r"has pieces \[0\]"),
        (pieces(up_proj__rows__2=(8, 32)), LAYOUT, r"has pieces \[0, 1, 2\]"),
        (pieces(up_proj__rows__1=(4, 32)), LAYOUT, "of one shape"),
        (pieces(up_proj=(16, 32)), LAYOUT, "of one shape"),
        (pieces(down_proj=(32, 24)), LAYOUT, "not cut into the same channels"),
        (pieces(up_proj__rows__0=None, up_proj__rows__1=None), LAYOUT, "not cut into the same channels"),
        (pieces(), ChannelBlocks(blocks=2, chunks=3), "cannot be laid out in 3 chunks"),
    ],
)
def test_contradictions_are_refused(
    shapes: dict[str, tuple[int, int]], layout: ChannelBlocks | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Parents(shapes, layout).check()


def test_whole_pieces_pass() -> None:
    Parents(pieces(), LAYOUT).check()
    Parents({"lm_head": (8, 8)}, None).check()


def test_a_config_that_cuts_modules_says_so() -> None:
    digest = "sha256:" + "0" * 64
    modules = {name: {"shape": shape, "num_bits": 16} for name, shape in pieces().items()}
    config = {"quant_method": "gamma", "schema_version": 1, "model_digest": digest, "manifest_digest": digest}
    config |= {"dtype": "BF16", "modules": modules}
    with pytest.raises(ContractError, match="cut into pieces, but there are no channel_blocks"):
        CheckpointConfig.parse(config)
    assert CheckpointConfig.parse(config | {"channel_blocks": {"blocks": 2, "chunks": 2}}).channel_blocks == LAYOUT


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 1, 2], [1, 2, 3, 4]])
def test_an_order_has_every_channel_once(order: list[int]) -> None:
    with pytest.raises(ValidationError, match="are no order"):
        ChannelOrder(blocks=2, chunks=2, orders={MLP: ChannelOrder.text(order)})


def test_an_order_gives_rows_and_columns() -> None:
    order = ChannelOrder(blocks=2, chunks=2, orders={MLP: ChannelOrder.text([7, 6, 5, 4, 3, 2, 1, 0])})
    assert list(order.rows(f"{MLP}.gate_proj.rows.0") or []) == [7, 6, 3, 2]
    assert list(order.rows(f"{MLP}.up_proj.rows.1") or []) == [5, 4, 1, 0]
    assert list(order.columns(f"{MLP}.down_proj") or []) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert order.rows(f"{MLP}.down_proj") is None
    assert order.columns("model.layers.0.self_attn.o_proj") is None
