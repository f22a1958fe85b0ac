"""Tensors that say they are on an Apple GPU and are not: what runs there is run on the CPU, recorded, and checked.

An operation on tensors of both devices raises, as it does on a Mac, and so does one that is known to have a gap there.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

MPS, CPU = torch.device("mps"), torch.device("cpu")

NO_SUCH_DTYPES = (torch.float64, torch.complex128)

# On integers: what some macOS refuses, or some torch got wrong. None is needed.
INTEGER_GAPS = {"argsort", "bincount", "bmm", "cumsum", "mm", "scatter_add", "searchsorted", "sort", "sum", "topk"}
# What some torch from 2.10 on does not have.
MISSING = {"_linalg_eigh", "_linalg_svd", "_unique2", "histc", "linalg_lstsq", "linalg_qr", "logcumsumexp"}

# What takes tensors of both devices.
CROSSING = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_"}


class PretendTensor(Tensor):
    """A CPU tensor that says it is on an Apple GPU."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CPU,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return MPS

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called outside of AppleGpu")


class _Devices(TorchFunctionMode):
    """Takes device "mps" out of what torch is called with: this torch does not know it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if args and isinstance(args[0], PretendTensor):
            if func in (Tensor.cpu, Tensor.tolist) or (func is Tensor.to and CPU in map(_device, leaves)):
                here = func(args[0].held, *args[1:], **kwargs)
                return here.clone() if isinstance(here, Tensor) else here
            if func is Tensor.numpy:
                raise TypeError("a tensor on the Apple GPU must be copied to the CPU first")
        if func is torch.device or MPS not in map(_device, leaves):
            return func(*args, **kwargs)
        moved = args and isinstance(args[0], PretendTensor)
        args, kwargs = tree_map(lambda x: CPU if _device(x) == MPS else x, (args, kwargs))
        if moved:  # from there to there: only the rest of the call matters
            args = tuple(x for x in args if _device(x) is None)
            kwargs = {name: x for name, x in kwargs.items() if _device(x) is None}
            return func(*args, **kwargs) if len(args) + len(kwargs) > 1 else args[0]
        return tree_map_only(Tensor, _moved, func(*args, **kwargs))


class _Operations(TorchDispatchMode):
    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__()
        self.own = own
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "svggt_kernels":
            with self:
                return self.own[name](*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, PretendTensor)]
        if not there and kwargs.get("device") != MPS:
            return func(*args, **kwargs)
        if there and name not in CROSSING and any(not isinstance(x, PretendTensor) and x.dim() for x in tensors):
            raise RuntimeError(f"{func} got tensors of the CPU and of the Apple GPU")
        stays = kwargs.get("device") in (None, MPS)
        if "device" in kwargs:
            kwargs = kwargs | {"device": CPU}
        result = func(*tree_map_only(PretendTensor, held, args), **tree_map_only(PretendTensor, held, kwargs))
        if not stays or (name == "copy_" and not isinstance(args[0], PretendTensor)):
            return result
        self.check(name, [*there, *(x for x in tree_leaves(result) if isinstance(x, Tensor))])
        owners = {id(x.held): x for x in there}
        return tree_map_only(Tensor, lambda x: owners.get(id(x)) if id(x) in owners else PretendTensor(x), result)

    def check(self, name: str, tensors: list[Tensor]) -> None:
        """Raise if Apple's GPUs have a gap here."""
        self.called.add(name)
        for x in tensors:
            if x.dtype in NO_SUCH_DTYPES:
                raise TypeError(f"{name}: Apple's GPUs have no {x.dtype}")
        is_integer = bool(tensors) and tensors[0].dtype in (torch.int16, torch.int32, torch.int64)
        if name in MISSING or (name.rstrip("_") in INTEGER_GAPS and is_integer):
            raise NotImplementedError(f"{name} has gaps on Apple's GPUs")


class AppleGpu(ExitStack):
    """While it is entered device "mps" can be used; `called` names the operations that ran there.

    Args:
        own: Implementations of the package's own operations.
    """

    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__()
        self._operations = _Operations(own)

    @property
    def called(self) -> set[str]:
        return self._operations.called

    def __enter__(self) -> AppleGpu:
        self.enter_context(self._operations)
        self.enter_context(_Devices())
        return self


def move(module: torch.nn.Module) -> None:
    """Move a module to the Apple GPU; without gradients, as `Module.to` cannot change the type of its parameters."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: _moved(x.detach()) for name, x in tensors.items() if x is not None})


def _device(x: Any) -> torch.device | None:
    if isinstance(x, str) and x in ("mps", "cpu"):
        return torch.device(x)
    return x if isinstance(x, torch.device) else None


def held(x: Any) -> Any:
    """Return the CPU tensor behind one that says it is elsewhere; anything else as it is."""
    return x.held if isinstance(x, PretendTensor) else x


def _moved(x: Tensor) -> Tensor:
    if isinstance(x, PretendTensor):
        return x
    made = PretendTensor(x.detach().clone())
    return made.requires_grad_(x.requires_grad)
