"""`patch(model)`: put block-sparse attention into a multi-view transformer, prove that it acts, and take it out again.

Every model of the family calls `scaled_dot_product_attention` once in each global attention module. A patch stands in
for the forward of those modules, on this one model, and answers that call with `block_sparse_attention`. Weights,
state_dict keys, classes and PyTorch's functions stay as they are. The layout is made once per forward, at the first
global attention, and shared by all.
"""

from __future__ import annotations

from .api import patch
from .handle import Patch
from .report import PatchReport

__all__ = ["Patch", "PatchReport", "patch"]
