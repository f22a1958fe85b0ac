"""Comparing covisibility graphs."""

import torch


def with_diagonal(visible):
    if visible.shape[0] != visible.shape[1]:
        return visible
    return visible | torch.eye(len(visible), dtype=torch.bool)


def assert_same_graph(graph, other):
    assert (graph.num_frames, graph.num_key_frames) == (other.num_frames, other.num_key_frames)
    assert torch.equal(graph.indptr, other.indptr)
    assert torch.equal(graph.indices, other.indices)
