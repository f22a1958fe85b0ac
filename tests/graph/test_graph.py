"""Covisibility graphs against boolean matrices."""

import re
import time

import numpy as np
import pytest
import torch
from device_waits import no_device_waits
from graphs import assert_same_graph, with_diagonal

from svggt_kernels.graph import CovisibilityGraph, GraphSummary

SHAPES = [(1, 1), (2, 2), (9, 9), (40, 40), (1, 6), (6, 1), (12, 31)]
SHAPE_IDS = [f"{frames}x{keys}" for frames, keys in SHAPES]


def random_matrix(frames, keys, density=0.3, seed=0):
    return torch.rand(frames, keys, generator=torch.Generator().manual_seed(seed)) < density


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# Builders and structure.


@pytest.mark.parametrize(("frames", "keys"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_structure_equals_the_dense_matrix(frames, keys, density):
    visible = random_matrix(frames, keys, density)
    other = random_matrix(frames, keys, 0.2, seed=1)
    graph = CovisibilityGraph.from_dense(visible, square=frames == keys)
    expected = with_diagonal(visible)

    assert graph.indptr.dtype == graph.indices.dtype == torch.int32
    assert torch.equal(graph.to_dense(), expected)
    assert graph.num_edges == int(expected.sum())
    assert graph.density == pytest.approx(expected.float().mean().item())
    assert torch.equal(graph.rows.long(), expected.nonzero()[:, 0])
    assert torch.equal(graph.transposed().to_dense(), expected.T)
    united = graph | CovisibilityGraph.from_dense(other, square=frames == keys)
    assert torch.equal(united.to_dense(), expected | with_diagonal(other))
    assert graph.is_square == (frames == keys)
    if graph.is_square:
        assert torch.equal(graph.symmetrized().to_dense(), expected | expected.T)


@pytest.mark.parametrize("as_what", ["list", "generator", "ndarray", "int32 tensor", "shuffled"])
def test_from_pairs_keeps_what_it_is_given_and_the_diagonal(as_what):
    visible = random_matrix(14, 14)
    pairs = visible.nonzero()
    given = {
        "list": [tuple(pair) for pair in pairs.tolist()],
        "generator": (pair for pair in pairs.tolist()),
        "ndarray": pairs.numpy().astype(np.uint16),
        "int32 tensor": pairs.int(),
        "shuffled": pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))],
    }[as_what]
    assert torch.equal(CovisibilityGraph.from_pairs(14, given).to_dense(), with_diagonal(visible))


def test_from_pairs_is_directed():
    dense = CovisibilityGraph.from_pairs(3, [(0, 2)]).to_dense()
    assert dense[0, 2] and not dense[2, 0]


@pytest.mark.parametrize("key_frames", [5, 4], ids=["rectangular", "as many keys as queries"])
def test_from_pairs_with_key_frames_adds_no_diagonal(key_frames):
    graph = CovisibilityGraph.from_pairs(4, [(0, 3), (3, 1)], num_key_frames=key_frames)
    expected = torch.zeros(4, key_frames, dtype=torch.bool)
    expected[0, 3] = expected[3, 1] = True
    assert torch.equal(graph.to_dense(), expected)


def test_no_pairs_leave_the_identity():
    assert torch.equal(CovisibilityGraph.from_pairs(3, []).to_dense(), torch.eye(3, dtype=torch.bool))
    assert CovisibilityGraph.from_pairs(3, [], num_key_frames=2).num_edges == 0


def test_from_dense_takes_arrays_and_leaves_its_input_alone():
    visible = np.zeros((3, 3), dtype=bool)
    assert CovisibilityGraph.from_dense(visible).num_edges == 3
    assert not visible.any()
    assert CovisibilityGraph.from_dense(np.ones((4, 4), dtype=bool)[::2, ::-1]).num_edges == 8


def test_a_part_of_a_matrix_with_as_many_rows_as_columns_gets_no_diagonal():
    part = CovisibilityGraph.sequential(8, window=2).to_dense()[:4, 4:]
    assert torch.equal(CovisibilityGraph.from_dense(part, square=False).to_dense(), part)
    assert torch.equal(CovisibilityGraph.from_dense(part, square=True).to_dense(), with_diagonal(part))
    with pytest.raises(TypeError, match="square must be given for this 4 x 4 matrix"):
        CovisibilityGraph.from_dense(part)
    with pytest.raises(ValueError, match=r"as many rows as columns, got shape \(3, 4\)"):
        CovisibilityGraph.from_dense(part[:3], square=True)
    assert torch.equal(CovisibilityGraph.from_dense(part[:3]).to_dense(), part[:3])


@pytest.mark.parametrize("kind", ["symmetric", "whole diagonal"])
def test_a_matrix_that_is_plainly_square_needs_no_argument(kind):
    visible = random_matrix(9, 9, 0.4)
    visible = visible | visible.T if kind == "symmetric" else with_diagonal(visible)
    visible[4, 4] = kind != "symmetric"
    assert torch.equal(CovisibilityGraph.from_dense(visible).to_dense(), with_diagonal(visible))


@pytest.mark.parametrize(
    ("pairs", "causal"),
    [
        ([(1, 0), (2, 0), (3, 2)], True),
        ([], False),  # each frame alone
        ([(1, 0), (0, 1)], False),
        ([(1, 0), (2, 0), (0, 3)], False),
    ],
)
def test_causal_graphs(pairs, causal):
    assert CovisibilityGraph.from_pairs(4, pairs).is_causal() == causal
    assert not CovisibilityGraph.from_pairs(4, pairs, num_key_frames=5).is_causal()
    assert not CovisibilityGraph.from_pairs(4, pairs, num_key_frames=4).is_causal(), "no frame sees itself"


@pytest.mark.parametrize("keys", [None, 1, 9])
def test_all_visible(keys):
    graph = CovisibilityGraph.all_visible(5, keys)
    assert torch.equal(graph.to_dense(), torch.ones(5, keys or 5, dtype=torch.bool))
    assert graph.density == 1.0


@pytest.mark.parametrize("loop", [False, True], ids=["open", "loop"])
@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_sequential(frames, window, loop):
    index = torch.arange(frames)
    distance = (index[:, None] - index).abs()
    if loop:
        distance = torch.minimum(distance, frames - distance)
    graph = CovisibilityGraph.sequential(frames, window, loop=loop)
    assert torch.equal(graph.to_dense(), distance <= window)


def test_repr_is_short():
    assert repr(CovisibilityGraph.all_visible(4)) == "CovisibilityGraph(frames=4, edges=16, density=1)"
    assert repr(CovisibilityGraph.all_visible(4, 5)) == "CovisibilityGraph(frames=4, key_frames=5, edges=20, density=1)"


def test_layout_operations_read_no_value_from_the_device():
    """Tensors on the meta device have no values: whatever needs one, as a host sync does, raises."""
    graph = CovisibilityGraph.from_dense(random_matrix(9, 12)).to("meta")
    turned = graph.transposed()
    assert turned.indptr.shape == (13,)
    assert turned.indices.shape == graph.rows.shape == graph.indices.shape
    assert turned.indices.dtype == turned.indptr.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_graphs_and_layout_operations_do_not_sync():
    descriptors = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    expected = CovisibilityGraph.from_descriptors(descriptors, neighbours=3, chunk=64)
    graph = CovisibilityGraph.from_descriptors(descriptors.cuda(), neighbours=3, chunk=50)
    assert graph.device.type == "cuda"
    with no_device_waits():
        turned = graph.transposed()
        expected.to("cuda")
    graph.validate()
    turned.validate()
    assert_same_graph(graph.to("cpu"), expected)
    assert_same_graph(turned.to("cpu"), expected.transposed())


# Bad input.


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (int32(0, 1), int32(0), r"num_frames \+ 1 = 3 entries, got 2"),
        (int32(0, 1, 3), int32(0, 1), "from 0 to E = 2, got 0 to 3"),
        (int32(1, 1, 2), int32(0, 1), "from 0 to E = 2, got 1 to 2"),
        (int32(0, 3, 2), int32(0, 1), "fall, but it does after row 1"),
        (int32(0, 1, 2), int32(0, 2), r"in \[0, 2\), got 2 in row 1"),
        (int32(0, 1, 2), int32(-1, 1), r"in \[0, 2\), got -1 in row 0"),
        (int32(0, 2, 2), int32(1, 0), "got 1 before 0 in row 0"),
        (int32(0, 0, 2), int32(1, 1), "got 1 before 1 in row 1"),
        (int32(0, 1, 2), int32(0, 1)[None], r"one dimension, got shape \(1, 2\)"),
        (int32(0, 1, 2), int32(0, 1).to("meta"), "one device, got cpu and meta"),
    ],
)
def test_constructor_refuses_what_is_not_a_graph(indptr, indices, message):
    with pytest.raises(ValueError, match=message):
        CovisibilityGraph(indptr, indices, 2)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        (int32(0, 1).long(), int32(0), "indptr must be int32, got torch.int64"),
        (int32(0, 1), int32(0).float(), "indices must be int32, got torch.float32"),
        ([0, 1], int32(0), "indptr must be an int32 tensor, got list"),
    ],
)
def test_constructor_refuses_other_types(indptr, indices, message):
    with pytest.raises(TypeError, match=message):
        CovisibilityGraph(indptr, indices, 1)


def test_constructor_makes_arrays_contiguous():
    graph = CovisibilityGraph(torch.arange(6, dtype=torch.int32)[::2] // 2, int32(0, 9, 1, 9)[::2], 2)
    assert graph.indices.is_contiguous() and graph.indptr.is_contiguous()
    assert torch.equal(graph.to_dense(), torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize("frames", [0, -3])
@pytest.mark.parametrize(
    "build",
    [
        lambda frames: CovisibilityGraph(int32(0), int32(), frames),
        lambda frames: CovisibilityGraph.from_pairs(frames, []),
        lambda frames: CovisibilityGraph.from_pairs(2, [], num_key_frames=frames),
        lambda frames: CovisibilityGraph.all_visible(frames),
        lambda frames: CovisibilityGraph.all_visible(2, frames),
        lambda frames: CovisibilityGraph.sequential(frames, 1),
    ],
    ids=["constructor", "pairs", "pair keys", "all", "all keys", "sequential"],
)
def test_a_graph_has_a_frame(build, frames):
    with pytest.raises(ValueError, match=rf"frames must be at least 1, got {frames}"):
        build(frames)
    with pytest.raises(TypeError, match=r"must be an integer, got 2\.0"):
        build(2.0)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([(0, 1), (1, 4)], ValueError, r"pair 1, \(1, 4\), is out of range.*second in \[0, 4\)"),
        ([(0, 1), (-1, 2)], ValueError, r"pair 1, \(-1, 2\), is out of range"),
        ([(4, 0)], ValueError, r"first index must be in \[0, 4\)"),
        ([(0, 1), (2, 1), (0, 1)], ValueError, r"pair 2, \(0, 1\), is given twice"),
        ([(2, 2), (1, 1), (2, 2)], ValueError, r"pair 2, \(2, 2\), is given twice"),
        ([(0, 1), (2,)], ValueError, r"pair 1 must be \(query frame, key frame\), got \(2,\)"),
        ([3], ValueError, r"pair 0 must be .* got 3"),
        ([(0, 2**70)], ValueError, "beyond 64 bits"),
        ([(0, 1), (1, 2.0)], TypeError, r"pair 1, \(1, 2.0\), must hold integers, got float"),
        ([(0, True)], TypeError, "must hold integers, got bool"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "got torch.float32"),
        (torch.ones(4, 4, dtype=torch.bool), TypeError, "use from_dense"),
        (np.array([[0.0, 1.0]]), TypeError, "got torch.float64"),
        (torch.tensor([0, 1]), ValueError, r"must be \[E, 2\].*got shape \(2,\)"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"got shape \(3, 3\)"),
    ],
)
def test_from_pairs_names_the_pair(pairs, error, message):
    with pytest.raises(error, match=message):
        CovisibilityGraph.from_pairs(4, pairs)


@pytest.mark.parametrize(
    ("visible", "error", "message"),
    [
        (torch.ones(2, 2), TypeError, "bool tensor or array, got torch.float32"),
        (np.ones((2, 2), dtype=np.int8), TypeError, "got torch.int8"),
        ([[True]], TypeError, "got list"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"got shape \(2,\)"),
        (torch.ones(1, 2, 2, dtype=torch.bool), ValueError, r"got shape \(1, 2, 2\)"),
        (torch.ones(0, 0, dtype=torch.bool), ValueError, "at least one frame"),
    ],
)
def test_from_dense_refuses(visible, error, message):
    with pytest.raises(error, match=message):
        CovisibilityGraph.from_dense(visible)


def test_sequential_refuses_a_negative_window():
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        CovisibilityGraph.sequential(3, -1)


def test_edges_beyond_int32_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="at most 2147483647 edges"):
        CovisibilityGraph.all_visible(50_000)


def test_union_refuses_other_frames_and_other_things():
    square = CovisibilityGraph.all_visible(3)
    with pytest.raises(ValueError, match=r"got \(3, 3\) and \(3, 4\) frames"):
        square | CovisibilityGraph.all_visible(3, 4)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        square | square.to("meta")
    with pytest.raises(TypeError, match="unsupported operand"):
        square | 1


@pytest.mark.parametrize("what", ["symmetrized", "is_connected", "num_components"])
def test_rectangular_graphs_have_no_components(what):
    graph = CovisibilityGraph.all_visible(3, 4)
    with pytest.raises(ValueError, match=rf"{what}.* needs the same frames .*3 query frames and 4 key frames"):
        value = getattr(graph, what)
        value()


# Connectivity and summary.


def hops_by_matrix_powers(visible):
    """Hop counts `[S, S]` over edges taken both ways; -1 where there is no way."""
    step = (with_diagonal(visible) | with_diagonal(visible).T).float()
    reached = torch.eye(len(visible))
    hops = torch.full(visible.shape, -1)
    for hop in range(len(visible)):
        hops[(reached > 0) & (hops < 0)] = hop
        reached = (reached @ step > 0).float()
    return hops


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.0, 0.005, 0.01, 0.02, 0.05, 0.5])
def test_components_and_diameter_equal_brute_force(density, seed):
    visible = random_matrix(90, 90, density, seed)
    hops = hops_by_matrix_powers(visible)
    graph = CovisibilityGraph.from_dense(visible, square=True)
    components = len((hops >= 0).unique(dim=0))
    assert graph.num_components == components
    assert graph.is_connected() == (components == 1)
    summary = graph.summary()
    assert summary.components == components
    assert summary.hop_diameter == int(hops.max())
    assert summary.hop_diameter_is_exact
    degrees = with_diagonal(visible).sum(dim=1) - 1
    assert (summary.degree_min, summary.degree_max) == (int(degrees.min()), int(degrees.max()))
    assert summary.degree_median == np.median(degrees.numpy())


def test_degrees_do_not_count_the_diagonal_where_there_is_one():
    graph = CovisibilityGraph.from_pairs(2, [(0, 0), (0, 1)], num_key_frames=2)
    summary = graph.summary()
    assert (summary.degree_min, summary.degree_max) == (0, 1)


@pytest.mark.parametrize("frames", [1, 3000])
def test_chain_shuffled(frames):
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(0))
    graph = CovisibilityGraph.from_pairs(frames, torch.stack([order[1:], order[:-1]], dim=1))
    assert graph.is_connected()
    summary = graph.summary()
    assert summary.hop_diameter == frames - 1
    assert summary.hop_diameter_is_exact == (frames <= 2000)
    assert ("at least" in str(summary)) == (frames > 2000)


@pytest.mark.parametrize(
    ("graph", "warnings"),
    [
        (CovisibilityGraph.sequential(40, 2), []),
        (CovisibilityGraph.all_visible(4), ["density 1.00 is above 0.6"]),
        (CovisibilityGraph.from_pairs(4, [(0, 1), (1, 0)]), ["3 components", "see no other frame: 2"]),
        (CovisibilityGraph.from_pairs(4, [(0, 1)], num_key_frames=6), ["see no key frame.*: 3"]),
    ],
    ids=["good", "dense", "apart", "rectangular"],
)
def test_summary_warns(graph, warnings):
    summary = graph.summary()
    assert isinstance(summary, GraphSummary)
    assert len(summary.warnings) == len(warnings)
    for given, pattern in zip(summary.warnings, warnings, strict=True):
        assert re.search(pattern, given)
        assert f"warning: {given}" in str(summary)


def test_summary_of_a_rectangular_graph_leaves_components_out():
    summary = CovisibilityGraph.all_visible(3, 50).summary()
    assert summary.components is None and summary.hop_diameter is None
    assert str(summary).startswith("3 query frames, 50 key frames, 150 edges, density 1\n")
    assert "components" not in str(summary)


# Size.


def test_ten_thousand_frames_in_under_a_second():
    frames = 10_000
    visible = torch.randint(frames, (frames * 32,), generator=torch.Generator().manual_seed(0))
    codes = (torch.arange(frames).repeat_interleave(32) * frames + visible).unique()
    pairs = torch.stack([codes // frames, codes % frames], dim=1)

    def seconds_of_work():
        start = time.process_time()
        graph = CovisibilityGraph.from_pairs(frames, pairs)
        both = graph.symmetrized() | CovisibilityGraph.sequential(frames, 4)
        both.transposed()
        assert both.is_connected()
        return time.process_time() - start

    assert min(seconds_of_work() for _ in range(3)) < 1.0
