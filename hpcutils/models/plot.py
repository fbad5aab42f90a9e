"""`plot_model`: a model as a picture, or as Graphviz' own text.

pydot holds the graph; Graphviz' `dot` lays it out and draws it. A `.dot` file needs pydot alone.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hpcutils import fs, shell
from hpcutils.errors import MissingPartError, RequestError, SpecError
from hpcutils.models import graph

FORMATS = ("dot", "png", "svg", "pdf", "jpg", "jpeg", "gif", "ps", "eps")
RANKDIRS = ("TB", "LR", "BT", "RL")
# What Jupyter shows as a picture in the page.
RASTER = ("png", "jpg", "jpeg", "gif")

FONT = "Helvetica"
INK, MUTED, LINE = "#1f2933", "#52606d", "#7b8794"
# The first pattern that a layer's type matches gives its colour; pale, so that black text stays readable in print.
COLOURS = (
    (r"^InputLayer$", "#e4e7eb"),
    (r"LSTM|GRU|RNN|Attention|Bidirectional|TimeDistributed", "#fde8d0"),
    (r"Normalization|Dropout|Noise", "#eee3f7"),
    (r"Pool|Flatten|Reshape|Permute|Padding|Cropping|UpSampling|Repeat|Resizing|Rescaling", "#fdf3c7"),
    (r"Conv", "#d6e8fa"),
    (r"Dense|Embedding", "#d9f2df"),
    (r"Activation|ReLU|Softmax|ELU|Swish", "#fbe0ea"),
    (r"Sequential|Functional|Model", "#d5eff0"),
)
COLOUR_OTHER = "#ffffff"
# Nested models alternate, so that one inside another shows.
COLOUR_CLUSTER = ("#f5f7fa", "#e9eef4")

GRAPH_STYLE = {
    "bgcolor": "white",
    "fontname": FONT,
    "nodesep": 0.3,
    "ranksep": 0.35,
    "pad": 0.2,
}
NODE_STYLE = {
    "shape": "box",
    "style": "rounded,filled",
    "fontname": FONT,
    "fontsize": 11,
    "fontcolor": INK,
    "color": LINE,
    "margin": "0.12,0.06",
    "height": 0.3,
}
EDGE_STYLE = {"color": LINE, "arrowsize": 0.7, "fontname": FONT, "fontsize": 8, "fontcolor": MUTED}
CLUSTER_STYLE = {
    "style": "rounded,filled",
    "color": "#cbd2d9",
    "fontname": FONT,
    "fontsize": 11,
    "fontcolor": INK,
    "labeljust": "l",
    "margin": 12,
}


def plot_model(
    model: Any,
    to_file: str | Path = "model.png",
    show_shapes: bool = False,
    show_layer_names: bool = True,
    rankdir: str = "TB",
    expand_nested: bool = False,
    dpi: int = 96,
) -> Any:
    """Draw a model's graph into a file.

    Args:
        model: A built Keras model.
        to_file: The picture's file; its ending gives the format (`.png`, `.svg`, `.pdf`, `.jpg`, `.gif`, `.ps`, `.eps`,
            `.dot`; without an ending, PNG).
        show_shapes: Show what shapes enter and leave each layer.
        show_layer_names: Show each layer's name below its type.
        rankdir: Where the graph runs: `"TB"` down, `"LR"` to the right, `"BT"` up, `"RL"` to the left.
        expand_nested: Draw models inside the model as boxes with their own layers.
        dpi: Dots an inch.

    Returns:
        The picture for display inside a Jupyter notebook, `None` anywhere else.

    Raises:
        RequestError: The model is not built.
        SpecError: An unknown file ending or direction, or a resolution below 1.
        MissingPartError: pydot or Graphviz is not installed.
    """
    target = Path(to_file)
    format = file_format(target)
    dot = build(model, show_shapes, show_layer_names, rankdir, expand_nested, dpi)
    if format == "dot":
        fs.write_text(target, dot.to_string())
    else:
        draw(dot.to_string(), format, target)
    return notebook_image(target, format)


def file_format(target: Path) -> str:
    """Return the format that a file's ending asks for.

    Raises:
        SpecError: It is none that can be drawn.
    """
    ending = target.suffix.removeprefix(".").lower() or "png"
    if ending not in FORMATS:
        raise SpecError(f"{target} ends in .{ending}", f"end it in one of: {', '.join('.' + f for f in FORMATS)}")
    return ending


def draw(text: str, format: str, target: Path) -> None:
    """Let Graphviz draw `text` (the dot language) into `target`, which appears whole or not at all.

    Raises:
        MissingPartError: Graphviz is not installed.
        RequestError: Graphviz could not draw it.
    """
    if shutil.which("dot") is None:
        raise MissingPartError(
            f"Graphviz' program dot is not on PATH, and a .{format} picture needs it",
            hint="install Graphviz (apt-get install graphviz, or dnf install graphviz), or write a .dot file instead",
        )
    with fs.publishing(target) as temporary:
        shell.run(["dot", f"-T{format}", "-o", str(temporary)], input=text, error=RequestError)


def build(model: Any, show_shapes: bool, show_layer_names: bool, rankdir: str, expand_nested: bool, dpi: int) -> Any:
    """Return the model's graph as a `pydot.Dot`.

    Raises:
        SpecError: An unknown direction, or a resolution below 1.
    """
    if rankdir not in RANKDIRS:
        raise SpecError(f"rankdir={rankdir!r}", f"give one of: {', '.join(RANKDIRS)}")
    if dpi < 1:
        raise SpecError(f"dpi={dpi!r}: 1 or more was expected", "96 suits a screen, 200 print")
    pydot = import_pydot()
    dot = pydot.Dot("model", graph_type="digraph", rankdir=rankdir, dpi=dpi, **GRAPH_STYLE)
    dot.set_node_defaults(**NODE_STYLE)
    dot.set_edge_defaults(**EDGE_STYLE)
    Painter(pydot, show_shapes, show_layer_names, expand_nested).paint(graph.read(model), dot, "n", 0)
    return dot


def import_pydot() -> ModuleType:
    """Return pydot.

    Raises:
        MissingPartError: It is not installed.
    """
    try:
        import pydot
    except ImportError as error:
        raise MissingPartError("plot_model needs the package pydot", "python -m pip install pydot") from error
    found: ModuleType = pydot
    return found


@dataclass(frozen=True)
class Ports:
    """The nodes that stand for a layer: one for a plain layer, those of its inputs and outputs for a nested model."""

    entering: tuple[str, ...]
    leaving: tuple[str, ...]

    def enter(self, position: int) -> str:
        """Return the node that input `position` goes to; masks and other extra inputs go to the last."""
        return self.entering[min(position, len(self.entering) - 1)]

    def leave(self, tensor: int) -> str:
        """Return the node that output `tensor` comes from."""
        return self.leaving[min(tensor, len(self.leaving) - 1)]


@dataclass(frozen=True)
class Html:
    """A label that pydot writes as it is: of a `str` it looks at every character, two thirds of the time for a large model."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Painter:
    """Puts layers, edges and nested models into a pydot graph.

    Attributes:
        pydot: The module.
        show_shapes: Whether a label has shapes.
        show_names: Whether a label has the layer's name.
        expand_nested: Whether nested models become clusters.
    """

    pydot: ModuleType
    show_shapes: bool
    show_names: bool
    expand_nested: bool

    def paint(self, content: graph.Graph, into: Any, prefix: str, depth: int) -> Ports:
        """Draw one model.

        Args:
            content: Its layers.
            into: The pydot graph or cluster that takes its nodes.
            prefix: What the names of its nodes begin with.
            depth: How many models it is inside.

        Returns:
            Which nodes the model's inputs enter and its outputs leave.
        """
        ports = [self.layer(entry, into, f"{prefix}_{place}", depth) for place, entry in enumerate(content.entries)]
        for place, entry in enumerate(content.entries):
            for start, end, text in edges(content, entry, ports[place], ports):
                into.add_edge(self.pydot.Edge(start, end, **({"label": text} if text else {})))
        entering = tuple(node for place in content.inputs for node in ports[place].entering)
        leaving = tuple(ports[source.layer].leave(source.tensor) for source in content.outputs)
        return Ports(entering, leaving)

    def layer(self, entry: graph.Entry, into: Any, node: str, depth: int) -> Ports:
        """Draw one layer, or the cluster of a nested model."""
        inner = graph.nested_model(entry.layer) if self.expand_nested else None
        if inner is None:
            into.add_node(self.pydot.Node(node, label=self.label(entry), fillcolor=colour(entry.type_name)))
            return Ports((node,), (node,))
        cluster = self.pydot.Cluster(node, label=self.title(entry), fillcolor=COLOUR_CLUSTER[depth % 2], **CLUSTER_STYLE)
        ports = self.paint(graph.read(inner), cluster, node, depth + 1)
        into.add_subgraph(cluster)
        return ports

    def label(self, entry: graph.Entry) -> Html:
        """Return a layer's label in Graphviz' HTML: type, name, shapes."""
        rows = [[f"<B>{html.escape(entry.type_name)}</B>"]]
        if self.show_names:
            rows.append([small(entry.name)])
        if self.show_shapes:
            rows += [[small(name), text] for name, text in shape_rows(entry)]
        return Html(f'<<TABLE BORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(map(table_row, rows))}</TABLE>>')

    def title(self, entry: graph.Entry) -> str:
        """Return the title of a nested model's box: one line, so that edges into the box cross little of it."""
        return f"<<B>{html.escape(entry.type_name)}</B>{'  ' + small(entry.name) if self.show_names else ''}>"


def small(text: str) -> str:
    """Return `text` in the small, lighter hand of names."""
    return f'<FONT POINT-SIZE="9" COLOR="{MUTED}">{html.escape(text)}</FONT>'


def edges(content: graph.Graph, entry: graph.Entry, ports: Ports, all_ports: list[Ports]) -> Iterator[tuple[str, str, str]]:
    """Yield start, end and label of every edge into `entry`: one for each tensor of each of its calls."""
    for number, call in enumerate(entry.calls):
        for position, source in enumerate(call.sources):
            text = edge_text(content.entries[source.layer], source, entry, number)
            yield all_ports[source.layer].leave(source.tensor), ports.enter(position), text


def edge_text(origin: graph.Entry, source: graph.Source, entry: graph.Entry, number: int) -> str:
    """Return the label of an edge: which call it leaves and enters, where a layer has several; mostly nothing."""
    leaves = [f"call {source.call}"] if len(origin.calls) > 1 else []
    leaves += [f"output {source.tensor}"] if len(origin.calls[source.call].output_shapes) > 1 else []
    enters = [f"to call {number}"] if len(entry.calls) > 1 else []
    return " ".join([", ".join(leaves), *enters]).strip()


def shape_rows(entry: graph.Entry) -> list[tuple[str, str]]:
    """Return the rows `in` and `out` with the distinct shapes of all calls; an input layer has no `in`."""
    found = {
        "in": [shape for call in entry.calls for shape in call.input_shapes],
        "out": [shape for call in entry.calls for shape in call.output_shapes],
    }
    return [(name, "<BR/>".join(dict.fromkeys(map(str, shapes)))) for name, shapes in found.items() if shapes]


def table_row(texts: list[str]) -> str:
    """Return a row of an HTML label; a lone text spans both columns."""
    if len(texts) == 1:
        return f'<TR><TD COLSPAN="2">{texts[0]}</TD></TR>'
    return f'<TR><TD ALIGN="RIGHT">{texts[0]}</TD><TD ALIGN="LEFT">{texts[1]}</TD></TR>'


def colour(type_name: str) -> str:
    """Return the fill colour for a type of layer."""
    return next((fill for pattern, fill in COLOURS if re.search(pattern, type_name)), COLOUR_OTHER)


def notebook_image(target: Path, format: str) -> Any:
    """Return the picture for display when this is a Jupyter kernel; elsewhere, and for other formats, `None`."""
    # A kernel has imported IPython long before: importing it here would cost every job a second.
    ipython = sys.modules.get("IPython")
    running = ipython.get_ipython() if ipython is not None else None
    if running is None or "IPKernelApp" not in running.config:
        return None
    from IPython import display

    if format == "svg":
        return display.SVG(filename=str(target))
    return display.Image(filename=str(target)) if format in RASTER else None
