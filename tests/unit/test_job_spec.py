"""train.yaml: what is accepted, and what the messages say about the rest."""

from pathlib import Path

import pytest

from hpcutils.errors import RequestError, SpecError
from hpcutils.specs.job import Job, Resources, gpus_per_node, load_job, parse_time_s, read_job

DIGITS = Path(__file__).parents[2] / "jobs" / "digits" / "train.yaml"
GOOD = """\
name: tiny
data:
  files:
    - path: data.h5
  x: images
  y: labels
model:
  function: model.py:build
training:
  epochs: 1
  batch_size: 8
  loss: mse
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text("def build(): ...\n")
    (tmp_path / "data.h5").write_bytes(b"")
    return tmp_path


def load(folder: Path, text: str, **overrides) -> Job:
    (folder / "train.yaml").write_text(text)
    return load_job(folder / "train.yaml", overrides.get("overrides"))


def failure(folder: Path, text: str, overrides=None) -> str:
    with pytest.raises(SpecError) as caught:
        load(folder, text, overrides=overrides)
    return caught.value.message


def test_the_example_job_is_valid():
    job = load_job(DIGITS)
    assert (job.name, job.resources.nodes, job.resources.gpus, job.data.classes) == ("digits", 2, 8, 10)


def test_defaults_and_round_trip(folder):
    job = load(folder, GOOD)
    assert job.resources == Resources()
    assert job.image is None
    assert read_job(job.model_dump_json()) == job


def test_datasets_may_be_lists(folder):
    job = load(folder, GOOD.replace("  x: images", "  x:\n    - data.h5:images\n    - data.h5:more/images"))
    assert [job.data.locate(reference) for reference in job.data.x] == [("data.h5", "images"), ("data.h5", "more/images")]
    assert job.data.y == ("labels",)
    assert read_job(job.model_dump_json()) == job


def test_files_are_not_trusted_unless_said(folder):
    assert not load(folder, GOOD).data.trust_files
    assert load(folder, GOOD.replace("  y: labels", "  y: labels\n  trust_files: true")).data.trust_files
    text = GOOD.replace("  y: labels", "  y: labels\n  trust_files: maybe")
    assert failure(folder, text) == "train.yaml:7:16: data.trust_files: true or false was expected, got 'maybe'"


def test_unknown_key_names_place_and_nearest_key(folder):
    text = GOOD.replace("  epochs: 1", "  epoch: 1")
    lines = failure(folder, text).splitlines()
    assert "train.yaml:9:1: key 'epochs' is missing" in lines
    assert "train.yaml:10:3: unknown key 'epoch'; did you mean 'epochs'?" in lines


def test_unknown_key_without_a_neighbour_lists_the_known_ones(folder):
    assert "unknown key 'zzz'; known keys: name, image, data" in failure(folder, GOOD + "zzz: 1\n")


def test_all_problems_at_once_in_the_order_of_the_file(folder):
    text = GOOD.replace("data.h5", "gone.h5").replace("epochs: 1", "epochs: one").replace("name: tiny", "name: ''")
    lines = failure(folder, text).splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "4", "10"]
    assert lines[1].startswith("train.yaml:4:13: data.files.0.path: no such file: gone.h5")
    assert lines[2] == "train.yaml:10:11: training.epochs: a whole number was expected, got 'one'"


@pytest.mark.parametrize("digest, said", [("ab" * 31, "this has 62"), ("xy" * 32, "hexadecimal digits only")])
def test_a_digest_of_the_wrong_form(folder, digest, said):
    text = GOOD.replace("path: data.h5", f"path: data.h5\n      sha256: {digest}")
    message = failure(folder, text)
    assert message.startswith("train.yaml:5:15: data.files.0.sha256:")
    assert said in message


def test_digests_are_lower_case(folder):
    text = GOOD.replace("path: data.h5", f"path: data.h5\n      sha256: {'AB' * 32}")
    assert load(folder, text).data.files[0].sha256 == "ab" * 32


def test_missing_data_is_fine_when_the_job_makes_it(folder):
    (folder / "make.py").write_text("")
    text = GOOD.replace("data.h5", "later.h5").replace("  x: images", "  make: make.py\n  x: images")
    assert load(folder, text).data.make == "make.py"


@pytest.mark.parametrize(
    "old, new, place, said",
    [
        ("model.py:build", "gone.py:build", "8:13", "no such file: gone.py"),
        ("model.py:build", "model.build", "8:13", "'file.py:function' was expected"),
        ("batch_size: 8", "batch_size: 0", "11:15", "1 or more was expected, got 0"),
        ("- path: data.h5", "- url: ftp://x/data.h5", "4:12", "http, https or file URL was expected"),
        ("- path: data.h5", "- url: https://x/data.h5", "4:7", "a file by URL needs its 'sha256'"),
        ("  x: images", "  x: other.h5:images", "5:6", "names no file of 'files'"),
        (
            "  x: images",
            "  x:\n    - data.h5:images\n    - other.h5:images",
            "6:5",
            "'other.h5:images' names no file of 'files' (data.h5)",
        ),
        ("  x: images", "  x: ['data.h5:images', more]", "5:6", "'more' names no file: in a list each is 'file:dataset'"),
        ("  x: images", "  x: ['data.h5:']", "5:6", "'data.h5:' names no dataset"),
        ("  x: images", "  x: []", "5:6", "the name of a dataset, or a list of them, was expected, got []"),
        ("  x: images", "  x: [data.h5:images, 3]", "5:23", "data.x.1: text was expected, got 3"),
        ("loss: mse", "loss: mse\n  optimizer: {learning_rate: 0.1}", "13:14", "needs its 'name'"),
        ("loss: mse", "loss: mse\nresources: {time: 1h}", "13:19", "HH:MM:SS"),
        ("loss: mse", "loss: mse\nresources: {devices: tpu}", "13:22", "'gpu' or 'simulated'"),
        ("loss: mse", "loss: mse\nstaging: {manifest: gone.jsonl}", "13:21", "no such file: gone.jsonl"),
        ("loss: mse", "loss: mse\nstaging: {source: /x}", "13:10", "and there is none"),
        ("loss: mse", "loss: mse\nstaging: {cache: x}", "13:18", "an absolute path was expected, got 'x'"),
        ("loss: mse", "loss: mse\nstaging: {quota_gb: 0}", "13:21", "more than 0"),
        ("  y: labels", "  y: labels\n  split: {train: [5, 2]}", "7:18", "0 <= start < end"),
    ],
)
def test_places_and_expectations(folder, old, new, place, said):
    message = failure(folder, GOOD.replace(old, new))
    assert message.startswith(f"train.yaml:{place}: "), message
    assert said in message


def test_command_line_wins_and_is_named_in_messages(folder):
    given = {("resources", "nodes"): ("--nodes", 3), ("training", "epochs"): ("--epochs", 0)}
    assert failure(folder, GOOD, given) == "--epochs: training.epochs: 1 or more was expected, got 0"
    del given["training", "epochs"]
    assert load(folder, GOOD + "resources: {nodes: 2}\n", overrides=given).resources.nodes == 3


@pytest.mark.parametrize("text, place", [("a: [1", "1:6"), ("- 1\n", "1:1"), ("", "1:1"), ("a: 1\na: 2\n", "2:1")])
def test_no_mapping(folder, text, place):
    assert failure(folder, text).startswith(f"train.yaml:{place}: ")


def test_a_missing_job_file(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        load_job(tmp_path / "gone.yaml")


@pytest.mark.parametrize("text, seconds", [("05:00", 300), ("01:00:00", 3600), ("2-01:00:30", 2 * 86400 + 3630)])
def test_times(text, seconds):
    assert parse_time_s(text) == seconds


@pytest.mark.parametrize(
    "given, each",
    [
        ({"gpus": 8, "nodes": 2}, 4),
        ({"gpus_per_node": 3, "nodes": 5}, 3),
        ({}, 1),
        ({"gpus": 4, "gpus_per_node": 2, "nodes": 2}, 2),
    ],
)
def test_gpus_of_a_node(given, each):
    assert gpus_per_node(Resources(**given)) == each


@pytest.mark.parametrize("given", [{"gpus": 7, "nodes": 2}, {"gpus": 1, "nodes": 2}, {"gpus": 8, "gpus_per_node": 2, "nodes": 2}])
def test_gpus_that_do_not_fit(given):
    with pytest.raises(RequestError) as caught:
        gpus_per_node(Resources(**given))
    assert "--gpus" in caught.value.message
    assert caught.value.hint
