"""Finding images, the command that runs in them, and what is read from a SIF's list of objects."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hpcutils.errors import ImageError, RequestError
from hpcutils.image.exec_line import bind, docker_argv, exec_argv, passed_on, pyxis_options
from hpcutils.image.find import find_image, images_folder
from hpcutils.image.sif import SifObject, parse_listing, parse_name
from hpcutils.launch.node_lines import environment_lines

GOLDEN = Path(__file__).parents[1] / "golden/exec"


def make(folder: Path, digest: str = "0123456789ab") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"a-{digest}.sif"
    path.write_bytes(b"sif")
    path.with_suffix(".json").write_text(json.dumps({"name": "a", "digest": digest * 5, "sha256": "f" * 64}))
    (folder / "a.sif").symlink_to(path.name)
    return path


def test_a_name_leads_to_the_file_not_to_the_link(tmp_path: Path) -> None:
    path = make(tmp_path / "images")
    image = find_image("a", {"HPCUTILS_IMAGES": str(tmp_path / "images")})
    assert (image.path, image.name, image.digest, image.sha256) == (path, "a", "0123456789ab" * 5, "f" * 64)


def test_where_images_are() -> None:
    assert images_folder({"HOME": "/home/a"}) == Path("/home/a/.cache/hpcutils/images")
    assert images_folder({"HOME": "/home/a", "HPCUTILS_CACHE": "/c"}) == Path("/c/images")
    assert images_folder({"HOME": "/home/a", "HPCUTILS_CACHE": "/c", "HPCUTILS_IMAGES": "/i"}) == Path("/i")


def test_a_path_is_taken_as_it_is_and_needs_no_sidecar(tmp_path: Path) -> None:
    (tmp_path / "other.sif").write_bytes(b"sif")
    image = find_image(str(tmp_path / "other.sif"), {})
    assert (image.name, image.digest, image.sha256) == ("other", "", "")


def test_a_broken_sidecar_is_none(tmp_path: Path) -> None:
    make(tmp_path).with_suffix(".json").write_text("{")
    assert find_image("a", {"HPCUTILS_IMAGES": str(tmp_path)}).digest == ""


@pytest.mark.parametrize(("name", "hint"), [("b", "hpcutils build b"), ("./b.sif", "give the path of a SIF")])
def test_a_missing_image_says_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(ImageError, match="no such image") as caught:
        find_image(name, {"HPCUTILS_IMAGES": str(tmp_path)})
    assert caught.value.hint is not None and hint in caught.value.hint


def test_exec_line() -> None:
    argv = exec_argv("/i/a.sif", [bind("/data", read_only=True), bind("/run 1", "/run")], {"A": "1"}, True, cwd="/run")
    assert argv == [
        *("apptainer", "--quiet", "exec", "--no-home", "--no-mount", "cwd", "--pwd", "/run", "--no-eval", "--nv"),
        *("--bind", "/data:/data:ro", "--bind", "/run 1:/run"),
        *("--env", "OMPI_MCA_btl_vader_single_copy_mechanism=none", "--env", "PMIX_MCA_gds=hash"),
        *("--env", "PYTHONPATH=", "--env", "PYTHONHOME=", "--env", "PYTHONNOUSERSITE=1"),
        *("--env", "A=1", "/i/a.sif"),
    ]


def test_the_callers_variables_win() -> None:
    argv = exec_argv("a.sif", env={"PYTHONPATH": "/code"})
    assert "PYTHONPATH=/code" in argv and "PYTHONPATH=" not in argv


@pytest.mark.parametrize("path", ["relative", "/a,b", "/a:b", "/a\nb", '/a"b'])
def test_a_path_that_apptainer_would_misread_is_refused(path: str) -> None:
    with pytest.raises(RequestError, match="cannot be bound"):
        bind(path)


def test_a_listing_of_apptainer_is_read() -> None:
    listing = (
        "------------------------------------------------------------------------------\n"
        "ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE\n"
        "------------------------------------------------------------------------------\n"
        "1    |1       |NONE    |32176-33466               |Def.FILE\n"
        "3    |1       |NONE    |36864-530223104           |FS (Squashfs/*System/amd64)\n"
    )
    assert parse_listing(listing) == [
        SifObject(1, "Def.FILE", 32176, 33466),
        SifObject(3, "FS (Squashfs/*System/amd64)", 36864, 530223104),
    ]


def test_the_name_of_an_object_is_read() -> None:
    said = "  ID:        2\n  Type:      JSON.Generic\n  Name:      inspect-metadata.json\n"
    assert parse_name(said) == "inspect-metadata.json"
    for bad in ("  ID: 2\n", "  Name: ../../etc/passwd\n"):
        with pytest.raises(ImageError, match="no name"):
            parse_name(bad)


def test_exec_line_of_docker() -> None:
    argv = docker_argv("a:1", [bind("/data", read_only=True)], {"A": "1", "PMIX_RANK": "7"}, True, user="1000:100", cwd="/run")
    lines = "\n".join(argv) + "\n"
    assert_golden("docker.txt", lines)
    assert "PMIX_RANK=7" in argv and "PMIX_RANK" not in argv


def test_exec_line_of_podman() -> None:
    argv = docker_argv("a:1", (), None, True, user="1000:100", program="podman", variant="rocm")
    assert_golden("podman.txt", "\n".join(argv) + "\n")


def test_options_of_pyxis() -> None:
    options, variables = pyxis_options("docker://registry.example#a:1", [bind("/data", read_only=True)], {"A": "1"}, cwd="/run")
    assert_golden("pyxis.txt", "\n".join([*options, *(f"{name}={value}" for name, value in variables.items())]) + "\n")
    with pytest.raises(RequestError, match="comma"):
        pyxis_options("a", ["/a,b:/c"])


def test_pyxis_hands_gpus_in_where_they_are_asked_for() -> None:
    options, variables = pyxis_options("a", gpu=True)
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all" and variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_VISIBLE_DEVICES" in options[-1]
    for words in (pyxis_options("a"), pyxis_options("a", gpu=True, variant="rocm")):
        assert "NVIDIA_VISIBLE_DEVICES" not in words[1]


CALLERS = {
    "kept": ("HOME", "PATH", "LANG", "LC_ALL", "TMPDIR", "SLURM_PROCID", "SLURMD_NODENAME", "PMI_RANK", "PMIX_RANK", "PMIX_MCA_x"),
    "kept too": ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "UCX_TLS", "HPCUTILS_SCRATCH", "SUBMITIT_EXECUTOR", "APPTAINER_BIND"),
    "left out": ("KERAS_BACKEND", "LD_PRELOAD", "OMPI_MCA_btl", "OMPI_COMM_WORLD_RANK", "PYTHONPATH", "TF_XLA_FLAGS"),
}


def test_of_the_callers_environment_a_container_sees_what_is_listed() -> None:
    everything = {name: "x" for names in CALLERS.values() for name in names}
    assert set(passed_on(everything)) == {*CALLERS["kept"], *CALLERS["kept too"]}


def test_a_batch_script_leaves_the_ranks_the_same() -> None:
    """The lines themselves, run by bash."""
    everything = {name: "x" for names in CALLERS.values() for name in names if name != "LD_PRELOAD"}
    everything |= {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "LANG": "C"}
    script = "\n".join([*environment_lines(), "env"])
    done = subprocess.run(["bash", "-c", script], env=everything, capture_output=True, text=True, check=True)
    seen = {line.partition("=")[0] for line in done.stdout.splitlines()} - {"_", "SHLVL", "PWD", "OLDPWD"}
    assert done.stderr == "" and seen == {*CALLERS["kept"], *CALLERS["kept too"]}


def test_rocm_has_a_flag_of_its_own() -> None:
    assert "--rocm" in exec_argv("a.sif", gpu=True, variant="rocm") and "--nv" in exec_argv("a.sif", gpu=True, variant="cpu")


def assert_golden(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("HPCUTILS_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
