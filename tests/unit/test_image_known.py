"""What is known of images: tests that they pass, lists of packages, comparisons, what is kept, and what a site says of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcutils.errors import ImageError, SpecError
from hpcutils.hashing import digest_file
from hpcutils.image import builders, inside, retention, trials, trust
from hpcutils.image.compare import Difference, Entry, changes, compare, difference, parse_tree
from hpcutils.image.find import Image, find_image, sbom_of
from hpcutils.image.listing import breakdown, known_image, list_images
from hpcutils.image.plan import plan_build
from hpcutils.image.publish import fingerprints, plan_publication, run_publication, set_status, sign, with_entry
from hpcutils.image.sbom import cyclonedx, package_url
from hpcutils.image.selftest import Report, command_words, run_self_tests, slurm_words
from hpcutils.image.trust import verify
from hpcutils.specs.site import Launch, PublishedImage, Site, parse_site

CHECKS = [{"check": "a", "ok": True, "seconds": 0.1, "seen": "1"}, {"check": "b", "ok": False, "seconds": 0.1, "seen": "no"}]
PACKAGES = {"python": {"Keras_Core": "3.15.1"}, "debian": {"libstdc++6": "1:12.2.0-14~deb12"}}


def built(folder: Path, name: str = "a", content: bytes = b"sif", **more: object) -> Image:
    """An image as a build leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest_of(content)[:12]}.sif"
    path.write_bytes(content)
    known = {"name": name, "digest": digest_of(content), "sha256": digest_of(content), "size_bytes": len(content)}
    path.with_suffix(".json").write_text(json.dumps({**known, "self_test": CHECKS[:1], "packages": PACKAGES, **more}))
    (folder / f"{name}.sif").unlink(missing_ok=True)
    (folder / f"{name}.sif").symlink_to(path.name)
    return find_image(name, {"HPCUTILS_IMAGES": str(folder)})


def digest_of(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


# Self-tests.


def test_words_of_a_test() -> None:
    enter = ["apptainer", "exec", "i.sif"]
    python = ["/opt/hpcutils-env/bin/python3", "/hpcutils-src/selftests/0.py"]
    assert command_words(enter, "0.py", 1) == [*enter, *python]
    ranks = command_words(enter, "0.py", 4)
    assert ranks[:4] == [*enter, "mpirun"] and ranks[-4:] == ["-n", "4", *python]
    launcher = slurm_words(2, 3, ["--partition=p"], "pmix_v4")
    assert command_words(enter, "0.py", 4, launcher) == [
        *("srun", "--mpi=pmix_v4", "--kill-on-bad-exit=1", "--quiet", "--nodes=2", "--ntasks-per-node=3", "--partition=p"),
        *enter,
        *python,
    ]


TRIED = "srun --mpi=pmix --kill-on-bad-exit=1 --quiet --nodes=2 --ntasks-per-node=4 --partition=gpu"


def tried(monkeypatch, path: Path, variant: str, **how: object) -> str:
    """Return the command that tests an image of a variant."""
    said: list[list[str]] = []
    monkeypatch.setattr(trials, "run_self_tests", lambda enter, env, launcher=(): said.append([*launcher, *enter]) or Report())
    monkeypatch.setattr(trials, "find_builder", lambda: "apptainer")
    monkeypatch.chdir(path)
    image = built(path, variant=variant)
    site = parse_site('[launch]\ngpus = "gres"\ngpu_type = "a100"\npartition = "gpu"\n', "site.toml")
    if how.pop("cluster", False):
        trials.try_on_cluster(image, site, 2, 4, None, **how)
    else:
        trials.try_here(image, **how)
    return " ".join(said[0])


@pytest.mark.parametrize(("variant", "flag"), [("cuda", "--nv"), ("rocm", "--rocm")])
def test_an_image_for_gpus_is_tested_with_them(tmp_path, monkeypatch, variant, flag) -> None:
    for cluster in (False, True):
        line = tried(monkeypatch, tmp_path, variant, cluster=cluster)
        assert f" {flag} " in line and "--env HPCUTILS_TEST_GPU=1" in line
        assert line.startswith(f"{TRIED} --gres=gpu:a100:4 apptainer ") is cluster
        line = tried(monkeypatch, tmp_path, variant, cluster=cluster, gpu=False)
        assert flag not in line and "HPCUTILS_TEST_GPU" not in line and "--gres" not in line


def test_an_image_without_gpus_is_tested_without_them(tmp_path, monkeypatch) -> None:
    line = tried(monkeypatch, tmp_path, "cpu", cluster=True)
    assert line.startswith(f"{TRIED} apptainer ") and "HPCUTILS_TEST_GPU" not in line and "--nv" not in line
    assert "--nv" in tried(monkeypatch, tmp_path, "cpu", gpu=True)


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("gpus-per-node", ["--gpus-per-node=4"]),
        ("gres", ["--gres=gpu:4"]),
        ("gpus", ["--gpus=8"]),
        ("gpus-per-task", ["--gpus-per-task=1"]),
        ("none", []),
    ],
)
def test_a_test_asks_for_gpus_in_the_sites_dialect(dialect, words) -> None:
    assert trials.gpu_options(Launch(gpus=dialect), 2, 4) == words


def test_an_archive_is_tested_by_what_runs_it(tmp_path, monkeypatch) -> None:
    """buildah is a script here: it says which container it made, and answers as the programs inside would."""
    said = json.dumps({"checks": CHECKS[:1], "packages": PACKAGES, "python": "3.11.2"})
    script = f"""#!/bin/sh
echo "$*" >> {tmp_path}/asked
case "$*" in
  --version) echo "buildah version 1.28.2" ;;
  *" from "*) echo working-container ;;
  *list.json) echo '[{{"script": "0.py", "ranks": 1}}]' ;;
  *0.py) echo '{said}' ;;
esac
"""
    (tmp_path / "bin").mkdir()
    for name, text in {"buildah": script, "unshare": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setattr(builders, "rights_problem", lambda: None)
    archive = tmp_path / "a.oci.tar"
    archive.write_bytes(b"tar")
    report = trials.try_here(find_image(str(archive)))
    assert [check["check"] for check in report.checks] == ["a"]
    asked = (tmp_path / "asked").read_text()
    assert f"from --quiet oci-archive:{archive}" in asked and "rm working-container" in asked
    with pytest.raises(ImageError, match="GPUs are handed to a SIF alone"):
        trials.try_here(find_image(str(archive)), gpu=True)


def test_reports_of_several_tests_are_one(tmp_path: Path) -> None:
    """The image is a folder here, and what enters it a script that answers as the programs inside would."""
    said = {"checks": CHECKS, "packages": PACKAGES, "python": "3.11.2"}
    tests = json.dumps([{"script": "0.py", "ranks": 1}, {"script": "1.py", "ranks": 1}])
    answers = {"list.json": [tests], "0.py": ["a warning", json.dumps(said)], "1.py": [json.dumps({"checks": CHECKS[:1]})]}
    cases = [f"*{name}) {'; '.join(f'echo {shlex.quote(line)}' for line in lines)} ;;" for name, lines in answers.items()]
    (tmp_path / "enter").write_text("\n".join(["#!/bin/sh", 'case "$*" in', *cases, "esac", ""]))
    (tmp_path / "enter").chmod(0o755)
    report = run_self_tests([str(tmp_path / "enter")], dict(os.environ))
    assert [check["check"] for check in report.checks] == ["a", "b", "a"]
    assert report.failed() == ["  b: no"]
    assert (report.packages, report.python) == (PACKAGES, "3.11.2")


def test_an_image_without_self_tests_is_told() -> None:
    with pytest.raises(ImageError, match="the image has no self-tests"):
        run_self_tests(["false"], dict(os.environ))


@pytest.mark.parametrize("output", ["", "Traceback", "{}", '{"checks": 3}', "[]"])
def test_a_test_that_prints_no_report_is_told(output: str) -> None:
    with pytest.raises(ImageError, match="printed no report"):
        Report().with_output(output)


# The list of packages.


def test_the_bill_of_materials_names_every_package_once() -> None:
    bill = cyclonedx("a", "d" * 64, "f" * 64, PACKAGES)
    assert (bill["bomFormat"], bill["specVersion"], bill["metadata"]["component"]["version"]) == ("CycloneDX", "1.5", "d" * 64)
    assert [component["purl"] for component in bill["components"]] == [
        "pkg:deb/debian/libstdc%2B%2B6@1%3A12.2.0-14~deb12?distro=bookworm",
        "pkg:pypi/keras-core@3.15.1",
    ]
    assert bill == cyclonedx("a", "d" * 64, "f" * 64, PACKAGES)
    assert bill["serialNumber"] != cyclonedx("a", "d" * 64, "e" * 64, PACKAGES)["serialNumber"]


def test_two_spellings_of_a_name_are_one_package() -> None:
    bill = cyclonedx("a", "d" * 64, "f" * 64, {"python": {"Keras_Core": "1", "keras-core": "1", "keras.core": "2"}, "debian": {}})
    assert [component["purl"] for component in bill["components"]] == ["pkg:pypi/keras-core@1", "pkg:pypi/keras-core@2"]


def test_names_of_pypi_are_normal() -> None:
    assert package_url("python", "Ruamel.YAML_x", "0.18+local") == "pkg:pypi/ruamel-yaml-x@0.18%2Blocal"


# Comparing.


FILE = Entry("-", "0o644", 3, 10, "abc")


def test_files_differ_by_content_kind_mode_or_date() -> None:
    first = {"/same": FILE, "/gone": FILE, "/content": FILE, "/mode": FILE, "/date": FILE}
    second = {
        "/same": FILE,
        "/new": FILE,
        "/content": Entry("-", "0o644", 3, 10, "abd"),
        "/mode": Entry("-", "0o755", 3, 99, "abc"),
        "/date": Entry("-", "0o644", 3, 11, "abc"),
    }
    found = difference({}, {}, first, second)
    assert (found.only_first, found.only_second) == (["/gone"], ["/new"])
    assert (found.changed, found.dates) == (["/content", "/mode"], ["/date"])
    assert found.lines()[-1] == "dates    1 files differ in their date alone, /date for one"
    assert difference({}, {}, first, first).lines() == ["no difference"]


def test_packages_and_inputs_are_compared_from_the_sidecars(tmp_path: Path) -> None:
    one = built(tmp_path / "1", packages={"python": {"keras": "3.0", "gone": "1"}})
    two = built(tmp_path / "2", content=b"other", packages={"python": {"keras": "3.1", "new": "2"}})
    found = compare(one, two, with_files=False)
    assert found.packages == {"python gone": ("1", ""), "python keras": ("3.0", "3.1"), "python new": ("", "2")}
    assert list(found.inputs) == ["digest"]
    assert json.loads(json.dumps(found.as_dict()))["packages"]["python keras"] == ["3.0", "3.1"]
    assert isinstance(found, Difference) and "package  python gone: 1 → none" in found.lines()


def test_changes_of_equal_mappings_are_none() -> None:
    assert changes({"a": [1]}, {"a": [1]}) == {} and changes({"a": None}, {}) == {}


def test_what_an_image_says_of_its_files_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that runs inside of images, on a folder of this machine in the place of an image."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("sub/file")
    script = Path(inside.__file__).read_text().replace('os.walk("/")', f'os.walk("{tmp_path}")')
    done = subprocess.run([sys.executable, "-", "tree"], input=script, capture_output=True, text=True, check=True)
    found = {path.removeprefix(str(tmp_path)): entry for path, entry in parse_tree(done.stdout).items()}
    assert sorted(found) == ["/link", "/sub", "/sub/file"]
    assert (found["/sub/file"].content, found["/sub/file"].size_bytes) == (digest_of(b"abc"), 3)
    assert (found["/link"].kind, found["/link"].content) == ("l", "sub/file")


def test_the_breakdown_adds_up() -> None:
    sizes = {"python": {"big": 3_000_000, "small": 1_000_000}, "debian": {"libc6": 2_000_000}, "all_files": 7_000_000}
    lines = breakdown(sizes, shown=1)
    assert [line.split(" MB  ") for line in lines] == [
        ["      3.0", "python big"],
        ["      3.0", "2 other packages"],
        ["      1.0", "files of no package"],
        ["      7.0", "in all, 1.17 times what its packages need"],
    ]


# What is kept.


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("HPCUTILS_CACHE", str(tmp_path))
    monkeypatch.delenv("HPCUTILS_IMAGES", raising=False)
    return plan_build("tf-horovod-cpu")


def older(folder: Path, count: int, suffix: str = ".sif") -> list[Path]:
    """Files of a recipe as builds leave them, the newest first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tf-horovod-cpu-{i:012x}{suffix}" for i in range(count)]
    for age, path in enumerate(paths):
        for file in (path, path.with_suffix(".json"), sbom_of(path)):
            file.write_text("x")
            os.utime(file, (1000 - age, 1000 - age))
    return paths


def test_the_newest_images_stay_and_those_of_jobs_in_the_queue(plan, tmp_path, monkeypatch) -> None:
    images, layers = older(tmp_path / "images", 6), older(tmp_path / "layers", 3)
    (tmp_path / "images/tf-horovod-cuda-000000000000.sif").write_text("another recipe")
    for path in (plan.image, plan.environment):
        path.write_text("the new one")
    monkeypatch.setattr(retention, "images_in_use", lambda: {images[4]})
    assert retention.tidy(plan) == [images[3], images[5], *layers[1:]]
    left = sorted(path.name for path in tmp_path.rglob("*.sif"))
    kept = [*images[:3], images[4], layers[0], plan.image, plan.environment, tmp_path / "images/tf-horovod-cuda-000000000000.sif"]
    assert left == sorted(path.name for path in kept)
    assert not images[5].with_suffix(".json").exists() and not sbom_of(images[5]).exists()
    assert retention.tidy(plan) == []


def test_nothing_goes_where_slurm_cannot_be_asked_but_prune_does_it(plan, tmp_path, monkeypatch, caplog) -> None:
    images = older(tmp_path / "images", 6)
    monkeypatch.setattr(retention, "images_in_use", lambda: None)
    with caplog.at_level("INFO"):
        assert retention.tidy(plan) == []
    assert "'hpcutils build tf-horovod-cpu --prune' removes them" in caplog.text
    assert retention.prune(plan) == images


def test_jobs_in_the_queue_say_which_image_they_need(tmp_path, monkeypatch) -> None:
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    (run / "submission.json").write_text(json.dumps({"image": {"path": "/i/a.sif"}}))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {run}\necho /home/somebody\necho {run}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert retention.images_in_use() == {Path("/i/a.sif")}
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert retention.images_in_use() is None
    (tmp_path / "squeue").unlink()
    assert retention.images_in_use() is None


# What a site says of images.


def published(image: Image, **more: object) -> PublishedImage:
    return PublishedImage.model_validate({"path": str(image.path), "sha256": digest_file(image.path), **more})


def test_an_alias_goes_before_what_was_built(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HPCUTILS_IMAGES", str(tmp_path / "own"))
    own, sites = built(tmp_path / "own", "standard"), built(tmp_path / "apps", "standard", b"the site's")
    site = Site(images={"standard": published(sites)})
    assert known_image("standard", site) == (sites, site.images["standard"])
    assert known_image("standard", Site()) == (own, None)
    rows = list_images(site)
    assert [(row.name, row.status, row.path) for row in rows] == [
        ("standard", "current", str(sites.path)),
        ("standard", "built", str(own.path)),
    ]


def test_an_image_that_is_what_it_says(tmp_path) -> None:
    image = built(tmp_path)
    assert verify(image).sha256 == image.sha256
    assert verify(image, published(image), "a").status == "current"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCUTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_image_is_read_once_until_anything_about_it_changes(tmp_path, monkeypatch) -> None:
    image, read = built(tmp_path), []
    monkeypatch.setattr(trust, "digest_file", lambda path: read.append(path) or digest_file(path))
    assert [verify(image).sha256 for _ in range(3)] == [image.sha256] * 3 and len(read) == 1
    verify(image, fresh=True)
    assert len(read) == 2
    image.path.touch()
    verify(image)
    verify(image, published(image), "a")
    assert len(read) == 3
    (tmp_path / "cache/verified.json").write_text("[")
    verify(image)
    assert len(read) == 4


def test_what_cannot_be_remembered_is_read_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HPCUTILS_CACHE", "/dev/null/cache")
    assert verify(built(tmp_path)).sha256


def test_an_altered_image_is_refused(tmp_path) -> None:
    image = built(tmp_path)
    said = published(image)
    verify(image)
    status = image.path.stat()
    image.path.write_bytes(b"siF")
    os.utime(image.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ImageError, match="is not the file that was built as 'a'"):
        verify(image)
    with pytest.raises(ImageError, match="is not the file that was published as 'standard'"):
        verify(image, said, "standard")


def test_a_withdrawn_image_is_refused_and_a_deprecated_one_is_warned_of(tmp_path, caplog) -> None:
    image = built(tmp_path)
    with pytest.raises(ImageError, match="'standard' was withdrawn: a wrong NCCL"):
        verify(image, published(image, status="withdrawn", note="a wrong NCCL"), "standard")
    verify(image, published(image, status="deprecated", note="take standard-2"), "standard")
    assert "the image 'standard' is deprecated: take standard-2" in caplog.text


@pytest.mark.parametrize("how", ["path", "link"])
def test_a_published_image_is_known_by_its_file_too(tmp_path, how) -> None:
    """A path says which file is meant, and the site's word holds for the file, however it is named."""
    image = built(tmp_path / "apps")
    site = Site(images={"standard": published(image, status="withdrawn", note="a wrong NCCL")})
    (tmp_path / "mine.sif").symlink_to(image.path)
    name = str(image.path if how == "path" else tmp_path / "mine.sif")
    found, said = known_image(name, site)
    assert said == site.images["standard"]
    with pytest.raises(ImageError, match="was withdrawn: a wrong NCCL"):
        verify(found, said, name, site=site)


def test_an_altered_image_of_the_site_is_refused_by_its_path(tmp_path) -> None:
    image = built(tmp_path)
    site = Site(images={"standard": published(image)})
    image.path.write_bytes(b"siF")
    # Whoever changes the file may write its sidecar as well.
    image.path.with_suffix(".json").unlink()
    found, said = known_image(str(image.path), site)
    with pytest.raises(ImageError, match="is not the file that was published"):
        verify(found, said, str(image.path), site=site)


def test_a_copy_of_a_withdrawn_image_is_refused_by_what_is_in_it(tmp_path) -> None:
    image = built(tmp_path / "apps")
    withdrawn = published(image, status="withdrawn", note="a wrong NCCL")
    (tmp_path / "copy.sif").write_bytes(image.path.read_bytes())
    site = Site(images={"standard": withdrawn})
    found, said = known_image(str(tmp_path / "copy.sif"), site)
    assert said is None
    with pytest.raises(ImageError, match=r"copy\.sif is the withdrawn image 'standard': a wrong NCCL"):
        verify(found, said, "copy.sif", site=site)
    # What is withdrawn under one name and vouched for under another is vouched for.
    both = Site(images={"standard": withdrawn, "standard-2": published(image)})
    assert verify(found, None, "copy.sif", site=both).sha256 == image.sha256
    assert known_image(str(image.path), both)[1] == both.images["standard-2"]


def test_a_signature_is_asked_for_where_the_site_names_a_key(tmp_path) -> None:
    image = built(tmp_path)
    with pytest.raises(ImageError, match=r"gone.asc: no such file: the public key"):
        verify(image, published(image, key=str(tmp_path / "gone.asc")), "standard")


# Publishing.


def test_publishing_copies_and_gives_the_image_its_entry(tmp_path) -> None:
    image = built(tmp_path / "own")
    sbom_of(image.path).write_text("{}")
    site_file = tmp_path / "site.toml"
    site_file.write_text('name = "somewhere" # a remark\n')
    plan = plan_publication(image, "standard", tmp_path / "apps", site_file, None)
    assert not plan.target.exists() and "unsigned" in plan.describe()
    run_publication(plan)
    site = parse_site(site_file.read_text(), "site.toml")
    assert site.images["standard"] == PublishedImage(path=str(plan.target), sha256=image.sha256)
    assert "# a remark" in site_file.read_text()
    found, said = known_image("standard", site)
    assert verify(found, said, "standard").status == "current" and sbom_of(found.path).exists()
    set_status(site_file, site, "standard", "withdrawn", "why")
    assert parse_site(site_file.read_text(), "site.toml").images["standard"].status == "withdrawn"
    with pytest.raises(SpecError, match="no image is published as 'other'"):
        set_status(site_file, site, "other", "withdrawn", "")


def test_two_aliases_of_one_image_are_two_files(tmp_path) -> None:
    """Each may be signed with a key of its own, and a signature is part of the file."""
    image, site_file = built(tmp_path / "own"), tmp_path / "site.toml"
    plans = [plan_publication(image, alias, tmp_path / "apps", site_file, None) for alias in ("standard", "standard-2")]
    for plan in plans:
        run_publication(plan)
    assert [plan.target.name for plan in plans] == [f"{alias}-{image.digest[:12]}.sif" for alias in ("standard", "standard-2")]
    assert all(plan.target.is_file() for plan in plans)


@pytest.mark.parametrize("alias", ["./a.sif", "a.sif", "a b", ""])
def test_what_cannot_be_an_alias_is_told_before_anything_is_copied(tmp_path, alias) -> None:
    with pytest.raises(SpecError, match="cannot be the name of a published image") as caught:
        plan_publication(built(tmp_path / "own"), alias, tmp_path / "apps", tmp_path / "site.toml", None)
    assert caught.value.hint == "give it one: --as NAME" and not (tmp_path / "apps").exists()


def test_the_public_key_is_there_while_it_is_exported_again(tmp_path, monkeypatch) -> None:
    """Apptainer is a script: exporting fails, and users still have the key that they had."""
    listing = "0)  User:  a\n    Fingerprint:  AB12\n"
    (tmp_path / "apptainer").write_text(f'#!/bin/sh\n[ "$2" = list ] && printf "{listing}" && exit\n[ "$2" != export ]\n')
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "standard.asc").write_text("the old key")
    with pytest.raises(ImageError):
        sign(tmp_path / "a.sif", 0, tmp_path / "standard.asc", "")
    assert (tmp_path / "standard.asc").read_text() == "the old key"


def test_keys_are_told_apart_by_their_fingerprints() -> None:
    listing = (
        "Private key listing (/home/a/.apptainer/keys/pgp-secret):\n\n"
        "0)  User:              A (with 1) <a@b.example>\n    Creation time:     2026\n    Fingerprint:       AB12\n"
        "    Length (in bits):  4096\n\n1)  User:              B <b@b.example>\n    Fingerprint:       CD34\n"
    )
    assert fingerprints(listing) == {0: "AB12", 1: "CD34"}
    assert fingerprints("") == {}


SAID = PublishedImage(path="/a.sif", sha256="0" * 64, note='with "quotes"')


@pytest.mark.parametrize(
    "text",
    [
        "",
        'name = "a"\n',
        'name = "a"\n[images.other]\npath = "/b"\nsha256 = "' + "1" * 64 + '"\n',
        '[images.standard]\npath = "/old"\n\n# for all\n[launch]\nmpi = "pmix"\n',
        '[images."standard"]\npath = "/old"\n',
    ],
)
def test_an_entry_is_put_in_or_replaced_and_all_else_stays(text: str) -> None:
    after = with_entry(text, "standard", SAID)
    assert parse_site(after, "a").images["standard"] == SAID
    assert with_entry(after, "standard", SAID) == after
    for line in ('name = "a"', "[launch]", 'path = "/b"'):
        assert (line in text) == (line in after)
    assert "/old" not in after
