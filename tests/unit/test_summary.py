"""`print_summary`: what the table says, how it is laid out, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import model_samples as samples
import numpy as np
import pytest
from model_samples import L, assert_golden, example_of

from hpcutils.errors import RequestError, SpecError
from hpcutils.models.summary import print_summary
from hpcutils.train.inspect import open_model


def summary(model: Any, **options: Any) -> list[str]:
    lines: list[str] = []
    print_summary(model, print_fn=lines.append, **options)
    return lines


def totals(lines: list[str]) -> list[int]:
    return [int(line.split(":")[1].split()[0].replace(",", "")) for line in lines if "arams:" in line]


def column(lines: list[str]) -> list[int]:
    """The numbers of the column `Params`."""
    body = lines[4 : [i for i, line in enumerate(lines) if line.startswith("=")][1]]
    return [int(m.group(1).replace(",", "")) for line in body if (m := re.search(r"\)\s+([\d,]+)(\s|$)", line))]


@pytest.mark.parametrize("name", ["stack", "siamese", "nested"])
def test_golden(name: str) -> None:
    assert_golden(f"summary_{name}.txt", "\n".join(summary(getattr(samples, name)())) + "\n")


def test_the_references_example_prints_what_the_page_shows(capsys: Any) -> None:
    exec(example_of("print_summary.md"), {})
    shown = (samples.REFERENCE / "print_summary.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert capsys.readouterr().out == shown


def test_golden_of_a_narrow_table() -> None:
    assert_golden("summary_siamese_70.txt", "\n".join(summary(samples.siamese(), line_length=70)) + "\n")


@pytest.mark.parametrize("name", ["stack", "siamese", "nested"])
def test_the_parameters_are_keras_own_and_the_column_adds_up(name: str) -> None:
    model = getattr(samples, name)()
    lines = summary(model)
    trainable = sum(int(keras.ops.size(v)) for v in model.trainable_weights)
    assert totals(lines) == [model.count_params(), trainable, model.count_params() - trainable]
    assert sum(column(lines)) == model.count_params() > 0


def test_frozen_layers_move_between_the_totals() -> None:
    model = samples.stack()
    before = totals(summary(model))
    model.get_layer("digits").trainable = False
    size = model.get_layer("digits").count_params()
    assert totals(summary(model)) == [before[0], before[1] - size, before[2] + size]


def test_weights_that_two_layers_share_count_once() -> None:
    inputs = keras.Input((16,), name="in")
    encoder = samples.encoder()
    direct = encoder.get_layer("narrow")(inputs)
    model = keras.Model(inputs, [encoder(inputs), direct])
    lines = summary(model)
    assert totals(lines)[0] == model.count_params() == 16 * 8 + 8 + 8 * 4 + 4
    assert sum(column(lines)) == model.count_params()
    assert any(line.endswith(" +136 shared") for line in lines)


def test_only_the_models_own_calls_are_listed() -> None:
    dense = L.Dense(4, name="dense")
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    dense(keras.Input((3,), name="elsewhere"))
    lines = summary(keras.Model([a, b], L.Add(name="sum")([dense(a), dense(b)])))
    text = "\n".join(lines)
    assert "elsewhere" not in text
    assert "dense[0][0]" in text and "dense[1][0]" in text and "dense[2][0]" not in text


def test_different_shapes_of_one_layer_are_all_shown() -> None:
    flat = L.Flatten(name="flat")
    a, b = keras.Input((2, 3), name="a"), keras.Input((4, 5), name="b")
    text = "\n".join(summary(keras.Model([a, b], [flat(a), flat(b)])))
    assert "(None, 6)" in text and "(None, 20)" in text


@pytest.mark.parametrize("options", [{}, {"line_length": 70}, {"line_length": 200}, {"positions": [0.2, 0.5, 0.7, 1]}])
@pytest.mark.parametrize("name", ["stack", "siamese", "nested"])
def test_every_line_is_one_ascii_line_that_fits(name: str, options: dict[str, Any]) -> None:
    model = getattr(samples, name)()
    lines = summary(model, **options)
    length = options.get("line_length", 80 if name == "stack" else 110)
    assert max(map(len, lines)) == length == len(lines[1])
    assert all(line.isascii() and "\n" not in line and line == line.rstrip() for line in lines)
    whole = re.sub(r"\s", "", "".join(lines))
    assert all(layer.name in whole for layer in model.layers), "a name was cut off"


def test_relative_and_absolute_positions_agree() -> None:
    model = samples.siamese()
    assert summary(model, positions=[0.5, 0.7, 0.8, 1.0], line_length=100) == summary(model, positions=[50, 70, 80, 100])
    header = summary(model, positions=[50, 70, 80, 100])[2]
    assert header.index("Output") == 50
    assert header.index("Params") + len("Params") == 78
    assert header.index("Connected") == 80


def test_a_plain_stack_takes_the_four_positions_of_the_page() -> None:
    assert summary(samples.stack(), positions=[0.33, 0.55, 0.67, 1.0])[2].split() == [
        "Layer",
        "(type)",
        "Output",
        "shape",
        "Params",
    ]


@pytest.mark.parametrize("positions", [[0.5, 0.4, 0.9, 1], [0.5, 1.0], [10, 20, 30, 400], [0.01, 0.5, 0.7, 1.0], [0, 5, 9, 20]])
def test_columns_that_do_not_fit_are_refused(positions: list[float]) -> None:
    with pytest.raises(SpecError, match="columns were expected"):
        summary(samples.siamese(), positions=positions, line_length=100)


def test_it_prints_to_stdout_and_the_same_in_a_narrow_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_summary(samples.stack())
    assert capsys.readouterr().out.splitlines() == summary(samples.stack())


def test_a_subclassed_model_lists_what_it_knows() -> None:
    model = samples.Subclassed()
    model(keras.ops.ones((2, 4)))
    lines = summary(model)
    assert [line.split() for line in lines[4:7]] == [
        ["first", "(Dense)", "(2,", "3)", "15"],
        ["second", "(Dense)", "(2,", "2)", "8"],
        ["unused", "(Dense)", "?", "unbuilt"],
    ]
    assert totals(lines) == [23, 23, 0]


@pytest.mark.parametrize("model", [keras.Sequential([L.Dense(2)], name="open"), samples.Subclassed()])
def test_an_unbuilt_model_is_refused_with_what_to_do(model: Any) -> None:
    with pytest.raises(RequestError, match="not built") as caught:
        summary(model)
    assert model.name in str(caught.value) and "keras.Input" in str(caught.value)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(RequestError, match="a Keras model was expected"):
        summary(L.Dense(2))


def test_memory_counts_every_dtype() -> None:
    inputs = keras.Input((16,))
    half = keras.Model(inputs, L.Dense(8, dtype="float16", name="d")(inputs))
    assert any(line.startswith("Total params:") and line.endswith("136 (272 B)") for line in summary(half))
    assert any("(1.06 KiB)" in line for line in summary(keras.Sequential([keras.Input((16,)), L.Dense(16)])))


def test_the_module_imports_no_keras() -> None:
    code = "import sys, hpcutils.models.summary; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_saved_model_and_its_custom_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_layers.py").write_text(
        "import keras\n\n\nclass Tripling(keras.layers.Layer):\n    def call(self, x):\n        return 3 * x\n"
    )
    for variable in ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "a_module_that_is_gone"}
    exec((tmp_path / "own_layers.py").read_text(), space)
    keras.Sequential([keras.Input((2,)), space["Tripling"]()]).save("m.keras")
    for reference in ("own_layers.py:Tripling", f"Tripling={tmp_path}/own_layers.py:Tripling"):
        with open_model(Path("m.keras"), [reference]) as model:
            assert [type(layer).__name__ for layer in model.layers] == ["Tripling"]
    for words, said in (
        ([], "--custom-objects name=file.py:Name"),
        (["Tripling"], "write file.py:Name"),
        (["no.py:Tripling"], "no such file"),
        (["own_layers.py:Nothing"], "it has: Tripling"),
    ):
        with pytest.raises(SpecError, match=said), open_model(Path("m.keras"), words):
            pass
    with pytest.raises(SpecError, match="no such file"), open_model(Path("no.keras")):
        pass


def test_positions_may_be_an_array() -> None:
    model = keras.Sequential([keras.Input((2,)), L.Dense(3)])
    assert summary(model, positions=np.array([0.4, 0.7, 1.0])) == summary(model, positions=[0.4, 0.7, 1.0])
    assert summary(model, positions=np.array([40, 60, 80])) == summary(model, positions=(40, 60, 80))
    with pytest.raises(SpecError, match=r"positions=\[0.5\]"):
        summary(model, positions=np.array([0.5]))
