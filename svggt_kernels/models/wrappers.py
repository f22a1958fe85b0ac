"""Modules as tools wrap and share them, known by identity, and the arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Where torch.compile, checkpoint_wrapper and FullyShardedDataParallel keep the module that they wrap."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers that tools put around one: what their forwards call."""
    inner = next((inner for name in WRAPPED if (inner := module._modules.get(name)) is not None), None)
    return module if inner is None else unwrapped(inner)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call of a module's forward by name; those in `*args` have numbers for names."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {str(index): item for index, item in enumerate(value) if item is not module}
        elif value is not module:
            arguments[name] = value
    return arguments


def each_once(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules inside their wrappers by name, those that blocks share by their first."""
    names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        names.setdefault(unwrapped(module), name)
    return {name: module for module, name in names.items()}


def named_modules(model: nn.Module, modules: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """Return modules of the model by name, where the caller gives either.

    Raises:
        ValueError: If one is not inside the model or is given twice, or there is none.
        TypeError: If `modules` is one module or name.
    """
    if isinstance(modules, (str, nn.Module)):
        raise TypeError(f"modules must be a list of modules or their names, got one {type(modules).__name__}")
    inside = {unwrapped(module) for module in model.modules() if module is not model}
    names = {unwrapped(module): name for name, module in reversed(list(model.named_modules()))}
    chosen: dict[nn.Module, str] = {}
    for item in modules:
        module = unwrapped(_submodule(model, item) if isinstance(item, str) else item)
        if module not in inside:
            what = f"a module called {item!r}" if isinstance(item, str) else f"this {type(item).__name__}"
            raise ValueError(f"{type(model).__name__} does not hold {what}; modules must be submodules of the model")
        name = item if isinstance(item, str) else names[module]
        if module in chosen:
            first = chosen[module]
            raise ValueError(f"{first} is given twice in modules" + (f": {name} is the same module" * (name != first)))
        chosen[module] = name
    if not chosen:
        raise ValueError("modules is empty; name at least one global attention module")
    return {name: module for module, name in chosen.items()}


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """Return a module by name; the model itself, which holds itself nowhere, if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model
