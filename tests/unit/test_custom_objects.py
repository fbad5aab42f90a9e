"""`CustomObjectScope`: names resolve inside, in nested scopes and threads, and nothing stays behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from model_samples import example_of

from hpcutils.errors import RequestError, SpecError
from hpcutils.models.custom_objects import CustomObjectScope


class MyObject(keras.regularizers.Regularizer):
    def __call__(self, x: Any) -> Any:
        return keras.ops.sum(keras.ops.abs(x))

    def get_config(self) -> dict[str, Any]:
        return {}


class Doubling(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return 2 * x


def cubic(x: Any) -> Any:
    return x**3


def other(x: Any) -> Any:
    return x


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    before = dict(keras.saving.get_custom_objects())
    yield
    assert keras.saving.get_custom_objects() == before
    assert not resolves("MyObject")


def resolves(name: str) -> bool:
    try:
        keras.layers.Dense(1, kernel_regularizer=name)
    except ValueError:
        return False
    return True


def activation(name: str) -> Any:
    return keras.layers.Activation(name).activation


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(10)


def test_the_pages_example() -> None:
    with CustomObjectScope({"MyObject": MyObject}):
        layer = keras.layers.Dense(3, kernel_regularizer="MyObject")
    assert isinstance(layer.kernel_regularizer, MyObject)


def test_the_references_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example_of("custom_object_scope.md"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[-1] == "MyObject"


def test_losses_metrics_and_activations_resolve_by_name() -> None:
    with CustomObjectScope({"cubic": cubic, "score": keras.losses.mean_squared_error}):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="cubic")])
        model.compile(loss="score", metrics=["score"], optimizer="sgd")
        model.evaluate(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
    assert model.layers[0].activation is cubic


def test_models_are_saved_and_loaded(tmp_path: Path) -> None:
    with CustomObjectScope({"MyObject": MyObject, "Doubling": Doubling}, {"cubic": cubic}):
        model = keras.Sequential(
            [keras.Input((2,)), keras.layers.Dense(2, kernel_regularizer="MyObject", activation="cubic"), Doubling()]
        )
        model.compile(loss="mse", optimizer="sgd")
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).random((4, 2))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert isinstance(loaded.layers[0].kernel_regularizer, MyObject)
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(tmp_path / "m.keras")


def test_a_name_that_is_not_the_classes_own_builds() -> None:
    with CustomObjectScope({"alias": MyObject}):
        assert isinstance(keras.layers.Dense(1, kernel_regularizer="alias").kernel_regularizer, MyObject)


def test_nested_scopes_add_and_the_inner_one_wins() -> None:
    with CustomObjectScope({"MyObject": MyObject, "act": cubic}):
        with CustomObjectScope({"act": other}):
            assert resolves("MyObject")
            assert activation("act") is other
        assert activation("act") is cubic


def test_later_dicts_win_and_none_is_empty() -> None:
    with CustomObjectScope({"act": cubic}, None, {"act": other}):
        assert activation("act") is other
    with CustomObjectScope():
        assert not resolves("MyObject")


def test_it_works_inside_and_around_keras_own_scope() -> None:
    # Keras' own scope resolves saved objects, not names: `get_registered_object` is how it looks those up.
    saved = keras.saving.get_registered_object
    with keras.saving.CustomObjectScope({"act": cubic, "deep": cubic}), CustomObjectScope({"act": other}):
        assert saved("act") is activation("act") is other
        assert saved("deep") is cubic
    with CustomObjectScope({"act": cubic}), keras.saving.CustomObjectScope({"deep": other}):
        assert saved("act") is activation("act") is cubic
        assert saved("deep") is other


def test_threads_started_inside_see_the_names() -> None:
    with CustomObjectScope({"MyObject": MyObject}), CustomObjectScope({"act": cubic}):
        assert in_thread(lambda: resolves("MyObject"))
        assert in_thread(lambda: activation("act")) is cubic
        with CustomObjectScope({"act": other}):
            assert in_thread(lambda: activation("act")) is other
    assert not in_thread(lambda: resolves("MyObject"))


def test_threads_load_models_inside(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((2,)), Doubling()]).save(tmp_path / "m.keras")
    with CustomObjectScope({"Doubling": Doubling}):
        loaded = in_thread(lambda: keras.saving.load_model(tmp_path / "m.keras"))
    assert isinstance(loaded.layers[0], Doubling)


def test_everything_is_as_before_after_an_exception() -> None:
    relu = activation("relu")
    with pytest.raises(RuntimeError), CustomObjectScope({"act": other, "MyObject": MyObject, "relu": cubic}):
        assert activation("relu") is cubic
        raise RuntimeError
    assert activation("relu") is relu
    with pytest.raises(ValueError, match="act"):
        activation("act")


def test_names_registered_inside_are_forgotten() -> None:
    registered = keras.saving.get_custom_objects()
    registered["before"] = cubic
    try:
        with CustomObjectScope({"act": cubic}):
            registered["inside"] = MyObject
            with CustomObjectScope({"act": other, "before": other}):
                assert registered["inside"] is MyObject
            assert registered["inside"] is MyObject
        assert "inside" not in registered
        assert registered["before"] is cubic
    finally:
        del registered["before"]


def test_the_dicts_given_are_not_touched_and_read_at_once() -> None:
    given: dict[str, Any] = {"act": cubic}
    scope = CustomObjectScope(given)
    given["act"] = other
    with scope:
        assert activation("act") is cubic
    assert given == {"act": other}


def test_one_scope_can_be_entered_again_and_inside_itself() -> None:
    scope = CustomObjectScope({"MyObject": MyObject})
    for _ in range(2):
        with scope:
            with scope:
                assert resolves("MyObject")
            assert resolves("MyObject")
        assert not resolves("MyObject")


@pytest.mark.parametrize("first_closes_first", [True, False])
def test_scopes_of_two_threads_overlap_in_any_order(first_closes_first: bool) -> None:
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with CustomObjectScope({"MyObject": MyObject, "both": other}):
            entered.set()
            assert leave.wait(10)
            assert resolves("MyObject")

    with ThreadPoolExecutor(1) as pool:
        with CustomObjectScope({"act": cubic, "both": cubic}):
            running = pool.submit(second)
            assert entered.wait(10)
            assert activation("act") is cubic
            if not first_closes_first:
                leave.set()
                running.result(10)
                assert activation("act") is activation("both") is cubic
        if first_closes_first:
            with pytest.raises(ValueError, match="act"):
                activation("act")
            assert in_thread(lambda: activation("both")) is other
            leave.set()
            running.result(10)


def test_another_thread_may_close_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        with CustomObjectScope({"act": other}):
            scope = CustomObjectScope({"MyObject": MyObject, "act": cubic})
            pool.submit(scope.__enter__).result(10)
            assert resolves("MyObject")
            scope.__exit__(None, None, None)
            assert not resolves("MyObject")
            assert activation("act") is other
        assert not pool.submit(resolves, "MyObject").result(10), "nor in the thread that entered it"
        assert pool.submit(keras.saving.get_registered_object, "MyObject").result(10) is None


def test_it_can_be_left_only_as_often_as_it_was_entered() -> None:
    scope = CustomObjectScope({"MyObject": MyObject})
    with scope:
        pass
    with pytest.raises(RequestError, match="not open"):
        scope.__exit__(None, None, None)


def test_what_a_block_replaced_or_renamed_is_put_back() -> None:
    registered = keras.saving.get_custom_objects()
    registered.update(first=cubic, second=other)
    try:
        with CustomObjectScope({"act": cubic}):
            registered["first"] = other
            registered["third"] = registered.pop("second")
        assert registered["first"] is cubic
        assert registered["second"] is other
        assert "third" not in registered
    finally:
        del registered["first"], registered["second"]


def test_many_threads_at_once_leave_nothing() -> None:
    def work(number: int) -> bool:
        for _ in range(50):
            with CustomObjectScope({f"act{number}": cubic, "MyObject": MyObject}):
                if activation(f"act{number}") is not cubic or not resolves("MyObject"):
                    return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("wrong", [[MyObject], "MyObject", MyObject, 3, {MyObject: MyObject}, {3: MyObject}])
def test_arguments_that_are_no_mapping_of_names_are_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match="CustomObjectScope"):
        CustomObjectScope({"ok": MyObject}, wrong)


def test_the_module_imports_no_keras() -> None:
    code = "import sys, hpcutils.models.custom_objects; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
