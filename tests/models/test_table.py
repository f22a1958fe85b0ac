"""The table of models: every file of a model is in it, records travel with pickled models, and outputs have names."""

from __future__ import annotations

import importlib
import pickle
import pkgutil

import pytest
import torch
from torch import nn

from svggt_kernels import models
from svggt_kernels.models import RECORDS, RUNNABLE, ModelRecord
from svggt_kernels.models.depth_anything_3 import IMAGENET_DEVIATION, IMAGENET_MEAN

SHARED = {"base", "cameras", "loading", "wrappers"}
"""The modules that belong to no model."""


def test_every_file_of_a_model_is_in_the_table():
    names = {module.name for module in pkgutil.iter_modules(models.__path__)} - SHARED
    for name in names:
        module = importlib.import_module(f"{models.__name__}.{name}")
        stated = [value for value in vars(module).values() if isinstance(value, ModelRecord)]
        assert stated, f"{name}.py states no record"
        assert all(record in RECORDS for record in stated), f"a record of {name}.py is not in RECORDS"


def test_names_are_of_one_record_each():
    assert len({record.name for record in RECORDS}) == len(RECORDS)
    assert list(RUNNABLE.values()) == [record.runnable for record in RECORDS if record.runnable]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_can_be_pickled(record: ModelRecord):
    assert pickle.loads(pickle.dumps(record)).name == record.name


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_no_record_takes_just_any_module(record: ModelRecord):
    assert not record.matches(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("toy", {"depth": torch.rand(1, 5, 14, 28, 1), "pose_enc": torch.rand(1, 5, 9)}),
        ("da3-small", {"depth": torch.rand(1, 5, 14, 28), "extrinsics": torch.rand(1, 5, 3, 4)}),
        ("vggt", {"depth": torch.rand(1, 5, 14, 28, 1), "pose_enc": torch.rand(1, 5, 9), "images": torch.rand(5)}),
        ("pi3", {"local_points": torch.rand(1, 5, 14, 28, 3), "camera_poses": torch.rand(1, 5, 4, 4)}),
    ],
)
def test_outputs_are_those_of_the_one_sample(name: str, result: dict[str, torch.Tensor]):
    outputs = RUNNABLE[name].outputs(result)
    assert set(outputs) == set(result) - {"images"} | {"depth"}
    assert outputs["depth"].shape == (5, 14, 28)
    assert all(len(output) == 5 for output in outputs.values())
    depth = result["local_points"][0, ..., 2] if name == "pi3" else result["depth"].reshape(5, 14, 28)
    assert torch.equal(outputs["depth"], depth)


@pytest.mark.parametrize("name", RUNNABLE)
def test_cameras_are_poses_in_the_axes_of_opencv(name: str):
    """A camera at (1, 2, 3) that looks along x: its x axis is -y of the world, its y axis -z."""
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.tensor([[0.0, 0, 1, 1], [-1, 0, 0, 2], [0, -1, 0, 3]])
    to_camera = pose.inverse()
    quaternion = torch.tensor([0.5, -0.5, 0.5, 0.5])  # x, y, z, w of the rotation from world to camera
    field_of_view = torch.ones(2)
    outputs = {
        "pose_enc": torch.cat([to_camera[:3, 3].float(), 2 * quaternion, field_of_view])[None],
        "extrinsics": to_camera[None, :3],
        "camera_poses": pose[None],
    }
    cameras = RUNNABLE[name].cameras(outputs)
    assert cameras.dtype == torch.float64
    torch.testing.assert_close(cameras, pose[None])


@pytest.mark.parametrize("record", [record for record in RECORDS if record.runnable], ids=lambda record: record.name)
def test_frames_are_fed_as_one_sample_with_the_colours_that_the_record_says(record: ModelRecord):
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    frames = torch.rand(5, 3, 14, 28)
    expected = (frames - mean) / deviation if record.images_are_normalised else frames
    assert torch.equal(record.runnable.feed(frames), expected[None])
