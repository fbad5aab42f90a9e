"""A drop-in for the old `keras.utils`: the signatures of its page, and what the guide says about Keras 3."""

import inspect
import re
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

from hpcutils import utils

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "coming-from-keras-utils.md"
SIGNATURES = {
    "HDF5Matrix": "(datapath, dataset, start=0, end=None, normalizer=None)",
    "to_categorical": "(y, num_classes=None, dtype='float32')",
    "normalize": "(x, axis=-1, order=2)",
    "get_file": "(fname, origin, untar=False, md5_hash=None, file_hash=None, cache_subdir='datasets', hash_algorithm='auto', "
    "extract=False, archive_format='auto', cache_dir=None)",
    "print_summary": "(model, line_length=None, positions=None, print_fn=None)",
    "plot_model": "(model, to_file='model.png', show_shapes=False, show_layer_names=True, rankdir='TB', expand_nested=False, "
    "dpi=96)",
    "multi_gpu_model": "(model, gpus=None, cpu_merge=True, cpu_relocation=False)",
}
NAMES = {*SIGNATURES, "CustomObjectScope", "Sequence"}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_signature_is_that_of_the_page(name):
    signature = inspect.signature(getattr(utils, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_the_guide_names_all_nine_and_imports_them():
    text = GUIDE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE)) == NAMES
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], namespace)
    assert set(namespace) >= NAMES


def test_what_the_guide_says_about_keras_3():
    """When a new Keras makes one of these untrue, the guide's middle column must change."""
    theirs = keras.utils
    assert not any(hasattr(theirs, name) for name in ("HDF5Matrix", "multi_gpu_model", "print_summary"))
    assert theirs.Sequence is theirs.PyDataset
    with pytest.raises(TypeError):
        theirs.CustomObjectScope({"a": max}, {"b": min})
    seen = []

    def look():
        seen.append(theirs.get_registered_object("outer"))

    with theirs.CustomObjectScope({"outer": max}):
        look()
        with theirs.CustomObjectScope({"inner": min}):
            look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [max, None, None]
    with theirs.CustomObjectScope({"outer": max}), pytest.raises(ValueError, match="Could not interpret"):
        keras.layers.Dense(1, activation="outer")
    assert theirs.to_categorical([0, 2]).dtype == np.float64
    assert "dtype" not in inspect.signature(theirs.to_categorical).parameters
    assert theirs.to_categorical([-1], 3).tolist() == [[0, 0, 1]]
    with pytest.raises(IndexError):
        theirs.to_categorical([5], 3)
    assert theirs.normalize(np.ones(4)).shape == (1, 4)
    defaults = inspect.signature(theirs.plot_model).parameters
    assert (defaults["show_layer_names"].default, defaults["dpi"].default) == (False, 200)


def test_the_same_in_ours():
    seen = []

    def look():
        with utils.CustomObjectScope({"inner": min}):
            seen.append((keras.activations.get("outer"), keras.activations.get("inner")))

    with utils.CustomObjectScope({"outer": max}, {"other": sum}):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        assert keras.activations.get("other") is sum
    assert seen == [(max, min)] * 2
    assert utils.to_categorical([0, 2]).dtype == np.float32
    with pytest.raises(ValueError, match="label -1 at index 0"):
        utils.to_categorical([-1], 3)
    assert utils.normalize(np.ones(4)).shape == (4,)
