"""The descriptor recipe against brute force."""

import itertools

import numpy as np
import pytest
import torch
from graphs import assert_same_graph, with_diagonal
from torch.utils._python_dispatch import TorchDispatchMode

from svggt_kernels.graph import CovisibilityGraph


def scattered(frames, seed=0):
    """Clusters of different sizes, no two scores alike."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(frames // 6 + 1, 24, generator=generator)
    owner = torch.randint(len(centres), (frames,), generator=generator)
    return centres[owner] + 0.3 * torch.randn(frames, 24, generator=generator)


def signs(frames, seed=0):
    """Corners of a cube: cosines are multiples of 1 / 8, so that nearly every score is tied."""
    return torch.randint(0, 2, (frames, 16), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


def pairs_of_twins(frames, seed=0):
    """Orthogonal axes, each held by two or three frames: every component ties with every other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(frames)[torch.randint(frames // 2 + 1, (frames,), generator=generator)]


def identical(frames, seed=0):
    return torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)).expand(frames, 24)


DESCRIPTORS = [scattered, signs, pairs_of_twins, identical]


def components_by_walking(visible):
    labels = np.full(len(visible), -1)
    for start in range(len(visible)):
        waiting = [start] if labels[start] < 0 else []
        while waiting:
            frame = waiting.pop()
            labels[frame] = start
            waiting += [j for j in np.flatnonzero(visible[frame] | visible[:, frame]) if labels[j] < 0]
    return labels


def graph_by_brute_force(descriptors, neighbours=10, window=0, reference_frame=0, anchors=None, bridge=True):
    """The documented recipe over the whole score matrix, Kruskal's way for the bridges."""
    unit = torch.nn.functional.normalize(descriptors.double(), dim=1).numpy()
    scores = np.round(unit @ unit.T, 12)
    frames = len(scores)
    visible = np.eye(frames, dtype=bool)
    for i in range(frames):
        others = [j for j in range(frames) if j != i]
        for j in sorted(others, key=lambda j: (-scores[i, j], j))[:neighbours]:
            visible[i, j] = visible[j, i] = True
    for i, j in itertools.product(range(frames), repeat=2):
        visible[i, j] |= abs(i - j) <= window
    if bridge:
        labels = components_by_walking(visible)
        for i, j in sorted(itertools.combinations(range(frames), 2), key=lambda pair: (-scores[pair], pair)):
            if labels[i] != labels[j]:
                visible[i, j] = visible[j, i] = True
                labels[labels == labels[j]] = labels[i]
    if reference_frame is not None:
        visible[reference_frame, :] = visible[:, reference_frame] = True
    if anchors is None:
        anchors = min(8, frames // 16)
    chosen = [0 if reference_frame is None else reference_frame]
    while len(chosen) < min(anchors + (reference_frame is not None), frames):
        rest = [j for j in range(frames) if j not in chosen]
        chosen.append(min(rest, key=lambda j: (scores[j, chosen].max(), j)))
    if reference_frame is not None or anchors > 0:
        visible[:, chosen] = True
    return visible


@pytest.mark.parametrize("make", DESCRIPTORS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"neighbours": 0},
        {"neighbours": 1, "anchors": 0},
        {"neighbours": 2, "reference_frame": None, "anchors": 0},
        {"neighbours": 2, "reference_frame": None, "anchors": 0, "bridge": False},
        {"neighbours": 1, "window": 3, "reference_frame": None},
        {"neighbours": 3, "window": 1, "reference_frame": 17, "anchors": 5},
        {"neighbours": 48},
        {"neighbours": 1000, "window": 1000},
        {"neighbours": 1, "anchors": 49},
    ],
    ids=str,
)
def test_from_descriptors_equals_brute_force(make, options):
    descriptors = make(49)
    graph = CovisibilityGraph.from_descriptors(descriptors, chunk=8, **options)
    assert np.array_equal(graph.to_dense().numpy(), graph_by_brute_force(descriptors, **options))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", DESCRIPTORS)
def test_bridges_are_the_maximum_spanning_tree_over_components(make, seed):
    descriptors = make(60, seed)
    options = {"neighbours": 1, "reference_frame": None, "anchors": 0}
    apart = CovisibilityGraph.from_descriptors(descriptors, bridge=False, **options)
    bridged = CovisibilityGraph.from_descriptors(descriptors, bridge=True, chunk=7, **options)
    assert bridged.is_connected()
    assert bridged.num_edges == apart.num_edges + 2 * (apart.num_components - 1)
    assert np.array_equal(bridged.to_dense().numpy(), graph_by_brute_force(descriptors, **options))


@pytest.mark.parametrize("make", DESCRIPTORS)
def test_chunk_size_never_changes_the_graph(make):
    descriptors = make(70)
    graphs = [
        CovisibilityGraph.from_descriptors(descriptors, neighbours=4, chunk=chunk) for chunk in (1, 5, 64, 70, 2048)
    ]
    for graph in graphs[1:]:
        assert_same_graph(graph, graphs[0])


def test_length_of_descriptors_does_not_matter():
    descriptors = scattered(40)
    lengths = 2.0 ** torch.arange(-20, 20)[:, None]
    expected = CovisibilityGraph.from_descriptors(descriptors)
    assert_same_graph(CovisibilityGraph.from_descriptors(descriptors * lengths), expected)
    assert_same_graph(CovisibilityGraph.from_descriptors(descriptors.double() * 1e200), expected)
    assert_same_graph(CovisibilityGraph.from_descriptors(descriptors.numpy()), expected)
    assert_same_graph(CovisibilityGraph.from_descriptors(descriptors.T.contiguous().T), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype):
    descriptors = scattered(40).to(dtype)
    graph = CovisibilityGraph.from_descriptors(descriptors, neighbours=3)
    assert np.array_equal(graph.to_dense().numpy(), graph_by_brute_force(descriptors, neighbours=3))


def test_autocast_and_gradients_do_not_reach_the_scores():
    descriptors = scattered(40)
    expected = CovisibilityGraph.from_descriptors(descriptors)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_graph(CovisibilityGraph.from_descriptors(descriptors.requires_grad_()), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", [None, "r", "r+", "c"], ids=str)
def test_descriptors_are_the_callers(tmp_path, dtype, mode):
    values = scattered(40).numpy().astype(dtype)
    np.save(tmp_path / "descriptors.npy", values)
    given = np.load(tmp_path / "descriptors.npy", mmap_mode=mode)
    expected = CovisibilityGraph.from_descriptors(scattered(40), neighbours=3)
    assert_same_graph(CovisibilityGraph.from_descriptors(given, neighbours=3), expected)
    assert np.array_equal(given, values)
    assert np.array_equal(np.load(tmp_path / "descriptors.npy"), values)
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    CovisibilityGraph.from_descriptors(parameter)
    assert np.array_equal(parameter.detach().numpy(), values)


def test_arrays_of_any_order_are_read():
    expected = CovisibilityGraph.from_descriptors(scattered(40), neighbours=3)
    values = scattered(40).numpy()
    read_only = np.broadcast_to(values, (1, *values.shape))[0]
    backwards = np.ascontiguousarray(values[::-1])[::-1]
    for given in (np.asfortranarray(values), backwards, read_only, values.astype(">f4")):
        assert_same_graph(CovisibilityGraph.from_descriptors(given, neighbours=3), expected)


def test_known_pairs_come_before_bridges():
    """Three places; two of them are known to be one, so that one bridge is needed and the known pair is none."""
    places = torch.eye(3).repeat_interleave(4, 0) + 0.1 * torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    options = {"neighbours": 3, "reference_frame": None, "anchors": 0}
    known = CovisibilityGraph.from_pairs(12, [(2, 9)])
    without, graph = (CovisibilityGraph.from_descriptors(places, also=also, **options) for also in (None, known))
    assert without.summary().bridges == 2
    assert graph.is_connected() and graph.summary().bridges == 1
    assert graph.to_dense()[2, 9] and not graph.to_dense()[9, 2]
    assert any("leave 2 parts, which 1 added pairs join" in warning for warning in graph.summary().warnings)
    everything = CovisibilityGraph.from_descriptors(places, also=CovisibilityGraph.all_visible(12), **options)
    assert everything.summary().bridges == 0
    with pytest.raises(ValueError, match="only graphs over the same frames"):
        CovisibilityGraph.from_descriptors(places, also=CovisibilityGraph.all_visible(11))


@pytest.mark.parametrize("reference_frame", [0, None])
@pytest.mark.parametrize("anchors", [None, 0, 1])
def test_one_frame(reference_frame, anchors):
    graph = CovisibilityGraph.from_descriptors(torch.ones(1, 3), reference_frame=reference_frame, anchors=anchors)
    assert torch.equal(graph.to_dense(), torch.ones(1, 1, dtype=torch.bool))


def test_more_neighbours_than_frames_give_the_full_graph():
    assert CovisibilityGraph.from_descriptors(scattered(20), neighbours=500).density == 1.0


def test_identical_frames_see_the_first_ones():
    options = {"neighbours": 2, "reference_frame": None, "anchors": 0}
    dense = CovisibilityGraph.from_descriptors(identical(30), **options).to_dense()
    hubs = torch.zeros(30, dtype=torch.bool)
    hubs[:2] = True
    expected = with_diagonal(hubs[:, None] | hubs)
    expected[1, 2] = expected[2, 1] = expected[0, 2] = expected[2, 0] = True
    assert torch.equal(dense, expected)


@pytest.mark.parametrize(
    ("frame", "value", "message"),
    [
        (3, float("nan"), "descriptors must be finite, but that of frame 3 holds NaN"),
        (5, float("-inf"), "that of frame 5 holds NaN or infinity"),
        (4, 0.0, "descriptor of frame 4 is zero and has no direction"),
    ],
)
def test_descriptors_without_a_direction_are_named(frame, value, message):
    descriptors = torch.ones(9, 4)
    descriptors[frame] = value
    with pytest.raises(ValueError, match=message):
        CovisibilityGraph.from_descriptors(descriptors)


@pytest.mark.parametrize(
    ("descriptors", "error", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int64), TypeError, "floating point tensor or array, got torch.int64"),
        ([[1.0]], TypeError, "got list"),
        (torch.ones(4), ValueError, r"\[S, C\].*got shape \(4,\)"),
        (torch.ones(1, 4, 3), ValueError, r"got shape \(1, 4, 3\)"),
        (torch.ones(0, 3), ValueError, r"got shape \(0, 3\)"),
        (torch.ones(3, 0), ValueError, r"got shape \(3, 0\)"),
    ],
)
def test_from_descriptors_refuses_other_shapes_and_types(descriptors, error, message):
    with pytest.raises(error, match=message):
        CovisibilityGraph.from_descriptors(descriptors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"neighbours": -1}, ValueError, "neighbours must be at least 0, got -1"),
        ({"neighbours": 2.5}, TypeError, "neighbours must be an integer, got 2.5"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"reference_frame": 6}, ValueError, r"reference_frame must be in \[0, 5\], got 6"),
        ({"reference_frame": -1}, ValueError, r"reference_frame must be in \[0, 5\], got -1"),
        ({"anchors": 7}, ValueError, r"anchors must be in \[0, 6\], got 7"),
        ({"anchors": -1}, ValueError, r"anchors must be in \[0, 6\], got -1"),
    ],
    ids=str,
)
def test_from_descriptors_refuses_options(options, error, message):
    with pytest.raises(error, match=message):
        CovisibilityGraph.from_descriptors(torch.ones(6, 3), **options)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.numel() == tensor.untyped_storage().nbytes() // tensor.itemsize
            ):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("make", [scattered, identical])
def test_from_descriptors_never_holds_a_dense_matrix(make):
    frames, chunk = 2000, 128
    with LargestTensor() as largest:
        graph = CovisibilityGraph.from_descriptors(make(frames), neighbours=3, chunk=chunk)
    edges_and_descriptors = 2 * graph.num_edges + frames * 24
    assert largest.elements <= max(chunk * chunk, edges_and_descriptors) < frames * frames / 20
