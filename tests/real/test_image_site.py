"""An image for a whole cluster: the administrator's guide, followed line by line, and what submitting then refuses."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Cluster, own

from hpcutils.errors import ImageError
from hpcutils.image.find import find_builder
from hpcutils.specs.site import parse_site

pytestmark = [pytest.mark.slurm, pytest.mark.apptainer]

GUIDE = ROOT / "docs/guides/standard-image.md"


def commands(guide: Path) -> list[str]:
    """Return the commands of a guide: its indented lines."""
    return [line.strip() for line in guide.read_text().splitlines() if line.startswith("    ")]


class Administrator:
    """Somebody who follows the guide, with folders of their own in place of the cluster's."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folder = cluster.home / "administrator"
        self.folder.mkdir()
        (self.folder / "keys").mkdir(mode=0o700)
        own(self.folder)
        self.site = self.folder / "site.toml"
        self.done: list[str] = []
        self.replaced = {
            "/etc/hpcutils/site.toml": str(self.site),
            "/apps/images": str(self.folder / "images"),
            # Asked for on the terminal otherwise.
            "key newpair": "key newpair --name admin --email admin@site.example --comment c --password secret --push=false",
        }

    def run(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.done.append(command)
        for old, new in self.replaced.items():
            command = command.replace(old, new)
        variables = {"APPTAINER_KEYSDIR": self.folder / "keys", "HPCUTILS_SIGN_PASSPHRASE": "secret"}
        exports = "; ".join(f"export {name}={shlex.quote(str(value))}" for name, value in variables.items())
        site = f"export HPCUTILS_SITE_CONFIG={self.site}; " if self.site.exists() or "publish" in command else ""
        program = command.replace("apptainer ", f"{find_builder()} ", 1) if command.startswith("apptainer ") else command
        return self.cluster.run("bash", "-c", f"{exports}; {site}{program}", cwd=self.folder, check=check)

    def submit(self, job: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        line = f"cd {job} && HPCUTILS_SITE_CONFIG={self.site} hpcutils submit train.yaml --image standard --dry-run"
        return self.cluster.run("bash", "-c", line, cwd=job, check=check)


def test_a_standard_image_for_the_cluster(cluster: Cluster, image: str) -> None:
    admin, job = Administrator(cluster), cluster.job("standard")
    wanted = commands(GUIDE)
    build, test, newpair, export, dry_run, publish, deprecate, withdraw, verify, sbom, diff = wanted
    # Built on the machine itself by the fixture: the cluster's hosts have no network to build over.
    assert build == f"hpcutils build {image}"
    admin.done.append(build)
    said = admin.run(test).stdout
    assert "ok      ranks: 4 ranks on 2 node(s)" in said and "ok      parallel HDF5" in said and "FAILED" not in said
    assert list(admin.folder.glob(".hpcutils-test-*")) == []
    admin.run(newpair)
    admin.run(export)
    admin.run(dry_run)
    assert not (admin.folder / "images").exists() and not admin.site.exists()
    admin.run(publish)
    published = parse_site(admin.site.read_text(), "site.toml").images["standard"]
    assert published.key == str(admin.folder / "images/standard.asc")
    assert published.path in admin.submit(job).stdout

    admin.run(deprecate)
    assert "is deprecated: take standard-2: Keras 3.16" in admin.submit(job).stderr
    admin.run(withdraw)
    refused = admin.submit(job, check=False)
    assert refused.returncode == ImageError.exit_code and "was withdrawn: NCCL hangs on the new switches" in refused.stderr

    admin.run("hpcutils image publish standard --status current")
    assert "(signed, current)" in admin.run(verify).stdout
    admin.run(sbom)
    bill = json.loads((admin.folder / "standard.cdx.json").read_text())
    assert {"numpy", "horovod", "openmpi-bin"} <= {component["name"] for component in bill["components"]}
    # The signature is no file of the image.
    assert admin.run(diff).stdout == "no difference\n"
    assert [line for line in admin.done if line in wanted] == wanted

    check_that_altered_images_are_refused(admin, job, Path(published.path))


def check_that_altered_images_are_refused(admin: Administrator, job: Path, image: Path) -> None:
    """One changed byte; a file signed by nobody, or by somebody else, under the entry's own sha256."""
    text, size = admin.site.read_text(), image.stat().st_size
    with image.open("r+b") as stream:
        stream.seek(size // 2)
        byte = stream.read(1)
        stream.seek(size // 2)
        stream.write(bytes([byte[0] ^ 1]))
    refused = admin.submit(job, check=False)
    assert refused.returncode == ImageError.exit_code and "is not the file that was published as 'standard'" in refused.stderr
    # Whoever changes the entry, too, still lacks the key.
    changed = refused.stderr.split("its sha256 is ")[1].split(",")[0]
    admin.site.write_text(text.replace(parse_site(text, "a").images["standard"].sha256, changed))
    refused = admin.submit(job, check=False)
    assert refused.returncode == ImageError.exit_code and "its signature does not hold" in refused.stderr
