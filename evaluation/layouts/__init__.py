"""Layouts by name.

| name | each frame sees | special tokens |
|---|---|---|
| `dense` | every frame: the model as it is | |
| `own` | itself only | ordinary |
| `core-K` | itself and K frames that all see, the core; frames of the core see the core only | ordinary |
| `core-K-strideS` | the same K frames and itself in full, all others at stride S of their patch grid | ordinary |
| `core-K-strideSofM` | the same, but only M others, which with the K are a closed core | ordinary |
| `twolevel-K-RxM` | itself, K frames that all see, and M more that its region sees, one of R regions | ordinary |
| `nearest-K` | by `CovisibilityGraph.from_descriptors`: K nearest, frame 0, anchors, bridges | dense |
| `random-K` | by the same recipe with random descriptors | dense |
| `shared-K` | K frames that all see, and not itself | ordinary |
| `subsampled-S` | all frames at stride S, without weights; own and mean key | ordinary |
| `pooled-P` | P % of the blocks of patches, chosen for each head | dense |
| `merged-P` | every frame, after P % of the tokens were merged into others | dense, unmerged |
| `layers(0-1:own,2-5:core-48)` | in layers 0 and 1 the one, in the others the other | |

Words may follow, in this order:

| word | of | meaning |
|---|---|---|
| `-tokens`, `-patches`, `-thumbnails`, `-overlap` | core, twolevel, shared, nearest | by what frames are similar |
| `-evenly`, `-random` | core, twolevel, shared | the core is spread over the order of the frames, or drawn |
| `-covering` | the same by similarity | frames are chosen to cover all others, not to lie far apart |
| `-nearM` | core | frames outside the core see their M nearest frames too |
| `-open` | core, after `-nearM` | so do frames of the core, which is then not closed |
| `-ordered` | twolevel | a region is frames that follow one another, not frames that look alike |
| `-strideS` | shared | of the K frames special tokens and one patch in S x S are keys, without weights |
| `-QxK` | pooled | blocks of Q queries and K keys |
| `-regionR` | merged | one patch of each R x R is a destination |
| `-ordinary`, `-dense` | own, core, nearest, random | special tokens follow the graph, or see and are seen by all |

Frame 0, in whose axes such models answer, is in every core. By similarity each next frame of a core is the one least
similar to those before it, or with `-covering` the one that raises most what all frames find similar in the core. True
overlap is what no user has: a bound on what a choice by descriptors can give. `core-K`, `core-K-covering`,
`core-K-evenly` and `nearest-K` are those of `svggt-kernels sweep`: `svggt_kernels.measure.layouts` makes their graphs.

`patch` puts in layouts that are a graph of frames for all layers (`graphs`). The others answer the attention call of
each global layer (`answered`): coarse keys (`coarse`), what others do (`peers`), and a layout for each layer.
"""

from .answered import Answered, Layers, answered
from .base import Attended, Attention, Counted, Dense, Known, LayerLayout, Layout, TokenGrid
from .graphs import GraphLayout
from .names import named

__all__ = [
    "Answered",
    "Attended",
    "Attention",
    "Counted",
    "Dense",
    "GraphLayout",
    "Known",
    "LayerLayout",
    "Layers",
    "Layout",
    "TokenGrid",
    "answered",
    "named",
]
