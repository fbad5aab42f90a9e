"""What `summary` and `plot` draw from: a Keras model's layers and connections, read once into plain values.

Keras has no public way to ask which call of a layer feeds which; the few private names that this needs are all used
here. Keras is not imported: a model that one can hand over has it loaded already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpcutils.errors import RequestError

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: output `tensor` of call number `call` of the layer at `layer` in `Graph.entries`."""

    layer: int
    call: int
    tensor: int


@dataclass(frozen=True)
class Call:
    """One use of a layer: what it is fed from, and the shapes of what goes in and comes out."""

    sources: tuple[Source, ...]
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Entry:
    """One layer (or operation) of a model, and its calls in this model; none where the model is no graph."""

    layer: Any
    name: str
    type_name: str
    calls: tuple[Call, ...]

    @property
    def is_input(self) -> bool:
        return self.type_name == "InputLayer"


@dataclass(frozen=True)
class Graph:
    """The layers of a model in order.

    Attributes:
        entries: The layers, inputs first.
        connected: Whether the connections are known; they are not for a subclassed model.
        inputs: Places in `entries` that the model's inputs enter.
        outputs: Where the model's outputs come from.
    """

    entries: tuple[Entry, ...]
    connected: bool
    inputs: tuple[int, ...] = ()
    outputs: tuple[Source, ...] = ()

    @property
    def is_chain(self) -> bool:
        """Whether each layer is called once and fed by the one before it."""
        return all(
            len(entry.calls) == 1 and [source.layer for source in entry.calls[0].sources] == [place - 1][: place > 0]
            for place, entry in enumerate(self.entries)
        )


def read(model: Any) -> Graph:
    """Read the layers and connections of `model`.

    Args:
        model: A built Keras model.

    Raises:
        RequestError: The model is not built: it has no shapes yet.
    """
    require_built(model)
    function = function_of(model)
    if function is None:
        return Graph(tuple(lone_entry(layer) for layer in model.layers), connected=False)
    return read_function(function)


def require_built(model: Any) -> None:
    """Check that the model knows its shapes.

    Raises:
        RequestError: It does not, or is no Keras model.
    """
    if not hasattr(model, "layers"):
        raise RequestError(f"a {type(model).__name__} was given; a Keras model was expected")
    # Keras calls a model built that has no build of its own, though no layer of it is.
    unused = all(not getattr(layer, "built", True) for layer in model.layers)
    if not model.built or unused:
        raise RequestError(
            f"the model '{model.name}' ({type(model).__name__}) is not built: its layers have no shapes yet",
            hint="begin it with keras.Input(shape=...), or call model.build(input_shape) or the model on data first",
        )


def function_of(model: Any) -> Any | None:
    """Return the object that holds the model's graph, or `None`: a Sequential keeps its graph in an inner model."""
    inner = getattr(model, "_functional", None)
    holder = model if inner is None else inner
    return holder if hasattr(holder, "_nodes_by_depth") else None


def is_sequential(model: Any) -> bool:
    """Whether `model` is a stack of layers that does not list its input among them."""
    return getattr(model, "_functional", None) is not None


def nested_model(layer: Any) -> Any | None:
    """Return the model inside `layer` whose graph can be drawn: the layer itself, or what a wrapper wraps."""
    for candidate in (layer, getattr(layer, "layer", None)):
        if candidate is not None and hasattr(candidate, "layers") and function_of(candidate) is not None:
            return candidate
    return None


def read_function(function: Any) -> Graph:
    """Read a functional graph. Only the calls that belong to it count: a layer may also be used elsewhere."""
    own_nodes = {id(node) for nodes in function._nodes_by_depth.values() for node in nodes}
    places = {id(layer): place for place, layer in enumerate(function.operations)}
    calls = {id(layer): [node for node in layer._inbound_nodes if id(node) in own_nodes] for layer in function.operations}

    def source(tensor: Any) -> Source | None:
        origin = tensor._keras_history
        node = origin.operation._inbound_nodes[origin.node_index]
        if id(node) not in own_nodes:
            return None
        nodes = [id(known) for known in calls[id(origin.operation)]]
        return Source(places[id(origin.operation)], nodes.index(id(node)), origin.tensor_index)

    def sources(tensors: Any) -> tuple[Source, ...]:
        return tuple(found for found in map(source, tensors) if found is not None)

    entries = tuple(
        Entry(layer, layer.name, type_name(layer), tuple(read_call(n, sources) for n in calls[id(layer)]))
        for layer in function.operations
    )
    inputs = tuple(found.layer for found in sources(function.inputs))
    return Graph(entries, connected=True, inputs=inputs, outputs=sources(function.outputs))


def read_call(node: Any, sources: Any) -> Call:
    """Read one use of a layer; an input has no sources."""
    return Call(sources(node.input_tensors), shapes(node.input_tensors), shapes(node.output_tensors))


def lone_entry(layer: Any) -> Entry:
    """Read a layer of a model that is no graph: its connections are unknown, its shapes known only from its build."""
    built_for = getattr(layer, "_build_shapes_dict", None) or {}
    known = [tuple(shape) for shape in built_for.values() if is_shape(shape)]
    if len(known) != 1 or len(built_for) != 1:
        return Entry(layer, layer.name, type_name(layer), ())
    try:
        out = layer.compute_output_shape(known[0])
    except (NotImplementedError, TypeError, ValueError):
        # Keras' way to say that a layer cannot tell.
        return Entry(layer, layer.name, type_name(layer), ())
    outs = (tuple(out),) if is_shape(out) else tuple(tuple(shape) for shape in out if is_shape(shape))
    return Entry(layer, layer.name, type_name(layer), (Call((), (known[0],), outs),))


def shapes(tensors: Any) -> tuple[Shape, ...]:
    """Return the shapes of symbolic tensors as plain tuples."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def is_shape(value: Any) -> bool:
    """Whether `value` is one shape, and not a collection of shapes."""
    return isinstance(value, list | tuple) and all(size is None or isinstance(size, int) for size in value)


def type_name(layer: Any) -> str:
    """Return the class of `layer`, with the class that it wraps: `Bidirectional(LSTM)`."""
    inner = getattr(layer, "layer", None) or getattr(layer, "forward_layer", None)
    own = type(layer).__name__
    return own if inner is None or not hasattr(inner, "call") else f"{own}({type(inner).__name__})"


def variables(layer: Any) -> Iterator[Any]:
    """Yield the weights of `layer`, each once; an operation has none."""
    seen: set[int] = set()
    for variable in getattr(layer, "weights", []):
        if id(variable) not in seen:
            seen.add(id(variable))
            yield variable
