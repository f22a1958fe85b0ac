"""MegaLoc: its equations, what it accepts, and where its weights may come from."""

from __future__ import annotations

import copy
import math
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIG, SIZE, megaloc
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svggt_kernels import MegaLoc
from svggt_kernels.graph import CovisibilityGraph
from svggt_kernels.sources.megaloc import weights
from svggt_kernels.sources.megaloc.network import assign


def pictures(number: int = 3, height: int = SIZE, width: int = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


# What it computes


def test_published_sizes():
    model = MegaLoc()
    assert sum(parameter.numel() for parameter in model.parameters()) == 228_639_553
    names = model.state_dict()
    assert len(names) == 189
    assert names["aggregator.linear.weight"].shape == (8448, 16640)
    assert names["backbone.pos_embed"].shape == (1, 1370, 768)
    assert names["aggregator.agg.cluster_features.3.weight"].shape == (256, 512, 1, 1)
    assert names["aggregator.agg.dust_bin"].shape == ()


def test_without_weights_nothing_can_be_computed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        MegaLoc(CONFIG)(pictures()).tolist()


def test_assignment_is_three_rounds_of_sinkhorn():
    """The textbook form: a kernel scaled by rows and columns, masses normalised to one, in float64."""
    scores = 5 * torch.randn(2, 4, 9, dtype=torch.float64)
    kernel = torch.cat([scores, torch.full((2, 1, 9), 0.7, dtype=torch.float64)], dim=1).exp()
    of_rows = torch.tensor([1.0, 1, 1, 1, 9 - 4], dtype=torch.float64).view(5, 1) / 9
    v = torch.ones(2, 1, 9, dtype=torch.float64)
    for _ in range(3):
        u = of_rows / (kernel * v).sum(dim=2, keepdim=True)
        v = (1 / 9) / (kernel * u).sum(dim=1, keepdim=True)
    expected = 9 * (kernel * u * v)[:, :4]
    torch.testing.assert_close(assign(scores, torch.tensor(0.7, dtype=torch.float64)), expected)


def test_aggregation_sums_features_by_share():
    """The sum over patches written out, features before clusters."""
    aggregation = megaloc().aggregator["agg"]
    class_token, tokens = torch.randn(2, 16), torch.randn(2, 9, 16)
    actual = aggregation(class_token, tokens)
    images = tokens.mT.reshape(2, 16, 3, 3)

    def convolved(first: nn.Module, second: nn.Module) -> Tensor:
        return F.conv2d(F.conv2d(images, first.weight, first.bias).relu(), second.weight, second.bias).flatten(2)

    features = convolved(aggregation.cluster_features[0], aggregation.cluster_features[3])
    shares = assign(convolved(aggregation.score[0], aggregation.score[3]), aggregation.dust_bin)
    summed = torch.stack([(features * shares[:, k, None]).sum(-1) for k in range(4)], dim=-1)
    parts = [F.normalize(aggregation.token_features(class_token)), F.normalize(summed, dim=1).flatten(1)]
    torch.testing.assert_close(actual, F.normalize(torch.cat(parts, dim=1)))


def test_attention_is_softmax_attention():
    attention = megaloc().backbone.blocks[0].attn
    tokens = torch.randn(2, 10, 16)
    q, k, v = (part.reshape(2, 10, 2, 8).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=-1))
    shares = (q @ k.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(tokens), attention.proj((shares @ v).transpose(1, 2).reshape(2, 10, 16)))


def test_positions_keep_rows_apart_from_columns():
    backbone = megaloc().backbone
    with torch.no_grad():
        backbone.pos_embed[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    grid = backbone.positions(3, 6)[0, 1:, 0].unflatten(0, (3, 6))
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid.diff(dim=1), torch.zeros(3, 5))
    assert backbone.positions(4, 4) is backbone.pos_embed


def test_descriptors_have_unit_length_and_tell_images_apart():
    descriptors = megaloc()(pictures(3, 42, 56))
    assert descriptors.shape == (3, 32)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(3))
    assert float((descriptors @ descriptors.T).fill_diagonal_(0).max()) < 1 - 1e-5


def test_odd_sides_are_resampled_to_whole_patches():
    model, images = megaloc(), pictures(2, 45, 60)
    resampled = F.interpolate(images, size=(42, 56), mode="bilinear", antialias=True)
    torch.testing.assert_close(model(images), model(resampled))


def test_batches_change_nothing():
    model, images = megaloc(), pictures(5, 30, 50)
    alone = torch.cat([model.describe(image[None], size=SIZE) for image in images])
    torch.testing.assert_close(model.describe(images, size=SIZE, batch_size=2), alone)


def test_bytes_are_shares_of_255():
    model = megaloc()
    pixels = torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8)
    assert torch.equal(model.describe(pixels, size=SIZE), model.describe(pixels.float() / 255, size=SIZE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_reduced_precision(dtype: torch.dtype):
    exact = megaloc().describe(pictures(), size=SIZE)
    described = megaloc().to(dtype).describe(pictures(), size=SIZE)
    assert described.dtype == torch.float32
    assert float((exact * described).sum(dim=1).min()) > 0.999


def test_callers_modes_do_not_matter():
    """Autocast would lower the precision, inference mode would taint what is kept, training would drop out."""
    model = megaloc()
    expected = model.describe(pictures(), size=SIZE)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        described = model.train().describe(pictures(), size=SIZE)
    assert torch.equal(described, expected)
    assert not described.is_inference() and not described.requires_grad


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: numbers read from a tensor, and tensors made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


def test_batches_do_not_wait_for_the_device():
    model, counts = megaloc(), []
    for number in (2, 8):
        with Waits() as waits:
            model.describe(pictures(number, 50, 60), size=SIZE, batch_size=2)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("of_bytes", [False, True], ids=["numbers", "bytes"])
def test_images_elsewhere_are_sent_to_the_device(of_bytes: bool):
    images = (255 * pictures(9)).byte() if of_bytes else pictures(9)
    described = megaloc().to("cuda").describe(images, size=SIZE, batch_size=2)
    assert described.device.type == "cuda"
    torch.testing.assert_close(described.cpu(), megaloc().describe(images, size=SIZE), rtol=0, atol=1e-3)


def test_progress_bar(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    megaloc().describe(pictures(4), size=SIZE, batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    megaloc().describe(pictures(4), size=SIZE, batch_size=2)
    assert capsys.readouterr().err == ""


# What it is given


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(2, 1, 42, 42), ValueError, "RGB.*repeat the channel of grey images"),
        (torch.rand(2, 4, 42, 42), ValueError, "drop an alpha channel"),
        (torch.rand(3, 42, 42), ValueError, r"\[S, 3, H, W\]"),
        (torch.rand(0, 3, 42, 42), ValueError, "at least one image"),
        (torch.rand(2, 3, 42, 42) * 255, ValueError, r"in \[0, 1\].*divide 8-bit images by 255"),
        (torch.randn(2, 3, 42, 42), ValueError, "leave normalisation to the model"),
        (torch.zeros(2, 3, 42, 42, dtype=torch.int64), TypeError, "uint8 or floating point, got torch.int64"),
    ],
    ids=["grey", "alpha", "one image", "none", "0 to 255", "normalised", "integers"],
)
def test_images_that_cannot_be_described(images: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        megaloc().describe(images, size=SIZE)


def test_nan_is_found_in_its_image():
    images = pictures(5)
    images[3, 1, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="must not hold NaN, but images 3 do"):
        megaloc().describe(images, size=SIZE, batch_size=2)


def test_too_few_patches():
    with pytest.raises(ValueError, match=r"more than 4 patches .* 28 x 28 pixels hold 4; enlarge"):
        megaloc()(pictures(1, 28, 28))
    assert megaloc().describe(pictures(1, 5, 9), size=SIZE).isfinite().all()
    with pytest.raises(ValueError, match="28 x 28 pixels hold 4"):
        megaloc().describe(pictures(), size=28)


@pytest.mark.parametrize("name", ["size", "batch_size"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be at least 1, got 0"),
        (2.5, TypeError, "must be an integer, got 2.5"),
        ("56", TypeError, "must be an integer, got '56'"),
        (None, TypeError, "must be an integer, got None"),
    ],
    ids=str,
)
def test_counts_that_are_none(name: str, value: object, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^{name} {message}"):
        megaloc().describe(pictures(), **{"size": SIZE, name: value})  # type: ignore[arg-type]


def test_weights_that_overflow_are_found():
    model = megaloc()
    model.aggregator["linear"].bias[0] = torch.inf
    with pytest.raises(ValueError, match="descriptors of images 0, 1, 2 are not finite"):
        model.describe(pictures(), size=SIZE)


def test_one_image_and_identical_images():
    model = megaloc()
    assert CovisibilityGraph.from_descriptors(model.describe(pictures(1), size=SIZE)).num_edges == 1
    same = model.describe(pictures(1).expand(4, -1, -1, -1), size=SIZE)
    graph = CovisibilityGraph.from_descriptors(same, neighbours=2)
    assert graph.is_connected()
    # Equal scores go to the smaller index, whatever the batch.
    assert torch.equal(
        graph.to_dense(), CovisibilityGraph.from_descriptors(same[:1].expand(4, -1), neighbours=2).to_dense()
    )


# Where its weights come from


@pytest.fixture
def published(tmp_path: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(megaloc(7).state_dict(), tmp_path / weights.FILE)
    return tmp_path / weights.FILE


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_loads_a_file(published: Path, as_folder: bool):
    model = MegaLoc.from_pretrained(published.parent if as_folder else published, config=CONFIG)
    assert torch.equal(model(pictures()), megaloc(7)(pictures()))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_loads_the_keys_of_the_first_release(tmp_path: Path):
    old = {name.replace("backbone.", "backbone.model."): value for name, value in megaloc(7).state_dict().items()}
    old["backbone.model.mask_token"] = torch.zeros(1, 16)
    torch.save(old, tmp_path / "megaloc.torch")
    model = MegaLoc.from_pretrained(tmp_path / "megaloc.torch", config=CONFIG)
    assert torch.equal(model(pictures()), megaloc(7)(pictures()))


def test_half_precision_files_are_widened(tmp_path: Path):
    torch.save({name: value.half() for name, value in megaloc().state_dict().items()}, tmp_path / "m.pt")
    model = MegaLoc.from_pretrained(tmp_path / "m.pt", config=CONFIG)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("in_cache", [True, False], ids=["cache", "download"])
def test_hub_is_asked_only_for_what_the_cache_lacks(published: Path, monkeypatch: pytest.MonkeyPatch, in_cache: bool):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []

    def download(name: str, file: str, *, local_files_only: bool = False) -> str:
        asked.append((name, file, local_files_only))
        if local_files_only and not in_cache:
            raise hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(published)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url: asked.append(url))
    MegaLoc.from_pretrained(config=CONFIG)
    here = ("gberton/MegaLoc", "model.safetensors", True)
    assert asked == ([here] if in_cache else [here, hub.hf_hub_url(*here[:2]), (*here[:2], False)])


def test_without_a_network_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    download = hub.hf_hub_download
    monkeypatch.setattr(hub, "hf_hub_download", lambda *names, **how: download(*names, cache_dir=tmp_path, **how))

    def no_network(*arguments: object, **options: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to try again"))
    with pytest.raises(FileNotFoundError) as error:
        MegaLoc.from_pretrained()
    for word in ("model.safetensors", "gberton/MegaLoc", "no network", "from_pretrained(path)", '"patches"', "poses"):
        assert word in str(error.value)
    assert "core=MegaLocSimilarity(weights=path)" in str(error.value)
    assert "covisibility=Core(by=MegaLocSimilarity(weights=path))" in str(error.value)


def test_no_hub_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"model.safetensors of gberton/MegaLoc.*\[megaloc\].*\"patches\""):
        MegaLoc.from_pretrained()


@pytest.mark.parametrize("source", ["nowhere/model.safetensors", "./nowhere", "/no/such/file", "nowhere.pt"])
def test_path_that_is_not_there(source: str):
    with pytest.raises(FileNotFoundError, match=r"there is no such file; download .*\"patches\""):
        MegaLoc.from_pretrained(source)


@pytest.mark.parametrize("source", [None, 3, nn.Identity()], ids=lambda source: type(source).__name__)
def test_source_that_is_no_path(source: object):
    with pytest.raises(TypeError, match=f"must be given as a path or as the name .*, got {type(source).__name__}"):
        MegaLoc.from_pretrained(source)  # type: ignore[arg-type]


def test_folder_without_weights(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"must hold MegaLoc's weights as model\.safetensors"):
        MegaLoc.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", [5, 0.5, 0.99], ids=["header", "half", "end"])
def test_damaged_safetensors(published: Path, cut: float):
    content = published.read_bytes()
    published.write_bytes(content[: cut if isinstance(cut, int) else int(cut * len(content))])
    with pytest.raises(ValueError, match=r"cannot be read .*download model\.safetensors"):
        MegaLoc.from_pretrained(published, config=CONFIG)


def test_damaged_pickle(tmp_path: Path):
    (tmp_path / "m.pth").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="cannot be read"):
        MegaLoc.from_pretrained(tmp_path / "m.pth", config=CONFIG)


def test_pickles_run_no_code(tmp_path: Path):
    torch.save({"model": megaloc()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        MegaLoc.from_pretrained(tmp_path / "m.pth", config=CONFIG)


def test_wrong_keys(tmp_path: Path):
    state = megaloc().state_dict()
    state["head.weight"] = state.pop("aggregator.linear.weight")
    state["aggregator.linear.bias"] = torch.zeros(31)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError) as error:
        MegaLoc.from_pretrained(tmp_path / "m.pt", config=CONFIG)
    for words in (
        "missing: aggregator.linear.weight",
        "not known: head.weight",
        "aggregator.linear.bias [31] (must be [32])",
    ):
        assert words in str(error.value)


def test_numbers_instead_of_names(tmp_path: Path):
    torch.save(dict(enumerate(megaloc().state_dict().values())), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="0 stands for Tensor"):
        MegaLoc.from_pretrained(tmp_path / "m.pt", config=CONFIG)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floating_point(tmp_path: Path, dtype: torch.dtype):
    torch.save({name: value.to(dtype) for name, value in megaloc().state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"of another kind of number: .*{dtype}"):
        MegaLoc.from_pretrained(tmp_path / "m.pt", config=CONFIG)


def test_random_weights_are_the_same_each_time():
    assert torch.equal(megaloc(3)(pictures()), megaloc(3)(pictures()))
    assert not torch.equal(megaloc(3)(pictures()), megaloc(4)(pictures()))
    assert torch.equal(copy.deepcopy(megaloc(3))(pictures()), megaloc(3)(pictures()))
