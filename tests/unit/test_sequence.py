"""Sequence and MatrixSequence under the real Keras: each sample once an epoch, with and without workers; nothing copied."""

import itertools
import re
import warnings
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from skimage.io import imread, imsave
from skimage.transform import resize

from hpcutils.data import keras_adapter
from hpcutils.data.hdf5 import CopyWarning, HDF5Matrix
from hpcutils.data.sequence import MatrixSequence, Sequence
from hpcutils.errors import DataError

SAMPLES = 50


class Notebook:
    """The samples that `fit` handed to the model, an inner list an epoch."""

    def __init__(self):
        self.epochs = []
        self.model = self._model()

    def fit(self, x, y=None, **options):
        self.epochs.clear()
        note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: self.epochs.append([]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Use of fork.*|.*os.fork.*|Your input ran out of data")
            self.model.fit(x, y, verbose=0, callbacks=[note], **options)
        return [[int(sample) for sample in epoch] for epoch in self.epochs]

    def _model(self):
        notebook = self

        class Writer(keras.Model):
            def train_step(self, data):
                x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
                first = np.asarray(x)[:, 0]
                assert np.array_equal(np.asarray(y)[..., 0], first % 7), "x and y belong together"
                assert weight is None or np.array_equal(weight, first + 1)
                notebook.epochs[-1].extend(first)
                return {"count": len(first)}

        model = Writer()
        model.compile(run_eagerly=True)
        return model


@pytest.fixture
def notebook():
    return Notebook()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """`x` (50, 3) counts the samples in its first column, `y` (50, 1) is that modulo 7."""
    path = tmp_path_factory.mktemp("sequence") / "data.h5"
    numbers = np.arange(SAMPLES, dtype="f4")
    x = np.stack([numbers, numbers / 50, -numbers], axis=1)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, chunks=(8, 3), compression="gzip", shuffle=True)
        file.create_dataset("y", data=(numbers % 7)[:, None], chunks=(16, 1))
        file.create_dataset("big-endian", data=x.astype(">f8"))
    return path


@pytest.fixture
def matrices(path):
    with HDF5Matrix(path, "x") as x, HDF5Matrix(path, "y") as y:
        yield x, y


class OldStyle(Sequence):
    """Written for the old Keras: the constructor of the base class is not called."""

    def __init__(self, samples, batch_size):
        self.samples, self.batch_size = samples, batch_size

    def __len__(self):
        return int(np.ceil(self.samples / float(self.batch_size)))

    def __getitem__(self, index):
        numbers = np.arange(index * self.batch_size, min((index + 1) * self.batch_size, self.samples), dtype="f4")
        return numbers[:, None], (numbers % 7)[:, None]


# -- Sequence ---------------------------------------------------------------------------------------------------------

WORKERS = [(1, False), (2, False), (1, True), (2, True)]


@pytest.mark.parametrize(("workers", "processes", "shuffle"), [(*w, False) for w in WORKERS] + [(1, False, True), (2, True, True)])
def test_each_sample_once_an_epoch(notebook, workers, processes, shuffle):
    batches = OldStyle(SAMPLES, 8)
    batches.workers, batches.use_multiprocessing = workers, processes
    epochs = notebook.fit(batches, epochs=2, shuffle=shuffle)
    assert [sorted(epoch) for epoch in epochs] == [list(range(SAMPLES))] * 2
    assert (epochs[0] == sorted(epochs[0])) is not shuffle


def test_the_base_class_may_be_initialised_with_options():
    class NewStyle(OldStyle):
        def __init__(self):
            super(OldStyle, self).__init__(workers=3, use_multiprocessing=True, max_queue_size=2)

    batches = NewStyle()
    assert (batches.workers, batches.use_multiprocessing, batches.max_queue_size) == (3, True, 2)
    assert isinstance(batches, keras.utils.PyDataset)


def test_what_a_subclass_must_have():
    class Bare(Sequence):
        pass

    with pytest.raises(NotImplementedError, match="Bare must have __getitem__"):
        Bare()[0]
    with pytest.raises(NotImplementedError, match="Bare must have __len__"):
        len(Bare())


def test_on_epoch_end_is_called_between_epochs(notebook):
    class Shrinking(OldStyle):
        def on_epoch_end(self):
            self.ends = getattr(self, "ends", 0) + 1

    batches = Shrinking(20, 8)
    notebook.fit(batches, epochs=3)
    assert batches.ends >= 3


class CIFAR10Sequence(Sequence):
    """The example of the old Keras page, line by line, with scikit-image's own `imread` and `resize`."""

    def __init__(self, x_set, y_set, batch_size):
        self.x, self.y = x_set, y_set
        self.batch_size = batch_size

    def __len__(self):
        return int(np.ceil(len(self.x) / float(self.batch_size)))

    def __getitem__(self, idx):
        batch_x = self.x[idx * self.batch_size : (idx + 1) * self.batch_size]
        batch_y = self.y[idx * self.batch_size : (idx + 1) * self.batch_size]

        return np.array([resize(imread(file_name), (200, 200)) for file_name in batch_x]), np.array(batch_y)


def test_the_example_of_the_page(tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(10)]
    for path in paths:
        imsave(path, rng.integers(0, 256, (32, 32, 3), np.uint8), check_contrast=False)
    labels = list(rng.integers(0, 3, 10))
    layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.layers.Input((200, 200, 3)), *layers])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = model.fit(CIFAR10Sequence(paths, labels, 4), epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    assert model.predict(CIFAR10Sequence(paths, labels, 4), verbose=0).shape == (10, 3)


# -- MatrixSequence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "processes"), WORKERS)
def test_matrices_are_shuffled_anew_each_epoch(notebook, matrices, workers, processes):
    batches = MatrixSequence(*matrices, 8, shuffle=True, seed=5)
    batches.workers, batches.use_multiprocessing = workers, processes
    epochs = notebook.fit(batches, epochs=3, shuffle=False)
    assert [sorted(epoch) for epoch in epochs] == [list(range(SAMPLES))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = notebook.fit(MatrixSequence(*matrices, 8, shuffle=True, seed=5), epochs=3)
    assert again == epochs, "the default fit(shuffle=True) does not change the order"
    assert notebook.fit(MatrixSequence(*matrices, 8, shuffle=True, seed=6), shuffle=False)[0] != epochs[0]


def test_a_pass_may_take_several_epochs(notebook, matrices):
    """Seven batches, three steps an epoch: three epochs of Keras (3 + 3 + 1 steps) are one pass over the data."""
    epochs = notebook.fit(MatrixSequence(*matrices, 8, shuffle=True), epochs=6, steps_per_epoch=3, shuffle=False)
    passes = [list(itertools.chain(*epochs[:3])), list(itertools.chain(*epochs[3:]))]
    assert [sorted(samples) for samples in passes] == [list(range(SAMPLES))] * 2
    assert passes[0] != passes[1]


def test_parts_of_files_and_arrays_beside_them(path):
    x = HDF5Matrix(path, "x", 11, 41)
    weights = np.arange(11, 41) + 1
    batches = MatrixSequence({"a": x, "b": [x, np.arange(30)]}, np.arange(30), 7, shuffle=True, sample_weight=weights)
    rows = []
    for inputs, y, weight in (batches[i] for i in range(len(batches))):
        assert isinstance(inputs["b"], tuple)
        assert np.array_equal(inputs["a"], inputs["b"][0])
        assert np.array_equal(inputs["a"][:, 0], y + 11)
        assert np.array_equal(weight, y + 12)
        assert np.array_equal(inputs["b"][1], y)
        rows.extend(y)
    assert sorted(rows) == list(range(30))
    assert rows != sorted(rows)
    assert np.array_equal(batches[-1][1], batches[4][1])
    with pytest.raises(IndexError):
        batches[5]


def test_a_part_that_begins_inside_of_a_chunk_is_shuffled_by_the_chunks_of_the_file(path, monkeypatch):
    monkeypatch.setattr("hpcutils.data.sequence.WINDOW_BYTES", 1)  # every chunk is a window
    with HDF5Matrix(path, "x", 11, 41) as x:
        samples = np.concatenate([batch[:, 0] for (batch,) in MatrixSequence(x, None, 4, shuffle=True)])
    assert np.count_nonzero(np.diff(samples // 8)) == 4, "five chunks of eight, each left once"


def test_arrays_alone_are_shuffled_too():
    batches = MatrixSequence(np.arange(100), None, 30, shuffle=True)
    rows = np.concatenate([batch for (batch,) in batches])
    assert np.sort(rows).tolist() == list(range(100)) and rows.tolist() != list(range(100))


def test_batches_are_in_the_byte_order_of_the_machine(path):
    with HDF5Matrix(path, "big-endian") as x:
        (batch,) = MatrixSequence(x, None, 8)[1]
        assert batch.dtype.isnative and batch.dtype == np.float64
        assert np.array_equal(batch, x[8:16])


def test_lengths_and_batch_sizes_are_checked(path, matrices):
    with pytest.raises(DataError, match="as many samples each, got 50, 40"):
        MatrixSequence(matrices[0], HDF5Matrix(path, "y", 0, 40), 8)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MatrixSequence(*matrices, 0)


# -- fit, evaluate and predict with a matrix as it is -----------------------------------------------------------------


def small_model(run_eagerly=True):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    return model


@pytest.mark.filterwarnings("error::hpcutils.data.hdf5.CopyWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 16},
        {},
        {"steps_per_epoch": 5},
        {"batch_size": 10, "class_weight": {0: 1.0, 1: 5.0, 2: 0.5}},
        {"sample_weight": np.linspace(0, 1, SAMPLES)},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_matrices_train_like_arrays_without_a_copy(matrices, options):
    arrays = [matrix[:] for matrix in matrices]
    losses, weights = [], []
    for x, y in (arrays, matrices) if options else (arrays, matrices, (matrices[0], arrays[1])):
        model = small_model(run_eagerly=bool(options))
        history = model.fit(x, y, shuffle=False, epochs=2, verbose=0, validation_data=(x, y), **options)
        losses.append([history.history["loss"], history.history["val_loss"], model.evaluate(x, y, verbose=0)])
        weights.append(np.concatenate([weight.ravel() for weight in model.get_weights()]))
        np.testing.assert_allclose(model.predict(x, verbose=0), model.predict(arrays[0], verbose=0), rtol=1e-5)
    for other in range(1, len(losses)):
        np.testing.assert_allclose(weights[other], weights[0], rtol=1e-5)
        for ours, theirs in zip(losses[other], losses[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.filterwarnings("error::hpcutils.data.hdf5.CopyWarning")
@pytest.mark.parametrize("shuffle", [True, "batch"])
def test_fit_shuffles_matrices(notebook, matrices, shuffle):
    keras.utils.set_random_seed(1)
    epochs = notebook.fit(*matrices, batch_size=5, epochs=2, shuffle=shuffle)
    assert [sorted(epoch) for epoch in epochs] == [list(range(SAMPLES))] * 2
    assert epochs[0] != epochs[1]
    batches = [epochs[0][i : i + 5] for i in range(0, SAMPLES, 5)]
    assert all(batch == sorted(batch) for batch in batches) is (shuffle == "batch")


@pytest.mark.filterwarnings("error::hpcutils.data.hdf5.CopyWarning")
def test_several_inputs(matrices):
    x, y = matrices
    inputs = [keras.layers.Input((3,), name=name) for name in ("a", "b")]
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Add()(inputs)))
    model.compile("sgd", "mse")
    model.fit([x, x], y, verbose=0)
    model.fit({"a": x, "b": x}, y, verbose=0)
    np.testing.assert_allclose(model.predict([x, x], verbose=0), model.predict([x[:], x[:]], verbose=0), rtol=1e-5)


def test_what_keras_copies_it_copies_with_a_warning(matrices):
    with pytest.warns(CopyWarning) as caught:
        small_model().fit(*matrices, validation_split=0.2, verbose=0)
    assert [re.search(r"\((\d+) bytes\)", str(warning.message)).group(1) for warning in caught] == ["600", "200"]


def test_arrays_go_the_way_they_always_went():
    from keras.src.trainers import data_adapters
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    assert keras_adapter.adopt() and keras_adapter.adopt()
    assert data_adapters.ArrayDataAdapter.__mro__[1] is ArrayDataAdapter, "adopted once"
    adapter = data_adapters.get_data_adapter(np.zeros((5, 2)), batch_size=2)
    assert isinstance(adapter, ArrayDataAdapter)
    assert adapter.num_batches == 3


def test_a_keras_with_another_adapter_is_left_alone(matrices, monkeypatch):
    from keras.src.trainers import data_adapters
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    class Rewritten(ArrayDataAdapter):
        def __init__(self, x, y=None, **options):
            super().__init__(x, y, **options)

    monkeypatch.setattr(data_adapters, "ArrayDataAdapter", Rewritten)
    assert not keras_adapter.adopt()
    with pytest.warns(CopyWarning):
        answer = small_model().predict(matrices[0], verbose=0)
    assert data_adapters.ArrayDataAdapter is Rewritten
    np.testing.assert_allclose(answer, small_model().predict(matrices[0][:], verbose=0), rtol=1e-5)


def test_the_pages_example(tmp_path, monkeypatch):
    """`HDF5Matrix` as the old page shows it: a relative path, and `predict` of the whole."""
    monkeypatch.chdir(tmp_path)
    Path("input").mkdir()
    data = np.random.default_rng(0).random((70, 4)).astype("f4")
    with h5py.File("input/file.hdf5", "w") as file:
        file["data"] = data
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])

    x_data = HDF5Matrix("input/file.hdf5", "data")
    answer = model.predict(x_data)

    assert answer.shape == (70, 3)
    np.testing.assert_allclose(answer, model.predict(data, verbose=0), rtol=1e-5, atol=1e-6)
