"""The peers of the benchmarks: each is given what its package documents, by stand-ins that run anywhere."""

from __future__ import annotations

import types
import warnings
from typing import NamedTuple

import pytest
import torch
from tiers import every
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import attention, repeat
from benchmarks.cases import Case
from benchmarks.check import check_forward, check_gradients
from benchmarks.peers import PEERS, backend, contender, flex, magi, ours
from svggt_kernels import backends, block_sparse_attention
from svggt_kernels.backends import hopper

CPU = torch.device("cpu")
BAND = Case.parse("s8-p9-band1-h3")
SOURCE = dict.fromkeys(("device", "torch", "triton", "commit", "command", "run", "date"), "")


@pytest.mark.parametrize("name", ["s5-p60-band1", "s3-p128-band0", "s4-p100-scattered1-special5", "s2-p300-band0"])
def test_flex_mask_shows_exactly_the_visible_tokens(name):
    case = Case.parse(name)
    mask = flex.flex_mask(case, CPU)
    token = torch.arange(case.frames * case.tokens)
    frame, special = token // case.tokens, token % case.tokens < case.special
    expected = case.visible[frame][:, frame] | special[:, None] | special

    blocks = -(-len(token) // flex.BLOCK)
    shown = torch.zeros(len(token), len(token), dtype=torch.bool)
    in_mask = mask.mask_mod(None, None, token[:, None], token)
    for counts, indices, is_full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row in range(blocks):
            for column in indices[0, 0, row, : counts[0, 0, row]].tolist():
                tile = tuple(slice(i * flex.BLOCK, (i + 1) * flex.BLOCK) for i in (row, column))
                shown[tile] = True if is_full else in_mask[tile]
    assert torch.equal(shown, expected)


class _BlockLists(NamedTuple):
    """FlashAttention-4's `BlockSparseTensorsTorch`, without the fields that are not used."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]

    def dense(self, columns):
        """Return which blocks are listed as masked and which as full, `[2, rows, columns]`."""
        assert self.block_size == (128, 128)
        listed = torch.zeros(2, self.mask_block_cnt.shape[2], columns, dtype=torch.int64)
        for blocks, counts, indices in zip(listed, self[0:4:2], self[1:4:2], strict=True):
            assert counts.dtype == indices.dtype == torch.int32
            assert counts.is_contiguous() and indices.is_contiguous()
            for row, count in enumerate(counts[0, 0].tolist()):
                blocks[row].index_add_(0, indices[0, 0, row, :count].long(), torch.ones(count, dtype=torch.int64))
        assert listed.sum(0).max() <= 1
        return listed.bool()


def _flash_attn_fwd(q, k, v, page_table, seqused_k, softmax_scale, tile_mn=None):
    """FlashAttention-4's paged forward, [batch, rows, H, D], in plain PyTorch."""
    outs = []
    for query, pages, used in zip(q, page_table.long(), seqused_k.tolist(), strict=True):
        keys, values = (x[pages].flatten(0, 1)[:used].transpose(0, 1) for x in (k, v))
        query = query.transpose(0, 1)
        outs.append(torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=softmax_scale))
    return torch.stack(outs).transpose(1, 2), None


def _flash_attn_func(q, k, v, softmax_scale, block_sparse_tensors=None, block_sparse_tensors_bwd=None, mask_mod=None):
    """FlashAttention-4 in plain PyTorch; its backward must be given the transposed blocks."""
    qkv, mask = (x.transpose(1, 2) for x in (q, k, v)), None
    if block_sparse_tensors is not None:
        blocks = q.shape[1] // 128
        masked, full = shown = block_sparse_tensors.dense(blocks)
        assert (block_sparse_tensors_bwd is not None) == q.requires_grad
        if q.requires_grad:
            assert torch.equal(block_sparse_tensors_bwd.dense(blocks), shown.mT)
        masked, full = (x.repeat_interleave(128, 0).repeat_interleave(128, 1) for x in (masked, full))
        token = torch.arange(q.shape[1])
        mask = full if mask_mod is None else full | masked & mask_mod(None, None, token[:, None], token, None, None)
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2), None


class _BlockSparseAttentionWrapper:
    """FlashInfer's wrapper in plain PyTorch, for blocks as large as a frame."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, indptr, indices, M, N, R, C, heads, kv_heads, head_dim, sm_scale, q_data_type, o_data_type):
        self.scale = sm_scale
        assert (M, heads, R, q_data_type) == (N, kv_heads, C, o_data_type)
        self.rows, self.block = [x.tolist() for x in indices.tensor_split(indptr[1:-1].long())], R

    def run(self, q, k, v):
        ranges = [(row, column) for row, columns in enumerate(self.rows) for column in columns]
        queries, keys = (
            torch.tensor(x)[:, None] * self.block + torch.tensor([0, self.block]) for x in zip(*ranges, strict=True)
        )
        return _flex_flash_attn_func(q, k, v, queries, keys, softmax_scale=self.scale)[0]


def _flex_flash_attn_func(q, k, v, q_ranges, k_ranges, softmax_scale, **options):
    """MagiAttention's function in plain PyTorch; q, k and v are [N, H, D]."""
    mask = torch.zeros(len(q), len(k), dtype=torch.int64)
    for (first, last), (start, end) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        mask[first:last, start:end] += 1
    assert mask.max() == 1
    if q.requires_grad and options["disable_bwd_dkv_atomic_reduction"]:
        ends = torch.unique(k_ranges, dim=0)
        assert (ends[1:, 0] >= ends[:-1, 1]).all()
    qkv = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask.bool(), scale=softmax_scale)
    return out[0].transpose(0, 1), None


FAKES = {
    "flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd, "flash_attn_func": _flash_attn_func},
    "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": _BlockLists},
    "cutlass.cute": {"jit": lambda function: function},
    "flashinfer": {"BlockSparseAttentionWrapper": _BlockSparseAttentionWrapper},
    "magi_attention.functional.flex_flash_attn": {"flex_flash_attn_func": _flex_flash_attn_func},
}


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins for the packages of the peers."""

    def package(name, install):
        return types.SimpleNamespace(**FAKES[name])

    for module in ("flash_attention_4", "flashinfer", "magi"):
        monkeypatch.setattr(f"benchmarks.peers.{module}.package", package)
    monkeypatch.setattr(flex, "compiled", lambda case, backend: _eager_flex)


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("fa4-paged", "s6-p7-scattered1-h2"),
        ("fa4-paged-192x128", "s5-p9-star1-h3-log2"),
        ("fa4-dense", "s3-p8-dense-h2-log2"),
        ("fa4-block-sparse", "s5-p130-scattered1-h2-b2"),
        ("fa4-block-sparse", "s4-p128-band1-h2"),
        ("fa4-block-sparse", "s6-p50-star1-h2-log2"),
        ("flashinfer", "s6-p7-scattered1-h2"),
        ("flashinfer", "s6-p7-scattered1-h2-log2"),
        ("magi-ffa", "s6-p7-scattered1-h2"),
        ("magi-ffa", "s5-p9-loop1-h3-log2"),
        ("flex", "s3-p130-band1-h1-hd16"),
        ("flex", "s4-p70-scattered1-special5-h2-hd16"),
        ("flex-flash", "s3-p130-band1-h1-hd16-log2"),
    ],
)
def test_peer_for_another_machine_is_wired_right(peer, name, fakes):
    case = Case.parse(name)
    q, k, v, grad = attention.inputs(case, CPU, torch.float32, PEERS[peer].storage)
    assert check_forward(PEERS[peer], case, q, k, v) is None
    if not peer.startswith(("fa4-paged", "flashinfer", "flex")):  # flex has no backward on the CPU
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert check_gradients(PEERS[peer], case, *leaves, grad) is None


def test_ranges_of_keys_overlap_only_where_no_gradient_is_wanted():
    case = Case.parse("s5-p3-band1")
    queries, keys = magi.ranges(case, merged=True)
    assert queries.tolist() == [[3 * i, 3 * i + 3] for i in range(5)]
    assert keys.tolist() == [[0, 6], [0, 9], [3, 12], [6, 15], [9, 15]]
    queries, keys = magi.ranges(case, merged=False)
    assert len(queries) == len(keys) == case.edges
    assert all(end - start == case.tokens for start, end in keys.tolist())


def _eager_flex(q, k, v, block_mask, scale, kernel_options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale)


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        ("fa4-dense", "install flash-attn-4"),
        ("fa4-paged", "install flash-attn-4"),
        ("fa4-block-sparse", "install flash-attn-4"),
        ("flex-flash", "install flash-attn-4"),
        ("flashinfer", "install flashinfer-python"),
        ("magi-ffa", "install MagiAttention"),
    ],
)
def test_peer_whose_package_is_absent_says_how_to_get_it(peer, reason, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(contender, "import_module", absent)
    contender.package.cache_clear()
    try:
        q = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, requires_grad=False)
        assert reason in PEERS[peer].unsupported(Case.parse("s2-p4-dense"), q)
    finally:
        contender.package.cache_clear()


@pytest.mark.parametrize("peer", ["fa4-paged", "flashinfer"])
def test_peer_without_backward_says_so(peer, fakes):
    q = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, requires_grad=True)
    assert "forward only" in PEERS[peer].unsupported(Case.parse("s2-p4-dense"), q)


# Our backends


@pytest.fixture
def choices(monkeypatch):
    """The softmax and gradients chosen whenever backend hopper, here a stand-in, ran forward or backward."""
    seen = {"forward": set(), "backward": set()}

    def attend(q, k, v, layout, scale, backend, return_lse=False):
        assert backend == "hopper"
        seen["forward"].add(tuple(hopper._chosen.values()))
        out = block_sparse_attention(q, k, v, layout, scale=scale, backend="reference", return_lse=return_lse)
        if not return_lse and out.requires_grad:
            out.register_hook(lambda grad: seen["backward"].add(tuple(hopper._chosen.values())))
        return out

    monkeypatch.setattr(ours, "block_sparse_attention", attend)
    monkeypatch.setattr(backends, "reasons", lambda *_: {"hopper": None})
    return seen


VARIANTS = [
    ("hopper", ("bounded", "deterministic")),
    ("hopper-online", ("online", "deterministic")),
    ("hopper-accumulated", ("bounded", "accumulated")),
]


@pytest.mark.parametrize(("name", "kinds"), VARIANTS)
@pytest.mark.parametrize("direction", every(2, ["bwd", "fwd+bwd"]))
def test_variant_runs_as_chosen_and_is_a_line_of_hopper(name, kinds, direction, choices):
    runner = attention.Runner(CPU, torch.bfloat16, SOURCE, lambda line: None, seconds=0.01)
    runner.run([BAND], [backend(name)], [direction])
    [line] = runner.lines
    assert choices == {"forward": {kinds}, "backward": {kinds}}
    assert (line["backend"], line["softmax"], line["gradients"], line["check"]) == ("hopper", *kinds, "passed")
    assert tuple(hopper._chosen.values()) == VARIANTS[0][1]


@pytest.mark.parametrize(("name", "kinds"), VARIANTS)
def test_variant_is_repeated_as_chosen(name, kinds, choices):
    lines, _ = repeat.repeat([BAND], backend(name), ["bwd"], 3, CPU, torch.bfloat16, SOURCE, lambda line: None)
    assert choices == {"forward": {kinds}, "backward": {kinds}}
    assert [(line["backend"], line["softmax"], line["gradients"]) for line in lines] == [("hopper", *kinds)]


def test_variants_say_where_there_is_no_choice(choices):
    q = torch.empty(1, 1, 1, 64, dtype=torch.float16)
    for variant in ("hopper-online", "hopper-accumulated"):
        assert "computes what hopper computes in torch.float16" in backend(variant).unsupported(BAND, q)
    assert backend("hopper-accumulated").unsupported(BAND, q.requires_grad_()) is None


@pytest.mark.parametrize(
    ("name", "direction", "softmax", "gradients"),
    [("hopper", "fwd", "online", None), ("hopper", "bwd", "online", "deterministic"), ("reference", "bwd", None, None)],
)
def test_labels_in_float16(name, direction, softmax, gradients):
    labels = backend(name).labels(torch.float16, direction)
    assert labels == {"backend": name, "softmax": softmax, "gradients": gradients}
