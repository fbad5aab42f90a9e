"""site.toml: what is accepted, where it is looked for, and what it changes in a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcutils.errors import RequestError, SpecError
from hpcutils.image.machine import Machine, network
from hpcutils.launch.request import Layout, gpu_request, plan_request
from hpcutils.rundir import RunDirectory
from hpcutils.specs.job import Job, load_job
from hpcutils.specs.site import Launch, Site, load_site, parse_site, site_file

ROOT = Path(__file__).parents[2]

WHOLE = f"""
name = "somewhere"
[launch]
mpi = "pmix_v4"
gpus = "gres"
gpu_type = "a100"
partition = "gpu"
[container]
program = "/opt/apptainer/bin/apptainer"
binds = ["/scratch", "/opt/licences:/licences:ro"]
environment = {{ NCCL_SOCKET_IFNAME = "ib0" }}
[folders]
scratch = "/scratch/$SOMEBODY"
node_local = "/local"
[limits.gpu]
nodes = 4
gpus_per_node = 4
time = "1-00:00:00"
[build]
proxy = "http://proxy.example:3128"
ca_bundle = "/etc/site-ca.pem"
[images.standard]
path = "/apps/images/standard.sif"
sha256 = "{"ab" * 32}"
key = "/apps/images/standard.asc"
status = "deprecated"
note = "take standard-2"
"""


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom the profile's folders are named after: a variable that nobody has set is refused."""
    monkeypatch.setenv("SOMEBODY", "ada")


def digits(**resources: object) -> Job:
    job = load_job(ROOT / "jobs/digits/train.yaml")
    return job.model_copy(update={"resources": job.resources.model_copy(update=resources)})


def request(site: Site, **resources: object) -> tuple[dict, list[str]]:
    planned = plan_request(digits(**resources), RunDirectory(Path("/shared/runs/a")), Path("/i.sif"), Path("/jobs"), site)
    return planned.parameters, list(planned.python_argv)


def test_without_a_file_every_default_holds(tmp_path: Path) -> None:
    assert load_site({"HOME": str(tmp_path), "HPCUTILS_SITE_CONFIG": ""}) == Site()


def test_the_search_path(tmp_path: Path) -> None:
    own = tmp_path / ".config/hpcutils/site.toml"
    own.parent.mkdir(parents=True)
    own.write_text('name = "own"\n')
    (tmp_path / "named.toml").write_text('name = "named"\n')
    environ = {"HOME": str(tmp_path)}
    assert site_file(environ) == own
    assert load_site(environ | {"HPCUTILS_SITE_CONFIG": str(tmp_path / "named.toml")}).name == "named"
    assert site_file(environ | {"HPCUTILS_SITE_CONFIG": ""}) is None
    with pytest.raises(SpecError, match="no such file"):
        site_file(environ | {"HPCUTILS_SITE_CONFIG": str(tmp_path / "gone.toml")})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mpi = "pmix_v4"', 'mpy = "pmix"', "site.toml:4:1: launch.mpy: unknown key; did you mean 'mpi'?"),
        ('gpus = "gres"', 'gpus = "gpu"', "launch.gpus: Input should be"),
        ('sha256 = "ab', 'sha256 = "xy', "images.standard.sha256: "),
        ('path = "/apps/', 'path = "apps/', "images.standard.path: "),
        ('status = "deprecated"', 'status = "old"', "images.standard.status: "),
        ("[images.standard]", '[images."a.sif"]', "would be taken for one"),
        ("nodes = 4", "nodes = 0", "limits.gpu.nodes: "),
        ('time = "1-00:00:00"', 'time = "a day"', "limits.gpu.time: "),
        ("[build]", "[build", "not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_told(old: str, new: str, message: str) -> None:
    assert old in WHOLE
    with pytest.raises(SpecError) as caught:
        parse_site(WHOLE.replace(old, new), "site.toml")
    assert message in str(caught.value)


def test_a_profile_changes_the_request() -> None:
    parameters, argv = request(parse_site(WHOLE, "site.toml"))
    assert parameters["srun_args"][0] == "--mpi=pmix_v4"
    assert parameters["partition"] == "gpu"
    assert parameters["additional_parameters"]["gres"] == "gpu:a100:4" and "gpus_per_node" not in parameters
    assert argv[0] == "/opt/apptainer/bin/apptainer"
    binds = [argv[i + 1] for i, word in enumerate(argv) if word == "--bind"]
    assert binds[:4] == ["/scratch", "/opt/licences:/licences:ro", "/scratch/ada:/scratch/ada", "/local:/local"]
    env = {argv[i + 1] for i, word in enumerate(argv) if word == "--env"}
    assert {"NCCL_SOCKET_IFNAME=ib0", "HPCUTILS_SCRATCH=/scratch/ada", "HPCUTILS_NODE_CACHE=/local"} <= env


def test_a_job_and_a_user_win_over_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCUTILS_NODE_CACHE", "/mine")
    parameters, argv = request(parse_site(WHOLE, "site.toml"), partition="other")
    assert parameters["partition"] == "other"
    assert "HPCUTILS_NODE_CACHE=/local" not in argv


@pytest.mark.parametrize(
    ("dialect", "kind", "asked"),
    [
        ("gpus-per-node", None, {"gpus_per_node": 4}),
        ("gpus-per-node", "a100", {"gpus_per_node": "a100:4"}),
        ("gres", None, {"gres": "gpu:4"}),
        ("gres", "a100", {"gres": "gpu:a100:4"}),
        ("gpus", None, {"gpus": "8"}),
        ("gpus-per-task", None, {"gpus-per-task": "2"}),
        ("none", "a100", {}),
    ],
)
def test_gpu_dialects(dialect: str, kind: str | None, asked: dict[str, object]) -> None:
    site = Site(launch=Launch(gpus=dialect, gpu_type=kind))  # type: ignore[arg-type]
    assert gpu_request(site, Layout(nodes=2, ranks_per_node=2, devices_per_rank=2), 4) == asked


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"nodes": 8, "gpus": 8}, "8 nodes were asked for, partition 'gpu' of somewhere gives at most 4"),
        ({"nodes": 1, "gpus": 8}, "8 GPUs of each node"),
        ({"time": "1-00:00:30"}, "86430 seconds"),
    ],
)
def test_asking_for_more_than_a_partition_gives_is_told_at_once(resources: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(parse_site(WHOLE, "site.toml"), **resources)
    assert message in str(caught.value)
    request(parse_site(WHOLE, "site.toml"), partition="other", **resources)


def test_build_settings_are_variables_that_a_build_reads(tmp_path: Path) -> None:
    (tmp_path / "site-ca.pem").write_text("certificate")
    text = WHOLE.replace("/etc/site-ca.pem", str(tmp_path / "site-ca.pem"))
    machine = Machine({}, tmp_path, tmp_path / "etc", parse_site(text, "site.toml").build)
    assert network(machine) == {
        "http_proxy": "http://proxy.example:3128",
        "https_proxy": "http://proxy.example:3128",
        "SSL_CERT_FILE": str(tmp_path / "site-ca.pem"),
    }
