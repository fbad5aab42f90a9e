"""`plot_model`: the graph it builds, the files it writes, and what it says when a part is missing."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import keras
import model_samples as samples
import pydot
import pytest
from model_samples import L, assert_golden, example_of

from hpcutils.errors import MissingPartError, RequestError, SpecError
from hpcutils.models.plot import plot_model


def drawn(model: Any, folder: Path, **options: Any) -> pydot.Dot:
    """The graph that a `.dot` file holds, as pydot reads it back."""
    plot_model(model, folder / "m.dot", **options)
    (graph,) = pydot.graph_from_dot_file(str(folder / "m.dot"))
    return graph


def clusters(graph: Any) -> list[Any]:
    return [c for sub in graph.get_subgraphs() for c in (sub, *clusters(sub))]


def nodes(graph: Any) -> dict[str, str]:
    """Node to the name of its layer."""
    own = {n.get_name(): n.get_label() for n in graph.get_nodes() if n.get_label()}
    inner = {name: label for sub in graph.get_subgraphs() for name, label in nodes(sub).items()}
    return {**{node: text_of(label)[1] for node, label in own.items()}, **inner}


def text_of(label: str) -> list[str]:
    """The texts of an HTML label: type, name, shapes."""
    return [text.strip() for text in ElementTree.fromstring(f"<x>{label[1:-1]}</x>").itertext() if text.strip()]


def edges(graph: Any) -> list[tuple[str, str, str]]:
    """Every edge as the names of its layers and its label."""
    names = nodes(graph)
    every = [e for part in (graph, *clusters(graph)) for e in part.get_edges()]
    return sorted((names[e.get_source()], names[e.get_destination()], (e.get("label") or "").strip('"')) for e in every)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stack", {"show_shapes": True}),
        ("siamese", {}),
        ("nested", {"show_shapes": True, "expand_nested": True, "rankdir": "LR", "dpi": 200}),
    ],
)
def test_golden(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    plot_model(getattr(samples, name)(), tmp_path / "m.dot", **options)
    assert_golden(f"plot_{name}.dot", (tmp_path / "m.dot").read_text(encoding="utf-8"))


def test_the_references_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example_of("plot_model.md"), {})
    assert {p.name for p in tmp_path.iterdir()} == {"twins.dot", "twins.png"}


def test_a_stack_is_a_chain(tmp_path: Path) -> None:
    names = ["image", "conv", "norm", "pool", "flatten", "dropout", "digits"]
    graph = drawn(samples.stack(), tmp_path)
    assert sorted(nodes(graph).values()) == sorted(names)
    assert edges(graph) == sorted((a, b, "") for a, b in itertools.pairwise(names))


def test_each_call_of_a_shared_model_has_its_own_edges(tmp_path: Path) -> None:
    found = edges(drawn(samples.siamese(), tmp_path))
    difference = "difference_between_the_left_and_the_right_code"
    assert [e for e in found if "encoder" in e] == sorted(
        [
            ("left", "encoder", "to call 0"),
            ("right", "encoder", "to call 1"),
            *(("encoder", to, f"call {call}") for to in (difference, "product") for call in (0, 1)),
        ]
    )
    assert ("memory", "states", "output 1") in found
    assert ("memory", "states", "output 2") in found


def test_nested_models_become_clusters_with_edges_to_their_layers(tmp_path: Path) -> None:
    graph = drawn(samples.nested(), tmp_path, expand_nested=True)
    titles = sorted(text_of(c.get_label()) for c in clusters(graph))
    assert titles == [
        ["Functional", "siamese"],
        ["Sequential", "encoder"],
        ["TimeDistributed(Sequential)", "each_step"],
    ]
    found = edges(graph)
    # Into the clusters, through two levels, and out of them.
    assert [e[:2] for e in found if e[0] in ("series", "vector_in")] == [
        ("series", "vector"),
        ("vector_in", "left"),
        ("vector_in", "right"),
    ]
    assert ("left", "vector", "to call 0") in found and ("right", "vector", "to call 1") in found
    assert ("code", "product", "call 1") in found
    assert ("code", "both_ways", "") in found
    assert ("score", "all", "output 0") in found
    # The encoder is drawn twice, since two models hold one each: every node has an identity of its own.
    assert sorted(nodes(graph).values()).count("narrow") == 2


def test_unexpanded_nested_models_are_one_box(tmp_path: Path) -> None:
    graph = drawn(samples.nested(), tmp_path)
    assert not clusters(graph)
    assert sorted(nodes(graph).values()) == ["all", "both_ways", "each_step", "series", "siamese", "vector_in"]


def test_shapes_and_names_are_shown_when_asked_for(tmp_path: Path) -> None:
    def texts(**options: Any) -> list[str]:
        graph = drawn(samples.stack(), tmp_path, **options)
        return next(text_of(n.get_label()) for n in graph.get_nodes() if "Conv2D" in (n.get_label() or ""))

    assert texts() == ["Conv2D", "conv"]
    assert texts(show_layer_names=False) == ["Conv2D"]
    assert texts(show_shapes=True) == ["Conv2D", "conv", "in", "(None, 32, 32, 3)", "out", "(None, 30, 30, 16)"]


def test_names_with_special_characters_stay_whole(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, name='a<b>&"c":d')])
    graph = drawn(model, tmp_path)
    assert 'a<b>&"c":d' in nodes(graph).values()
    plot_model(model, tmp_path / "m.png")


@pytest.mark.parametrize(
    ("ending", "start"),
    [
        (".png", b"\x89PNG"),
        ("", b"\x89PNG"),
        (".PNG", b"\x89PNG"),
        (".svg", b"<?xml"),
        (".pdf", b"%PDF"),
        (".jpg", b"\xff\xd8\xff"),
        (".dot", b"digraph"),
    ],
)
def test_the_files_ending_gives_the_format(ending: str, start: bytes, tmp_path: Path) -> None:
    target = tmp_path / "sub" / f"m{ending}"
    assert plot_model(samples.encoder(), target) is None  # Not in Jupyter.
    assert target.read_bytes().startswith(start)
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_the_default_file_is_model_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plot_model(samples.encoder())
    assert Path("model.png").stat().st_size > 1000


def png_size(file: Path) -> tuple[int, int]:
    return struct.unpack(">II", file.read_bytes()[16:24])  # type: ignore[return-value]


def test_direction_and_resolution_reach_the_picture(tmp_path: Path) -> None:
    sizes = {}
    for name, options in {"down": {}, "right": {"rankdir": "LR"}, "fine": {"dpi": 192}}.items():
        plot_model(samples.stack(), tmp_path / f"{name}.png", **options)
        sizes[name] = png_size(tmp_path / f"{name}.png")
    assert sizes["down"][0] < sizes["down"][1] and sizes["right"][0] > sizes["right"][1]
    assert sizes["fine"] == pytest.approx([2 * side for side in sizes["down"]], rel=0.02)


def test_a_subclassed_model_shows_its_layers(tmp_path: Path) -> None:
    model = samples.Subclassed()
    model(keras.ops.ones((2, 4)))
    graph = drawn(model, tmp_path)
    assert sorted(nodes(graph).values()) == ["first", "second", "unused"]
    assert not graph.get_edges()


@pytest.mark.parametrize("options", [{"to_file": "m.bmpx"}, {"to_file": "m.dot", "rankdir": "UP"}, {"to_file": "m.dot", "dpi": 0}])
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError):
        plot_model(samples.encoder(), **options)
    assert not list(tmp_path.iterdir())


def test_an_unbuilt_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not built"):
        plot_model(keras.Sequential([L.Dense(1)]), tmp_path / "m.png")


def test_without_graphviz_dot_files_are_written_and_pictures_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    plot_model(samples.encoder(), tmp_path / "m.dot")
    with pytest.raises(MissingPartError, match="install Graphviz"):
        plot_model(samples.encoder(), tmp_path / "m.png")
    assert [p.name for p in tmp_path.iterdir()] == ["m.dot"]


def test_a_failing_graphviz_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dot = tmp_path / "bin" / "dot"
    dot.parent.mkdir()
    dot.write_text('#!/bin/sh\necho half > "$3"\necho no fonts here >&2\nexit 3\n')
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dot.parent}{os.pathsep}{os.environ['PATH']}")
    target = tmp_path / "out" / "m.png"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(RequestError, match="no fonts here"):
        plot_model(samples.encoder(), target)
    assert target.read_bytes() == b"old"
    assert [p.name for p in target.parent.iterdir()] == ["m.png"]


def test_without_pydot_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydot", None)  # Python's own way to make an import fail.
    with pytest.raises(MissingPartError, match="pip install pydot"):
        plot_model(samples.encoder(), tmp_path / "m.dot")


def test_the_module_imports_neither_keras_nor_pydot() -> None:
    code = "import sys, hpcutils.models.plot; sys.exit('keras' in sys.modules or 'pydot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
