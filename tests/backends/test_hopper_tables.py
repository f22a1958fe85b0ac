"""The tables that the Hopper kernels walk say what the layout says; no GPU is needed to make them."""

from __future__ import annotations

import pytest
import torch
from layouts import random_coarse_layout, random_layout
from tiers import every

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph
from svggt_kernels.backends.hopper.operands import Tables, make_coarse_tables, make_tables
from svggt_kernels.layout import DENSE


def columns_of(tables: Tables, group: int) -> list[int]:
    """Return the tokens of the columns of a group, in the order of its runs."""
    tokens = []
    for run in range(tables.run_offsets[group], tables.run_offsets[group + 1]):
        start, length = int(tables.run_start[run]), int(tables.run_length[run])
        run_of = tables.dense_columns[start - DENSE :] if start < 0 else torch.arange(start, start + length)
        tokens += run_of[:length].tolist()
        assert len(run_of) >= length >= 0
    return tokens


@pytest.mark.parametrize("seed", every(4, range(200)))
def test_runs_are_what_each_group_sees(seed: int):
    layout = random_layout(seed, max_frames=8, max_tokens=12)
    tables, visible = make_tables(layout, 192), layout.to_dense()
    starts, lengths = layout.queries.ordinary
    rows = [int(start) if length else None for start, length in zip(starts, lengths, strict=True)]
    for group, row in enumerate([*rows, *layout.queries.dense[:1]]):
        if row is not None:
            columns = columns_of(tables, group)
            assert len(columns) == tables.columns[group]
            assert sorted(columns) == visible[row].nonzero().flatten().tolist()


def test_a_run_goes_through_special_tokens_between_frames_that_are_seen():
    """Frames 1, 2, 3 of six are one run of tokens; of the dense columns those before and those behind are left."""
    graph = CovisibilityGraph.from_pairs(6, torch.tensor([[2, 1], [2, 3], [4, 1]]))
    tables = make_tables(BlockLayout.from_graph(graph, 10, special_tokens=2), 192)
    runs = [
        [
            (int(tables.run_start[run]), int(tables.run_length[run]))
            for run in range(tables.run_offsets[group], tables.run_offsets[group + 1])
        ]
        for group in range(7)
    ]
    assert runs[2] == [(12, 28), (DENSE, 4), (DENSE + 8, 4)]
    assert runs[4] == [(12, 8), (42, 8), (DENSE, 12)]
    assert runs[0] == [(2, 8), (DENSE, 12)]  # each frame sees itself
    assert runs[6] == [(0, 60)]


def test_tables_are_made_without_reading_the_device():
    """Tensors on the meta device have no values: whatever needs one raises."""
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(8, 1).to("meta"), 10, special_tokens=2)
    assert make_tables(layout, 192).run_start.device.type == "meta"


@pytest.mark.parametrize("seed", every(4, range(200)))
def test_the_runs_of_a_coarse_layout_and_what_its_columns_stand_for(seed: int):
    layout = random_coarse_layout(seed)
    tables, weighted = make_coarse_tables(layout, 192)
    n, log2_n = weighted.weight.double().tolist()
    assert 2**log2_n == pytest.approx(n) and n == pytest.approx(layout.parts[-1].weight)
    expected = layout.to_weights()
    whole = layout.parts[0].layout
    rows = [*(int(start) for start in whole.queries.ordinary[0]), *whole.queries.dense[:1]]
    for group, row in enumerate(rows):
        columns, first = columns_of(tables, group), int(weighted.columns[group])
        assert len(columns) == len(set(columns)) == tables.columns[group]
        counts = torch.zeros(layout.num_tokens, dtype=torch.float64)
        counts[columns[:first]], counts[columns[first:]] = layout.parts[-1].weight, 1.0
        assert torch.equal(counts, expected[row])


def test_frames_that_are_seen_coarsely_are_one_run_of_each_kind():
    layout = CoarseLayout.from_graph(CoarseGraph.core(9, [0, 1], [3, 4, 7], stride=2), (4, 4), special_tokens=2)
    tables, weighted = make_coarse_tables(layout, 192)
    runs = slice(tables.run_offsets[5], tables.run_offsets[6])
    patches, special = DENSE, DENSE + 3 * 4
    assert tables.run_start[runs].tolist() == [patches, special, 0, 5 * 18]
    assert tables.run_length[runs].tolist() == [3 * 4, 3 * 2, 2 * 18, 18]
    assert int(weighted.columns[5]) == 12 and int(weighted.weight[0]) == 4


def test_coarse_tables_are_made_without_reading_the_device():
    graph = CoarseGraph.core(7, [0], [2, 5], stride=2).to("meta")
    layout = CoarseLayout.from_graph(graph, (4, 4), special_tokens=1, trailing_tokens=2)
    tables, weighted = make_coarse_tables(layout, 192)
    assert tables.run_start.device.type == weighted.columns.device.type == "meta"
