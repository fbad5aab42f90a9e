"""train.yaml: what is accepted, and what the messages say about the rest."""

import re
from pathlib import Path

import pytest

from hpcutils.errors import RequestError, SpecError
from hpcutils.specs.job import Job, load_job, read_job
from hpcutils.specs.resources import Resources, gpus_per_node, parse_time_s

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


@pytest.mark.parametrize("scheme", ["s3", "gs", "sftp", "ftp", "memory"])
def test_urls_of_fsspec(folder, scheme):
    text = GOOD.replace("path: data.h5", f"url: {scheme}://x/sets/data.h5\n      sha256: {'ab' * 32}")
    file = load(folder, text).data.files[0]
    assert (file.url, file.name) == (f"{scheme}://x/sets/data.h5", "data.h5")


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
        ("- path: data.h5", f"- url: htps://x/data.h5\n      sha256: {'ab' * 32}", "4:12", "http, https or file URL was expected"),
        ("- path: data.h5", "- url: s3://x/data.h5", "4:7", "a file by URL needs its 'sha256'"),
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


ARGS = "model.py:build\n  args: "


@pytest.mark.parametrize(
    "args, place, said",
    [
        ("{n: !foo 1}", "9:13", "!foo"),
        ("{n: !!python/name:os.system x}", "9:13", "python/name"),
        ("!!python/object:os.x {n: 1}", "9:9", "python/object"),
        ("{n: !!set {a, b}}", "9:13", "set"),
        ("{n: !!int abc}", "9:13", "not a value"),
        ("{n: 2024-13-45}", "9:13", "not a value"),
        ("{n: 2024-12-24}", "9:13", "got a date"),
        ('{n: !!binary "gICA"}', "9:13", "got a bytes"),
        ("{n: .nan}", "9:13", "a finite number was expected"),
        ("{n: [1, -.inf]}", "9:17", "a finite number was expected"),
        (f"{{n: {'9' * 5000}}}", "9:13", "not a value"),
        ("&a {n: *a}", "9:9", "contains itself"),
        (f"{{n: {'[' * 60}{']' * 60}}}", "9:51", "nested more than 40 deep"),
        ('{n: "\\uD800"}', "9:13", "half a character"),
        ("{? [1] : 2}", "9:12", "a key must be text"),
    ],
)
def test_values_that_job_json_could_not_hold(folder, args, place, said):
    lines = failure(folder, GOOD.replace("model.py:build", ARGS + args)).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"train.yaml:{place}: ")
    assert said in lines[0]


def test_aliases_of_aliases_do_not_fill_the_memory(folder):
    layers = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "more than 100000 values" in failure(folder, "\n".join(["a0: &a0 [1]", *layers]) + "\n")


@pytest.mark.parametrize(
    "text, place",
    [("name: a\nb: \x07x\n", "2:4"), ("a: " + "[" * 5000, "1:1"), ("a: [1", "1:6"), ("a: b: c", "1:5"), ("%YAML 9\n--- a", "1:")],
)
def test_syntax_errors_have_a_hint(folder, text, place):
    with pytest.raises(SpecError, match=f"^train.yaml:{place}.*: not valid YAML") as caught:
        load(folder, text)
    assert caught.value.hint


@pytest.mark.parametrize("old", ["data.h5", "model.py"])
@pytest.mark.parametrize("made", ["", "  make: model.py\n"])
def test_a_path_that_no_file_can_have(folder, old, made):
    text = GOOD.replace("  x: images\n", f"{made}  x: images\n")
    message = failure(folder, text.replace(old, "x" * 5000 + ".py", 1))
    assert "not a path: File name too long" in message


@pytest.mark.parametrize("section", ["resources", "training", "data", "model", "staging", "checkpoints"])
@pytest.mark.parametrize("value", ["7", "[1]", "text", ""])
def test_options_do_not_hide_a_section_that_is_none(folder, section, value):
    kept = "".join(block for block in re.split(r"(?m)^(?=\w)", GOOD) if not block.startswith(f"{section}:"))
    given = {("resources", "nodes"): ("--nodes", 2), ("training", "epochs"): ("--epochs", 2)}
    message = failure(folder, f"{kept}{section}: {value}\n", given)
    assert f"{section}: a mapping was expected" in message


def test_a_key_given_twice_hides_nothing(folder):
    lines = failure(folder, GOOD.replace("  epochs: 1", "  epochs: 1\n  epochs: one\n  extra: 1")).splitlines()
    assert lines == [
        "train.yaml:11:3: key 'epochs' is given twice",
        "train.yaml:11:11: training.epochs: a whole number was expected, got 'one'",
        "train.yaml:12:3: unknown key 'extra'; known keys: epochs, batch_size, optimizer, loss, metrics, seed",
    ]


def test_references_are_checked_whatever_else_is_wrong_with_the_data(folder):
    text = GOOD.replace("x: images", "x: gone.h5:images").replace("data.h5", "lost.h5").replace("y: labels", "y: more.h5:labels")
    assert [line.partition(": ")[0] for line in failure(folder, text).splitlines()] == [
        f"train.yaml:{p}" for p in ("4:13", "5:6", "6:6")
    ]


def test_contradictions_are_told_beside_wrong_values(folder):
    text = GOOD.replace("path: data.h5", "url: https://x/data.h5\n      extract: ../x")
    text += "staging: {source: /x, quota_gb: 0}\n"
    message = failure(folder, text)
    assert [said in message for said in ("needs its 'sha256'", "a member of the archive", "there is none", "more than 0")] == [
        True
    ] * 4


def test_every_custom_object_is_checked(folder):
    text = GOOD.replace("model.py:build", "model.py:build\n  custom_objects: {a: gone.py:a, b: model.py:b, c: lost.py:c}")
    lines = failure(folder, text).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["model.custom_objects.a", "model.custom_objects.c"]


def test_a_value_that_fits_no_alternative_is_told_once(folder):
    lines = failure(folder, GOOD + "  optimizer: [adam]\n").splitlines()
    assert lines == ["train.yaml:13:14: training.optimizer: text or a mapping was expected, got ['adam']"]


@pytest.mark.parametrize("resources", ["{nodes: 2, gpus: 7}", "{nodes: 2, gpus: 8, gpus_per_node: 3}"])
def test_gpus_of_the_file_that_do_not_fit_have_a_place(folder, resources):
    message = failure(folder, GOOD.replace("epochs: 1", "epochs: one") + f"resources: {resources}\n")
    assert len(message.splitlines()) == 2
    assert message.splitlines()[1].startswith("train.yaml:13:29: resources.gpus: ")


def test_gpus_of_an_option_that_do_not_fit_are_an_impossible_request(folder):
    job = load(folder, GOOD + "resources: {nodes: 2, gpus: 8}\n", overrides={("resources", "nodes"): ("--nodes", 3)})
    with pytest.raises(RequestError, match="--gpus 8 does not divide by --nodes 3"):
        gpus_per_node(job.resources)


@pytest.mark.parametrize("text, place", [("a: [1", "1:6"), ("- 1\n", "1:1"), ("", "1:1"), (GOOD + "name: tiny\n", "13:1")])
def test_no_mapping(folder, text, place):
    assert failure(folder, text).startswith(f"train.yaml:{place}: ")


def test_a_missing_job_file(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        load_job(tmp_path / "gone.yaml")


# A dash makes the first number after it hours.
DAYS = [("1-05", 104400), ("1-05:00", 104400), ("1-05:30", 106200), ("0-00:01", 60), ("90:00", 5400), ("100:00:00", 360000)]


@pytest.mark.parametrize(
    "text", ["00:99:99", "00:60:00", "01:00:60", "05:60", "1-24", "1-05:60", "1-", "-5", "1:2:3:4", "", "5", "٣:00"]
)
def test_no_times(folder, text):
    with pytest.raises(ValueError):
        parse_time_s(text)
    assert "HH:MM:SS" in failure(folder, GOOD + f"resources: {{time: '{text}'}}\n")


@pytest.mark.parametrize("text, seconds", [("05:00", 300), ("01:00:00", 3600), ("2-01:00:30", 2 * 86400 + 3630), *DAYS])
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


SHA = "ab" * 32


@pytest.mark.parametrize(
    "file, more, said",
    [
        (f"{{path: data.h5, sha256: {SHA}}}", "  read: mpio\n", "'overlap' does not go with 'read: mpio'"),
        (f"{{path: data.h5, sha256: {SHA}}}", "  trust_files: true\n", "'overlap' does not go with 'trust_files'"),
        (f"{{path: data.h5, sha256: {SHA}, extract: a.h5}}", "", "'overlap' does not go with 'extract': a.h5"),
        ("{path: data.h5}", "", "data.h5 has no 'sha256', and there is no 'staging.manifest'"),
    ],
)
def test_what_does_not_go_with_overlap(folder, file, more, said):
    text = GOOD.replace("\n    - path: data.h5", f" [{file}]").replace("  y: labels\n", f"  y: labels\n{more}  stage: overlap\n")
    place = f"train.yaml:{6 + more.count(chr(10))}:10: data.stage: "
    message = failure(folder, text)
    assert message.startswith(place)
    assert said in message
    assert load(folder, text.replace("overlap", "before")).data.stage == "before"


def test_overlap_with_a_digest_or_a_manifest(folder):
    text = GOOD.replace("  y: labels\n", "  y: labels\n  stage: overlap\n")
    (folder / "m.jsonl").write_text("")
    for good in (text + "staging: {manifest: m.jsonl}\n", text.replace("path: data.h5", f"path: data.h5\n      sha256: {SHA}")):
        job = load(folder, good)
        assert job.data.stage == "overlap"
        assert read_job(job.model_dump_json()) == job


def test_a_stage_that_is_none(folder):
    said = failure(folder, GOOD.replace("  y: labels\n", "  y: labels\n  stage: never\n"))
    assert said == "train.yaml:7:10: data.stage: 'before' or 'overlap' was expected, got 'never'"


SEQUENCE = """\
name: tiny
data:
  sequence: pipeline.py:make
  args: {rows: 16}
  workers: 2
  use_processes: true
model:
  function: model.py:build
training:
  epochs: 1
  batch_size: 8
  loss: mse
"""


@pytest.fixture
def with_pipeline(folder: Path) -> Path:
    (folder / "pipeline.py").write_text("def make(): ...\n")
    return folder


def test_a_sequence_in_place_of_datasets(with_pipeline):
    job = load(with_pipeline, SEQUENCE)
    assert (job.data.sequence, job.data.args, job.data.files) == ("pipeline.py:make", {"rows": 16}, ())
    assert (job.data.workers, job.data.use_processes, job.data.validation_sequence) == (2, True, None)
    assert read_job(job.model_dump_json()) == job
    with_files = SEQUENCE.replace("  workers: 2", "  files: [{path: data.h5}]\n  validation_sequence: pipeline.py:other")
    assert read_job(load(with_pipeline, with_files).model_dump_json()).data.files[0].name == "data.h5"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("workers: 2", "x: images", "5:6: data.x: belongs to datasets (x and y)"),
        ("workers: 2", "x: [data.h5:images]", "5:6: data.x: belongs to datasets (x and y)"),
        ("workers: 2", "trust_files: true", "5:16: data.trust_files: belongs to datasets (x and y)"),
        ("workers: 2", "classes: 10", "5:12: data.classes: belongs to datasets"),
        ("workers: 2", "normalizer: model.py:scale", "5:15: data.normalizer: belongs to datasets"),
        ("workers: 2", "split: {train: [0, 5]}", "5:10: data.split: belongs to datasets"),
        ("workers: 2", "read: mpio", "5:9: data.read: belongs to datasets"),
        ("workers: 2", "workers: 0", "5:12: data.workers: 1 or more was expected, got 0"),
        ("workers: 2", "make: make.py", "5:9: data.make: it makes the 'files' that are missing, and there are none"),
        ("{rows: 16}", "{files: 16}", "4:9: data.args: 'files' is what the function is given"),
        ("use_processes", "use_process", "6:3: unknown key 'use_process'; did you mean 'use_processes'?"),
        ("  sequence:", "  seqence:", "3:3: unknown key 'seqence'; did you mean 'sequence'?"),
        ("pipeline.py:make", "pipelin.py:make", "3:13: data.sequence: no such file: pipelin.py"),
        ("pipeline.py:make", "make", "3:13: data.sequence: 'file.py:function' was expected, got 'make'"),
        ("  workers: 2", "  validation_sequence: gone.py:make", "5:24: data.validation_sequence: no such file: gone.py"),
    ],
)
def test_what_a_sequence_does_not_go_with(with_pipeline, old, new, said):
    (with_pipeline / "make.py").write_text("")
    message = failure(with_pipeline, SEQUENCE.replace(old, new))
    assert f"train.yaml:{said}" in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  x: images\n", "", "2:1: data.x: is missing: a dataset of 'files', or else 'sequence' in place of x, y and split"),
        ("  y: labels\n", "", "2:1: data.y: is missing: a dataset of 'files', or else 'sequence'"),
        ("  y: labels\n", "  y: labels\n  workers: 2\n", "7:12: data.workers: belongs to a 'sequence', and there is none"),
        ("  files:\n    - path: data.h5\n", "", "2:1: data.files: a list of files was expected"),
    ],
)
def test_what_datasets_need_and_do_not_go_with(folder, old, new, said):
    assert failure(folder, GOOD.replace(old, new)).splitlines()[0].startswith(f"train.yaml:{said}")


def test_neither_datasets_nor_a_sequence_is_one_complaint(folder):
    text = GOOD.replace("  x: images\n  y: labels\n", "")
    assert len(failure(folder, text).splitlines()) == 1
