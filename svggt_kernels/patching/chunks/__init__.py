"""A forward of any number of frames in chunks: closed frames first, whose keys and values are kept, then all others.

With a closed core frames outside it see the core and themselves. `attention` keeps the keys and values of what all
frames see at each attention across frames and answers chunks of further frames with them; `session` runs the model so,
and tries out that nothing else in it looks across frames; `budget` keeps its runs to a memory budget.
"""

from __future__ import annotations
