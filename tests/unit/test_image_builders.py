"""Which builder is taken, and what is said of the others: with programs that are shell scripts, on a machine made of values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcutils.errors import ImageError, MissingPartError
from hpcutils.image import builders
from hpcutils.image.builders import Facts, Finding, choose, explain, file_system_of, look_at, look_for_builders, version_in
from hpcutils.image.layers import show, versions
from hpcutils.image.oci import Engine

GOOD = Facts(None, 65536, True, Path("/tmp"), "ext4", 50 << 30)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("hpcutils.image.find.OWN_BUILDER", tmp_path / "none")
    return tmp_path


def test_nothing_is_installed(path: Path) -> None:
    findings = look_for_builders("docker", GOOD)
    assert [(finding.name, finding.why) for finding in findings] == [(n, "not installed") for n in ("docker", "buildah", "podman")]
    with pytest.raises(MissingPartError, match="no builder is installed") as caught:
        choose(findings)
    assert "apt-get install buildah" in (caught.value.hint or "")
    with pytest.raises(MissingPartError) as caught:
        choose(look_for_builders("apptainer", GOOD))
    assert "containers/install-apptainer" in (caught.value.hint or "")


def test_a_client_without_an_engine_is_passed_over_and_the_choice_is_explained(path: Path) -> None:
    program(path, "docker", '[ "$1" = --version ] && echo "Docker version 28.2.2" && exit\necho "no daemon is running" >&2; exit 1')
    program(path, "buildah", 'echo "buildah version 1.28.2 (image-spec 1.0.2)"')
    findings = look_for_builders("docker", GOOD)
    chosen = choose(findings)
    assert (chosen.name, chosen.version) == ("buildah", "1.28.2")
    said = explain(chosen, findings)
    assert "built by buildah 1.28.2: user namespaces with 65536 ids, /dev/fuse there, 50 GiB free in /tmp (ext4)" in said
    assert "docker: a client without an engine: no daemon is running" in said and "podman: not installed" in said


def test_docker_with_an_engine_and_buildx_is_taken(path: Path) -> None:
    program(path, "docker", 'echo "Docker version 28.2.2"')
    assert look_at("docker", "docker", GOOD).works
    program(path, "docker", '[ "$1" = buildx ] && exit 1; echo 28.2.2')
    assert look_at("docker", "docker", GOOD).why == "it has no buildx"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"problem": ("user a cannot have a user namespace", "as root: usermod")}, "user a cannot have a user namespace"),
        ({"free_bytes": 1 << 30}, "/tmp has 1.0 GiB free, a build needs 6"),
    ],
)
def test_a_machine_on_which_nothing_can_build(path: Path, change: dict[str, object], why: str) -> None:
    program(path, "apptainer", "echo apptainer version 1.4.5")
    findings = look_for_builders("apptainer", dataclasses.replace(GOOD, **change))  # type: ignore[arg-type]
    with pytest.raises(ImageError) as caught:
        choose(findings)
    assert why in caught.value.message and "apptainer" in caught.value.message


def test_the_hint_of_a_machine_without_rights_says_what_to_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(path, "apptainer", "echo apptainer version 1.4.5")
    monkeypatch.setattr(builders, "rights_problem", lambda: ("no range of ids", "usermod --add-subuids"))
    facts = dataclasses.replace(GOOD, problem=builders.rights_problem())
    with pytest.raises(ImageError) as caught:
        choose(look_for_builders("apptainer", facts))
    assert caught.value.hint == "usermod --add-subuids"


def test_a_buildx_that_cannot_write_archives_is_passed_over(path: Path) -> None:
    script = 'case "$*" in "buildx inspect") echo "Driver:        {}" ;; *DriverStatus*) echo "{}" ;; *) echo 28.2.2 ;; esac'
    program(path, "docker", script.format("docker", "[[Backing Filesystem extfs]]"))
    found = look_at("docker", "docker", GOOD)
    assert not found.works and "cannot write OCI archives" in found.why and "buildx create" in found.why
    program(path, "docker", script.format("docker-container", "[]"))
    assert look_at("docker", "docker", GOOD).works
    program(path, "docker", script.format("docker", "[[driver-type io.containerd.snapshotter.v1]]"))
    assert look_at("docker", "docker", GOOD).works


def test_docker_is_passed_over_for_an_image_on_an_archive(path: Path) -> None:
    program(path, "docker", "echo 28.2.2")
    program(path, "buildah", 'echo "buildah version 1.28.2"')
    assert choose(look_for_builders("docker", GOOD)).name == "docker"
    findings = look_for_builders("docker", GOOD, on_archive=True)
    assert choose(findings).name == "buildah"
    with pytest.raises(ImageError, match="it cannot build on an archive"):
        choose(findings, "docker")


def test_singularity_can_be_asked_for(path: Path) -> None:
    program(path, "singularity", "echo singularity-ce version 4.1.0")
    assert choose(look_for_builders("apptainer", GOOD), "singularity").version == "4.1.0"
    with pytest.raises(MissingPartError, match="'buildah' does not build this format") as caught:
        choose(look_for_builders("apptainer", GOOD), "buildah")
    assert "apptainer, singularity" in (caught.value.hint or "")


def test_versions_are_asked_only_of_tools_that_are_needed(path: Path) -> None:
    program(path, "mksquashfs", "echo mksquashfs version 4.5.1; exit 1")
    assert versions("apptainer", "1.4", ("mksquashfs",)) == {"apptainer": "1.4", "mksquashfs": "mksquashfs version 4.5.1"}
    assert versions("buildah", "1.28", ()) == {"buildah": "1.28"}


@pytest.mark.parametrize("line", ["step: system packages", "#8 0.312 step: system packages"])
def test_steps_of_every_builder_are_told(line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        show(line)
        show("STEP 3/9: RUN set -eu; echo 'step: system packages'")
    assert caplog.messages == ["  system packages"]


def test_one_that_is_too_old_is_passed_over(path: Path) -> None:
    program(path, "buildah", 'echo "buildah version 1.19.6"')
    assert look_at("buildah", "docker", GOOD).why == "too old: 1.26 or newer is needed"


def test_the_builder_that_is_wanted_is_taken_or_nothing(path: Path) -> None:
    findings = (Finding("buildah", "docker", "/b", "1", True, "w"), Finding("podman", "docker", "/p", "4", True, "w"))
    assert choose(findings, "podman").name == "podman"
    with pytest.raises(MissingPartError):
        choose(findings, "kaniko")


def test_a_network_file_system_is_said_to_be_slow() -> None:
    assert "(lustre, which is slow with many small files)" in dataclasses.replace(GOOD, file_system="lustre").describe()


def test_the_file_system_of_a_folder() -> None:
    mounts = "/dev/a / ext4 rw 0 0\nb /scratch lustre rw 0 0\ntmpfs /scratch/tmp tmpfs rw 0 0\nc /scratch/tmp xfs rw 0 0\n"
    assert file_system_of(Path("/home/a"), mounts) == "ext4"
    assert file_system_of(Path("/scratch/a"), mounts) == "lustre"
    assert file_system_of(Path("/scratch/tmp"), mounts) == "xfs"
    assert file_system_of(Path("/scratchy"), mounts) == "ext4"


@pytest.mark.parametrize(("text", "version"), [("apptainer version 1.4.5-2", (1, 4, 5)), ("v1.26", (1, 26)), ("none", ())])
def test_versions_are_found_in_answers(text: str, version: tuple[int, ...]) -> None:
    assert version_in(text) == version


def test_buildah_and_podman_keep_everything_in_the_folder_of_the_build(tmp_path: Path) -> None:
    for name in ("buildah", "podman"):
        engine = Engine(name, f"/usr/bin/{name}", tmp_path)
        assert engine.build_words("localhost/a:latest", tmp_path / "a.oci.tar") == [
            *(
                f"/usr/bin/{name}",
                "--root",
                f"{tmp_path}/storage",
                "--runroot",
                f"{tmp_path}/storage-run",
                "--storage-driver",
                "vfs",
            ),
            *("build", "--isolation", "chroot", "--format", "oci", "--tag", "localhost/a:latest"),
            *("--file", f"{tmp_path}/context/Dockerfile"),
            *("--build-context", f"build={tmp_path}/mnt", "--build-context", f"code={tmp_path}/code", f"{tmp_path}/context"),
        ]
        assert engine.save_words("localhost/a:latest", tmp_path / "a.oci.tar")[-4:] == [
            *("push", "--quiet", "localhost/a:latest", f"oci-archive:{tmp_path}/a.oci.tar:localhost/a:latest"),
        ]


def test_an_engine_reaches_registries_as_the_site_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    environment = Engine("buildah", "buildah", tmp_path, {"https_proxy": "http://proxy.example:1"}).environment()
    assert environment["https_proxy"] == "http://proxy.example:1" and environment["TMPDIR"] == str(tmp_path)
    assert "SLURM_PROCID" not in environment


def test_docker_writes_the_archive_itself(tmp_path: Path) -> None:
    engine = Engine("docker", "docker", tmp_path)
    assert engine.build_words("a", tmp_path / "a.oci.tar") == [
        *("docker", "buildx", "build", "--progress", "plain", "--file", f"{tmp_path}/context/Dockerfile"),
        *("--build-context", f"build={tmp_path}/mnt", "--build-context", f"code={tmp_path}/code"),
        *("--output", f"type=oci,dest={tmp_path}/a.oci.tar", f"{tmp_path}/context"),
    ]
    assert engine.save_words("a", tmp_path / "a.oci.tar") == []
