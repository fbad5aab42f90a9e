"""The Dockerfiles, read by buildah to their last line: on a base whose shell does nothing, so that no step takes any time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, require

GOLDEN = ROOT / "tests/golden/image"
NAMES = ["tf-horovod-cpu", "tf-horovod-cuda", "small"]


def base(archive: Path) -> None:
    """A system of which `/bin/sh` is `/bin/true`, with its libraries, and the folder that one stage takes from another."""
    said = subprocess.run(["ldd", "/bin/true"], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", said)
    with tarfile.open(archive, "w") as tar:
        for source, target in {"/bin/true": "bin/sh", **{path: path.lstrip("/") for path in libraries}}.items():
            tar.add(Path(source).resolve(), target)
        for folder in ("opt", "opt/hpcutils-env", "tmp", "mnt"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)


def buildah(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    storage = ["--root", f"{folder}/storage", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    return subprocess.run(["buildah", *storage, *words], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require(shutil.which("buildah") is not None, "buildah")
    for name in ("context/files", "build", "code"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "context/files/0-motd").write_text("hello\n")
    base(tmp_path / "context/base.tar")
    return tmp_path


def build(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "context/Dockerfile").write_text(text)
    contexts = [f"--build-context={name}={folder / name}" for name in ("build", "code")]
    words = ["build", "--isolation", "chroot", "--format", "oci", "--tag", "localhost/read", *contexts]
    return buildah(folder, *words, "--file", f"{folder}/context/Dockerfile", f"{folder}/context")


@pytest.mark.parametrize("name", NAMES)
def test_buildah_reads_every_line(folder: Path, name: str) -> None:
    text = (GOLDEN / f"{name}.Dockerfile").read_text()
    done = build(folder, text)
    assert done.returncode == 0, done.stderr[-2000:]
    known = json.loads(buildah(folder, "inspect", "--type", "image", "localhost/read").stdout)["OCIv1"]["config"]
    # As a container gets them, and not as they are quoted in the text.
    variables = dict(pair.split("=", 1) for pair in known["Env"])
    assert variables["PATH"].startswith("/opt/hpcutils-env/bin:")
    assert known["Labels"]["hpcutils.recipe"] == name
    assert name != "small" or variables["GREETING"] == 'it\'s "$HOME" \\ `id`'


def test_a_line_that_buildah_does_not_know_is_noticed(folder: Path) -> None:
    """That the test above can fail."""
    text = (GOLDEN / "small.Dockerfile").read_text()
    assert build(folder, text.replace("LABEL hpcutils.variant", "LABLE hpcutils.variant")).returncode != 0
