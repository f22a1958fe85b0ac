"""Bugs to plant into the shader, each with the lane that must catch it: a test of the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@dataclass(frozen=True)
class Bug:
    """A change of the shader's text.

    Attributes:
        lane: What must catch it: "lint", "clang", "compiler", "emulator" (an error, other bits under another schedule,
            or too much memory), "numbers" (the error budget) or "sanitizer".
        says: A part of what the lane says; for numbers nothing.
        backward: Whether it is in the backward pass.
    """

    name: str
    lane: str
    find: str
    replace: str
    says: str = ""
    backward: bool = False
    dtype: torch.dtype = torch.float16

    def plant(self, text: str) -> str:
        """The text with the bug.

        Raises:
            ValueError: If there is no place for it: the shader has changed, and the list must follow.
        """
        if self.find not in text:
            raise ValueError(f"the bug {self.name!r} has no place in the shader any more")
        return text.replace(self.find, self.replace)


BUGS = [
    # Barriers and simdgroups.
    Bug(
        "columns are overwritten while others read them",
        "emulator",
        f"first);\n      {BARRIER}      load_columns(k_lines",
        "first);\n      load_columns(k_lines",
        "depends on the schedule",
    ),
    Bug(
        "columns are read before they are there",
        "emulator",
        f"index);\n      {BARRIER}\n      float2 weights[",
        "index);\n\n      float2 weights[",
        "depends on the schedule",
    ),
    Bug(
        "queries are overwritten while others read them",
        "emulator",
        f"first);\n      {BARRIER}      load_columns(q_lines",
        "first);\n      load_columns(q_lines",
        "depends on the schedule",
        backward=True,
    ),
    Bug(
        "queries are read before they are there",
        "emulator",
        f"inner[query] : 0.0f;\n      }}\n      {BARRIER}",
        "inner[query] : 0.0f;\n      }\n",
        "depends on the schedule",
        backward=True,
    ),
    Bug(
        "lanes without a row leave",
        "emulator",
        "  clear(out_row);\n",
        "  clear(out_row);\n  if (!exists) return;\n",
        "was not reached by every thread",
    ),
    Bug(
        "strips without a row leave",
        "emulator",
        "  clear(out_row);\n",
        "  clear(out_row);\n  if (int(strip) * 8 >= tile.y) return;\n",
        "was not reached by every thread",
    ),
    Bug(
        "a barrier that not all come to",
        "emulator",
        "  clear(out_row);\n",
        f"  clear(out_row);\n  if (strip == 0) {BARRIER}",
        "was not reached by every thread",
    ),
    Bug(
        "a shuffle that not all lanes come to",
        "emulator",
        "      const float higher = row_max(largest);\n",
        "      float higher = largest.x;\n      if (exists) higher = row_max(largest);\n",
        "wait in different operations",
    ),
    # Memory.
    Bug(
        "more threadgroup memory than there is",
        "emulator",
        "threadgroup ELEMENT k_lines[COLUMNS * LINE]",
        "threadgroup ELEMENT k_lines[8 * COLUMNS * LINE]",
        "may have 32768 bytes",
    ),
    Bug(
        "a threadgroup array without its padding",
        "sanitizer",
        "threadgroup ELEMENT v_lines[COLUMNS * LINE]",
        "threadgroup ELEMENT v_lines[COLUMNS * HEAD_SIZE]",
        "heap-buffer-overflow",
    ),
    Bug(
        "columns are read past the run",
        "sanitizer",
        "    if (column < count) {",
        "    if (column < count || column < COLUMNS) {",
        "heap-buffer-overflow",
    ),
    Bug(
        "rows are read that are not there",
        "sanitizer",
        "const long query = exists ? token_at(tile.x, row, row_tokens) : 0;",
        "const long query = token_at(tile.x, row, row_tokens);",
        "heap-buffer-overflow",
    ),
    Bug(
        "a misaligned read",
        "sanitizer",
        "const int4 tile = tiles[group.x];",
        "const int4 tile = *reinterpret_cast<const device int4*>(reinterpret_cast<const device int*>(tiles) + 1);",
        "misaligned",
    ),
    # Numbers.
    Bug(
        "the tail is not hidden", "numbers", "column + 1 < count ? products.y * factor : HIDDEN", "products.y * factor"
    ),
    Bug("another layout of the matrices", "numbers", "(quad & 2) * 2", "(quad & 1) * 4"),
    Bug("a row's lanes are taken wrongly", "numbers", "ushort(8)", "ushort(16)"),
    Bug(
        "a missing row is stored",
        "numbers",
        "  if (exists) {\n    const bool sees",
        "  if (true) {\n    const bool sees",
    ),
    Bug(
        "a wrong stride in threadgroup memory", "numbers", "at.row * LINE + at.column", "at.row * HEAD_SIZE + at.column"
    ),
    Bug("the output is not scaled down", "numbers", "out_row[d] *= shrink;", "out_row[d] *= 1.0f;"),
    Bug("named tokens are not looked up", "numbers", "long(named[~start + i])", "long(named[0] + ~start + i)"),
    Bug("LSE in units of log2", "numbers", "precise::log2(row_total)) * LN_2", "precise::log2(row_total))"),
    Bug("every head reads the first", "numbers", "long(group.y) * strides.head", "0"),
    Bug(
        "every batch writes the first",
        "numbers",
        "const long head = long(group.z) * groups.y",
        "const long head = 0 * groups.y",
    ),
    Bug("blind rows are divided by zero", "numbers", "sees ? 1.0f / row_total : 0.0f", "1.0f / row_total"),
    Bug(
        "the gradient of the LSE is lost",
        "numbers",
        "(exists ? grad_lse[statistic] : 0.0f)",
        "(exists ? 0.0f * grad_lse[statistic] : 0.0f)",
        backward=True,
    ),
    Bug("two queries share one", "numbers", "column_inner[column + 1]", "column_inner[column]", backward=True),
    Bug("the gradient of k is not scaled", "numbers", "dk_row, scale, at)", "dk_row, 1.0f, at)", backward=True),
    Bug(
        "scores are made without the scale",
        "numbers",
        "products, scale * LOG2_E, column",
        "products, LOG2_E, column",
        backward=True,
    ),
    Bug(
        "statistics behind the tail are not set",
        "numbers",
        "column_lse[index] = column_exists ? lse[query] * LOG2_E : 0.0f;",
        "if (column_exists) column_lse[index] = lse[query] * LOG2_E;",
        backward=True,
    ),
    # Language.
    Bug(
        "a conversion to bfloat that is not written",
        "compiler",
        "ELEMENT(row[d].x * factor)",
        "row[d].x * factor",
        "no match for",
        dtype=torch.bfloat16,
    ),
    Bug(
        "a pointer to threadgroup memory without its space",
        "clang",
        "const threadgroup ELEMENT* line = lines + at.column",
        "const ELEMENT* line = lines + at.column",
        "cannot initialize a variable",
    ),
    Bug(
        "device memory for threadgroup memory",
        "clang",
        "load_columns(k_lines, k_head",
        "load_columns(out, k_head",
        "no matching function",
    ),
    Bug(
        "a constant is written",
        "clang",
        "  clear(out_row);\n",
        "  clear(out_row);\n  strides.q.token = 1;\n",
        "read-only|const-qualified",
    ),
    Bug(
        "a table of another type",
        "clang",
        "const device int2* runs",
        "const device int4* runs",
        "no viable conversion|incompatible|cannot initialize",
    ),
    Bug(
        "an if with a declaration",
        "clang",
        "if (exists) {\n    const bool",
        "if (const bool x = true; x) {\n    const bool",
        "C\\+\\+17",
    ),
    Bug(
        "a signed and an unsigned number",
        "clang",
        "i < COLUMNS * PIECES",
        "i < uint(COLUMNS * PIECES)",
        "different signs",
    ),
    Bug(
        "if constexpr",
        "lint",
        "  if (exists) {\n    const bool",
        "  if constexpr (true) {\n    const bool",
        "C\\+\\+14",
    ),
    Bug("not ASCII", "lint", "// The products of 8 rows", "// The products of 8\u00d78 rows", "must be ASCII"),
    Bug(
        "a header of torch's", "lint", "#include <metal_simdgroup>", "#include <c10/metal/utils.h>", "headers of Metal"
    ),
    Bug("a buffer's number twice", "lint", "runs [[buffer(6)]]", "runs [[buffer(5)]]", "numbered 0, 1"),
    Bug(
        "an integer of 4 bytes",
        "lint",
        "const constant long& num_queries",
        "const constant int& num_queries",
        "must be long",
    ),
    Bug(
        "a parameter without address space", "lint", "const thread float2* rows", "const float2* rows", "address space"
    ),
    Bug("a position of another type", "lint", "uint3 groups [[", "uint groups [[", "has a type that"),
    Bug("a double", "lint", "float2(0.0f)", "float2(0.0)", "no double"),
    Bug(
        "a global outside the constant space",
        "lint",
        "constant constexpr float LN_2",
        "constexpr float LN_2",
        "must be `constant",
    ),
    Bug(
        "a threadgroup variable outside",
        "lint",
        "struct ForwardStrides {",
        "threadgroup float shared[4];\n\nstruct ForwardStrides {",
        "inside a kernel",
    ),
    Bug("a name that is Metal's", "lint", "const int index = ", "const int fragment = 0, index = ", "word of Metal"),
    Bug("an attribute that is none", "lint", "[[thread_index_in_simdgroup]]", "[[thread_in_simdgroup]]", "attribute"),
]
