"""`print_summary`: a model as a table of plain ASCII, the same on a terminal and in a job's log.

The text depends on the model and the arguments alone, never on the width of a terminal.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from hpcutils.errors import SpecError
from hpcutils.models import graph

CHAIN_WIDTH, CHAIN_POSITIONS = 80, (0.5, 0.8, 1.0)
GRAPH_WIDTH, GRAPH_POSITIONS = 110, (0.33, 0.55, 0.67, 1.0)
CHAIN_HEADINGS = ("Layer (type)", "Output shape", "Params")
GRAPH_HEADINGS = (*CHAIN_HEADINGS, "Connected to")
# Between two columns; the last characters of each stay free.
GAP = 2


def print_summary(
    model: Any,
    line_length: int | None = None,
    positions: Sequence[float] | None = None,
    print_fn: Callable[[str], Any] | None = None,
) -> None:
    """Print a table of a model's layers and its number of parameters.

    A graph of layers has a fourth column: what each call of a layer is fed from, as `layer[call][output]`. Weights
    that several layers share count at the first of them, so the column adds up to the total.

    Args:
        model: A built Keras model.
        line_length: Characters a line. Default: 80, and 110 with the fourth column.
        positions: Where each column ends: parts of the line, or characters where the last one is greater than 1.
            Default: `[.33, .55, .67, 1.]`, and `[.5, .8, 1.]` for a plain stack of layers.
        print_fn: Called once a line, without its end. Default: `print`.

    Raises:
        RequestError: The model is not built.
        SpecError: The columns do not fit the line.
    """
    for line in lines(model, line_length, positions):
        (print_fn or print)(line)


def lines(model: Any, line_length: int | None, positions: Sequence[float] | None) -> list[str]:
    """Return the lines of the summary."""
    positions = None if positions is None else [float(place) for place in positions]  # an array has no truth value
    content = graph.read(model)
    is_chain = content.is_chain or not content.connected
    headings = CHAIN_HEADINGS if is_chain else GRAPH_HEADINGS
    default = CHAIN_POSITIONS if is_chain else GRAPH_POSITIONS
    length = line_length or full_length(positions, CHAIN_WIDTH if is_chain else GRAPH_WIDTH)
    ends = column_ends(positions or default, length, len(headings))
    shown = [entry for entry in content.entries if not (graph.is_sequential(model) and entry.is_input)]
    counts = parameter_cells(shown)
    rows = [cells(content, entry, count)[: len(headings)] for entry, count in zip(shown, counts, strict=True)]
    body = [line for row in rows for line in table_row(row, ends)]
    rule = "-" * length
    return [
        f'Model: "{model.name}"',
        rule,
        *table_row(headings, ends),
        "=" * length,
        *body,
        "=" * length,
        *totals(model),
        rule,
    ]


def full_length(positions: Sequence[float] | None, default: int) -> int:
    """Return the width of the table when none is given: absolute positions bring their own."""
    return int(positions[-1]) if positions and positions[-1] > 1 else default


def column_ends(positions: Sequence[float], length: int, count: int) -> list[int]:
    """Return where each of `count` columns ends, in characters.

    Raises:
        SpecError: There are too few positions, they do not grow, they leave a column no room, or they pass the line.
    """
    relative = positions[-1] <= 1
    ends = [int(length * place) if relative else int(place) for place in positions][:count]
    widths = [end - start - GAP for start, end in zip([0, *ends], ends, strict=False)]
    if len(ends) < count or min(widths) < 1 or ends[-1] > length:
        raise SpecError(
            f"positions={list(positions)!r} with {length} characters a line: {count} columns were expected, each of 1 "
            "character or more, the last not past the line",
            hint="give growing numbers up to 1 (parts of the line) or up to line_length (characters)",
        )
    return ends


def table_row(texts: Sequence[str], ends: Sequence[int]) -> list[str]:
    """Lay `texts` side by side, each wrapped to its column; numbers (column 3) end at its right edge."""
    widths = [end - start - GAP for start, end in zip([0, *ends], ends, strict=False)]
    columns = [wrapped(text, width) for text, width in zip(texts, widths, strict=True)]
    height = max(len(column) for column in columns)
    rows = [[column[i] if i < len(column) else "" for column in columns] for i in range(height)]
    return [joined(row, widths).rstrip() for row in rows]


def joined(texts: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of the table."""
    aligned = [
        text.rjust(width) if place == CHAIN_HEADINGS.index("Params") else text.ljust(width)
        for place, (text, width) in enumerate(zip(texts, widths, strict=True))
    ]
    return (" " * GAP).join(aligned)


def wrapped(text: str, width: int) -> list[str]:
    """Break each line of `text` to `width`, at spaces where there are any; nothing is cut off."""
    return [
        piece
        for line in text.split("\n")
        for piece in textwrap.wrap(line, width, subsequent_indent="  " if width > 8 else "", break_on_hyphens=False) or [""]
    ]


def cells(content: graph.Graph, entry: graph.Entry, count: str) -> tuple[str, str, str, str]:
    """Return the four cells of a layer."""
    shapes = list(dict.fromkeys(str(shape) for call in entry.calls for shape in call.output_shapes))
    feeds = [
        f"{content.entries[source.layer].name}[{source.call}][{source.tensor}]" for call in entry.calls for source in call.sources
    ]
    return f"{entry.name} ({entry.type_name})", "\n".join(shapes) or "?", count, "\n".join(feeds)


def parameter_cells(entries: Sequence[graph.Entry]) -> list[str]:
    """Return the number of parameters of each layer, those that an earlier layer holds already set apart."""
    counted: set[int] = set()
    found = []
    for entry in entries:
        own = list(graph.variables(entry.layer))
        new = [variable for variable in own if id(variable) not in counted]
        shared = size(own) - size(new)
        counted.update(id(variable) for variable in new)
        text = f"{size(new):,}" if getattr(entry.layer, "built", True) else "unbuilt"
        found.append(f"{text}\n+{shared:,} shared" if shared else text)
    return found


def totals(model: Any) -> list[str]:
    """Return the closing lines: every weight once, split into what training changes and what it leaves."""
    unique = list(graph.variables(model))
    trained = {id(variable) for variable in model.trainable_weights}
    parts = {
        "Total params:": unique,
        "Trainable params:": [variable for variable in unique if id(variable) in trained],
        "Non-trainable params:": [variable for variable in unique if id(variable) not in trained],
    }
    return [f"{title:<21} {size(some):,} ({readable(bytes_of(some))})" for title, some in parts.items()]


def size(variables: Sequence[Any]) -> int:
    """Return the number of values in `variables`."""
    return sum(int(math.prod(variable.shape)) for variable in variables)


def bytes_of(variables: Sequence[Any]) -> int:
    """Return the bytes that `variables` take."""
    return sum(bits_of(str(variable.dtype)) * size([variable]) for variable in variables) // 8


def bits_of(dtype: str) -> int:
    """Return the bits of one value: the number in the dtype's name (`bfloat16`), 8 where there is none (`bool`)."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8


def readable(size_bytes: int) -> str:
    """Return a size in the largest binary unit that keeps it at 1 or more."""
    power = max(0, (size_bytes.bit_length() - 1) // 10)
    return f"{size_bytes} B" if power == 0 else f"{size_bytes / 1024**power:.2f} {'KMGTPE'[power - 1]}iB"
