"""Which derivatives the operators of this package have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def require_reverse_mode(operator: str, arguments: str, *tensors: Tensor) -> None:
    """Raise if a tensor has a forward-mode tangent or belongs to a transform of torch.func: neither would be seen.

    Args:
        operator: What the message calls the operator.
        arguments: What it calls one of the tensors: "q, k or v".
        tensors: The arguments of the operator.

    Raises:
        RuntimeError: If one does.
    """
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{operator} has derivatives in reverse mode only, and {arguments} has a forward-mode tangent "
            "(torch.autograd.forward_ad, torch.func.jvp, jacfwd); use torch.autograd.grad or backward()"
        )
    if any(torch.func.debug_unwrap(x) is not x for x in tensors):
        raise RuntimeError(
            f"{operator} runs inside no transform of torch.func (grad, vjp, vmap); use torch.autograd.grad or "
            "backward() for its derivatives in reverse mode, and B and H as batch dimensions"
        )
