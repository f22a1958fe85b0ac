"""Pairs that are known to share a view, and what a graph keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svggt_kernels import CovisibilityGraph
from svggt_kernels.graph.recall import chance_recall, edge_recall
from svggt_kernels.measure import truth


class TestTruth:
    photos = (Path("a.jpg"), Path("b.jpg"), Path("c.jpg"))

    @pytest.mark.parametrize(
        ("rows", "pairs"),
        [
            ("x,y,score\na.jpg,b.jpg,1\n", [[0, 1], [1, 0]]),
            ("a,b\n\nb,a\n", [[0, 1], [1, 0]]),
            ("\ufeffa.jpg,c.jpg,0.5\na,b,0\n", [[0, 2], [2, 0]]),
            ("a,a,9\nb,c,1\n", [[1, 2], [2, 1]]),
            ("walk/a.jpg,./c,1\n", [[0, 2], [2, 0]]),
        ],
        ids=["heading", "no score", "byte order mark", "diagonal", "folders"],
    )
    def test_reads(self, tmp_path: Path, rows: str, pairs: list[list[int]]) -> None:
        (tmp_path / "pairs.csv").write_text(rows, encoding="utf-8")
        photos = [tmp_path / "walk" / photo for photo in self.photos]
        assert truth.read_pairs(tmp_path / "pairs.csv", photos).tolist() == pairs

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("a,z,1\n", "line 1 .* names 'z'"),
            ("a,b,1\na\n", "line 2 .* must hold photo, photo, score"),
            ("a,b,1\na,c,many\n", "line 2 .* a number in its third field, got 'many'"),
            ("a,b,0\n", "must name a pair"),
            ("", "must name a pair"),
            ("a,b,nan\n", "line 1 .* a number in its third field, got 'nan'"),
            ("typo.jpg,b.jpg\na,c\n", "line 1 .* names 'typo.jpg'"),
            ("typo.jpg,b.jpg,1O\na,c,1\n", "line 1 .* names 'typo.jpg'"),
            ("other/a.jpg,b,1\n", "line 1 .* names 'other/a.jpg'"),
            ("a,b,1\nd,a,1\n", "line 2 of .*pairs.csv: 'd' must mean one image, but fits .*d.jpg, .*d.png"),
            ("a,b,1\na," + 200_000 * "x", "pairs.csv must be comma-separated values in UTF-8, .* field larger"),
        ],
        ids=[
            "unknown photo",
            "short row",
            "no number",
            "nothing above",
            "empty",
            "not a number",
            "misspelt in the first line",
            "misspelt twice in the first line",
            "other folder",
            "two suffixes",
            "long field",
        ],
    )
    def test_refuses(self, tmp_path: Path, rows: str, message: str) -> None:
        (tmp_path / "pairs.csv").write_text(rows)
        with pytest.raises(ValueError, match=message):
            truth.read_pairs(tmp_path / "pairs.csv", (*self.photos, Path("d.jpg"), Path("d.png")))

    def test_refuses_another_encoding(self, tmp_path: Path) -> None:
        (tmp_path / "pairs.csv").write_text("a,b,1\n", encoding="utf-16")
        with pytest.raises(ValueError, match="must be comma-separated values in UTF-8"):
            truth.read_pairs(tmp_path / "pairs.csv", self.photos)

    def test_recall_counts_directed_pairs(self) -> None:
        graph = CovisibilityGraph.from_pairs(4, [(0, 1), (1, 0), (2, 3)])
        assert edge_recall(graph, torch.tensor([[0, 1], [2, 3], [3, 2], [0, 3]])) == 0.5
        assert chance_recall(graph) == 3 / 12

    @pytest.mark.parametrize("pairs", [torch.empty(0, 2).long(), torch.tensor([[0, 4]]), torch.tensor([0, 1])], ids=str)
    def test_recall_refuses(self, pairs: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="pairs must be"):
            edge_recall(CovisibilityGraph.all_visible(4), pairs)
