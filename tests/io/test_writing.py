"""Files are whole or as they were: they are written beside their places and put there when all are on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from svggt_kernels.io.writing import replacing, write_all


def test_whoever_reads_a_file_reads_a_whole_one(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"before")
    with (tmp_path / "a").open("rb") as reader:
        write_all(tmp_path, {"a": b"after", "deep/b": b"new"})
        assert reader.read() == b"before"
    assert (tmp_path / "a").read_bytes() == b"after"
    assert (tmp_path / "deep/b").read_bytes() == b"new"


def test_what_a_link_leads_to_is_not_written(tmp_path: Path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    write_all(tmp_path, {"link": b"new"})
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
def test_what_stops_it_leaves_what_was_there(tmp_path: Path, error: BaseException):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(type(error)), replacing([tmp_path / "a", tmp_path / "b"]) as [first, second]:
        first.write_bytes(b"whole")
        second.write_bytes(b"ha")
        raise error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"before"}
