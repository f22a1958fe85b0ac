"""A covisibility for each global layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Source, alike
from .registry import Covisibility, named


@dataclass(frozen=True)
class PerLayer:
    """Global layers that differ in who sees whom: `patch(model, covisibility=PerLayer(...))`.

    Layers for which it says the same, the same object, equal sources or words for such, share their graphs, layouts and
    tables. Frames are described once for all sources that compare them alike.

    Attributes:
        covisibility: What `patch` takes as `covisibility`, for each global layer, in the order in which they run; or a
            function that returns it for a layer, counted from 0.
    """

    covisibility: Sequence[Covisibility] | Callable[[int], Covisibility]

    def by_layers(self, num_layers: int) -> list[tuple[Covisibility, tuple[int, ...]]]:
        """Return what differs, each with the layers that it is for; sources in place of words.

        Raises:
            ValueError: If there is not one for each layer, or one is an unknown word.
            TypeError: If it is neither a sequence nor a function, or one is a `PerLayer` itself.
        """
        given = self.covisibility
        if callable(given):
            each: Sequence[Any] = [given(layer) for layer in range(num_layers)]
        elif isinstance(given, Sequence) and not isinstance(given, str):
            each = given
        else:
            raise TypeError(f"PerLayer takes a sequence or a function of the layer, got {type(given).__name__}")
        if len(each) != num_layers:
            raise ValueError(
                f"PerLayer must give one covisibility for each of the {num_layers} global layers of this model, got "
                f"{len(each)}"
            )
        found: list[tuple[Any, list[int]]] = []
        for layer, of_layer in enumerate(each):
            if isinstance(of_layer, PerLayer):
                raise TypeError(
                    f"PerLayer holds no PerLayer, got one for layer {layer}; give what `patch` takes for one layer"
                )
            one = named(of_layer) if isinstance(of_layer, str) else of_layer
            same = (
                layers for other, layers in found if one is other or (isinstance(one, Source) and alike(one, other))
            )
            if (layers := next(same, None)) is None:
                found.append((one, [layer]))
            else:
                layers.append(layer)
        return [(one, tuple(layers)) for one, layers in found]
