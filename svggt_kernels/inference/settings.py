"""What the forward of a module can read, as a key, and whether it has changed since.

A verification holds for modules of equal settings. Settings are everything but the values of parameters and buffers:
classes with all that these hold, attributes, what parameters and buffers there are, submodules, hooks, forwards put on
an instance, training mode. Reading them takes some 10 us for each submodule; `Snapshot` tells in a fifth of that
whether anything was put in the place of something else.

Settings refer to objects weakly, so they can be kept beside a module without keeping it (`are_weak`); an object that is
gone equals none that lies in its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from itertools import chain
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, UnionType
from typing import Any

import torch
from torch import Tensor, nn

TABLES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has: its tables of parameters, hooks and submodules."""

CACHES = frozenset({"frequency_cache", "cache"})
"""Where VGGT's rotary embedding and CroCo's keep cosines and sines that they computed; no setting."""

FUNCTIONS = (FunctionType, BuiltinFunctionType, type)

_NO_ATTRIBUTES = TABLES | {"training", "forward"}
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_WRAPPERS: dict[type, Callable[[Any], tuple[object, ...]]] = {
    property: attrgetter("fget", "fset", "fdel"),
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    UnionType: lambda union: union.__args__,
}
"""What is all there is to objects that cannot be referred to weakly."""


def settings_of(module: nn.Module) -> Hashable:
    """Return the settings of a module and of those inside it, without the hooks on the module itself."""
    contents = (name_and_value for kind in _classes(module) for name_and_value in vars(kind).items())
    return _settings_inside(module), *((name, _setting(value)) for name, value in contents)


def _settings_inside(module: nn.Module) -> Hashable:
    """Return the settings of a module and of those inside it, but for what their classes hold."""
    attributes = ((name, _setting(value)) for name, value in attributes_of(module).items() if name not in CACHES)
    inside = (
        (name, inner is not None and (is_watched(inner), _settings_inside(inner)))
        for name, inner in module._modules.items()
    )
    return (
        _Object(type(module)),
        module.training,
        is_replaced(module),
        tuple(attributes),
        _kinds(module._parameters),
        _kinds(module._buffers),
        tuple(inside),
    )


def _kinds(tensors: Mapping[str, Tensor | None]) -> Hashable:
    """Return all but the values of tensors by name."""
    return tuple(
        (name, tensor is not None and (_Object(type(tensor)), tensor.dtype, tensor.shape, tensor.device))
        for name, tensor in tensors.items()
    )


def _classes(module: nn.Module) -> list[type]:
    """Return the classes of a module and of those inside it, with their bases, each once."""
    kinds = (base for inner in module.modules() for base in type(inner).__mro__)
    return [kind for kind in dict.fromkeys(kinds) if kind not in (nn.Module, object)]


class _Object:
    """An object by its identity. It refers to it weakly, or where that cannot be, keeps it.

    It keeps tensors too, as PyTorch swaps none to which there are weak references (`torch.utils.swap_tensors`).
    """

    __slots__ = ("_hash", "_refer", "is_weak")

    def __init__(self, value: object) -> None:
        self._hash, self.is_weak = id(value), not isinstance(value, Tensor)
        self._refer: Callable[[], object] = lambda: value
        try:
            if self.is_weak:
                self._refer = weakref.ref(value)
        except TypeError:
            self.is_weak = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Object):
            return False
        value = self._refer()
        return self is other or (value is not None and value is other._refer())

    def __hash__(self) -> int:
        return self._hash


def _setting(value: object) -> Hashable:
    """Return what stands for an attribute: a plain value, containers of these, or the identity of an object."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (tuple, list)):
        return _Object(type(value)), *map(_setting, value)
    if isinstance(value, dict):
        return _Object(type(value)), *((_setting(name), _setting(each)) for name, each in value.items())
    if type(value) in _WRAPPERS:
        return _Object(type(value)), *map(_setting, _WRAPPERS[type(value)](value))
    return _Object(value)


def are_weak(settings: Hashable) -> bool:
    """Whether settings keep no object that may refer to the module that they are of."""
    if isinstance(settings, tuple):
        return all(map(are_weak, settings))
    return not isinstance(settings, _Object) or settings.is_weak


def values_of(module: nn.Module) -> Hashable:
    """Return what tells the values of parameters and buffers from later ones without reading them, or None.

    Where they lie, and how often they were written. PyTorch does not count who writes to tensors that were made in
    inference mode, nor through `tensor.data`, and some kinds of tensors lie nowhere.
    """
    try:
        return tuple(
            (_Object(tensor.untyped_storage()), tensor.data_ptr(), tensor.stride(), tensor._version)
            for tensor in tensors_of(module)
        )
    except RuntimeError:
        return None


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module and of those inside it, each once; quicker than PyTorch's walk."""
    seen, modules = {module}, [module]
    for each in modules:
        for inner in each._modules.values():
            if inner is not None and inner not in seen:
                seen.add(inner)
                modules.append(inner)
    tensors = chain.from_iterable(chain(each._parameters.values(), each._buffers.values()) for each in modules)
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def is_plain(value: object) -> bool:
    """Whether an attribute has no more to it than what its settings say."""
    if isinstance(value, dict):
        return all(map(is_plain, (*value, *value.values())))
    return type(value) in _PLAIN or (isinstance(value, (tuple, list)) and all(map(is_plain, value)))


def is_setting(value: object) -> bool:
    """Whether what an attribute does follows from its settings: those of a function are its identity."""
    return is_plain(value) or isinstance(value, FUNCTIONS)


def attributes_of(module: nn.Module) -> dict[str, object]:
    """Return what a module holds beside parameters, buffers, submodules, hooks, its mode and its forward."""
    return {name: value for name, value in vars(module).items() if name not in _NO_ATTRIBUTES}


def stranger(module: nn.Module, known: frozenset[str], is_harmless: Callable[[object], bool]) -> str | None:
    """Return the name of an attribute, parameter, buffer or submodule that is neither known nor harmless, or None."""
    for table in (attributes_of(module), module._parameters, module._buffers, module._modules):
        for name, value in table.items():
            if name not in known and value is not None and not is_harmless(value):
                return name
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether another than a patch has put a forward on a module, as tools that offload weights do."""
    forward: Any = module.__dict__.get("forward")
    while hasattr(forward, "replaced"):
        forward = forward.replaced
    return forward is not None


def is_watched(module: nn.Module) -> bool:
    """Whether there are hooks on a module, other than those of a patch."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(hasattr(getattr(hook, "__self__", None), "replaced") for hook in hooks)


class Snapshot:
    """The objects that a module and those inside it hold: while all are the same ones, settings are the same.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._held = [(inner, _held(inner)) for inner in module.modules()]
        self._classes = [(kind, dict(vars(kind))) for kind in _classes(module)]
        self._containers = [
            (value, _setting(value))
            for owner in (*module.modules(), *_classes(module))
            for name, value in vars(owner).items()
            if isinstance(value, (list, dict)) and name not in TABLES | CACHES
        ]

    def holds(self) -> bool:
        """Whether every object is the one that it was."""
        try:
            return (
                all(_held(inner) == held for inner, held in self._held)
                and all(dict(vars(kind)) == content for kind, content in self._classes)
                and all(_setting(value) == then for value, then in self._containers)
            )
        except (RuntimeError, ValueError):  # other tensors or arrays, which do not compare as a whole
            return False


def _held(module: nn.Module) -> list[object]:
    """Return what a module holds, to be compared with what it held: objects that are the same compare at once.

    Tensors change in place too: their dtypes and devices by `module.to`, their versions by who writes values.
    """
    state = module.__dict__
    tensors = (*state["_parameters"].values(), *state["_buffers"].values())
    return [
        type(module),
        *state,
        *state.values(),
        *tensors,
        *state["_modules"].values(),
        *state["_forward_hooks"].values(),
        *state["_forward_pre_hooks"].values(),
        *((x.dtype, x.device, None if x.is_inference() else x._version) for x in tensors if x is not None),
    ]


def has_values(module: nn.Module) -> tuple[bool, ...]:
    """Return for each parameter of a module whether any value is not 0; waits for their devices.

    A comparison says nothing of what a parameter does while it is 0 everywhere, as a scale is at the start of training.
    """
    flags = [parameter.detach().any() for parameter in module.parameters()]
    return tuple(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()) if flags else ()
