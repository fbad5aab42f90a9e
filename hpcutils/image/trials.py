"""Testing an image that is finished, at any time: on this machine, or over the nodes of a cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.image.builders import choose, gather_facts, look_for_builders
from hpcutils.image.caller import plain_environment
from hpcutils.image.exec_line import bind, exec_argv, passed_on
from hpcutils.image.find import Image, find_builder
from hpcutils.image.machine import this_machine
from hpcutils.image.oci import Engine, entering
from hpcutils.image.selftest import TEST_ENVIRONMENT, Report, run_self_tests, slurm_words
from hpcutils.image.workspace import workspace
from hpcutils.specs.site import Launch, Site

# Ranks of a test may outnumber the cores: waiting ones must not spin. (In one container mpirun is told so.)
RANK_ENVIRONMENT = {"OMPI_MCA_mpi_yield_when_idle": "1"}
TEST_VARIABLE, GPU_VARIABLE = "HPCUTILS_TEST_FOLDER", "HPCUTILS_TEST_GPU"
GPU_VARIANTS = ("cuda", "rocm")


def variant_of(image: Image) -> str:
    """Return what kind of machine an image is for."""
    return str(image.sidecar.get("variant", "cpu"))


def expects_gpu(image: Image, asked: bool | None) -> bool:
    """Return whether a GPU has to be seen: where the variant has one, unless somebody says otherwise."""
    return variant_of(image) in GPU_VARIANTS if asked is None else asked


def try_here(image: Image, *, gpu: bool | None = None) -> Report:
    """Run an image's self-tests on this machine, their ranks inside one container.

    Args:
        image: A SIF, or an OCI archive, which buildah, podman or Docker runs.
        gpu: Whether a GPU is handed in, and expected; left out, the variant says it.

    Raises:
        ImageError: No program here can run it, or a test did not come to its end.
    """
    if image.path.name.endswith(".oci.tar"):
        return _try_archive(image, gpu=bool(gpu))
    check_is_sif(image)
    wanted = expects_gpu(image, gpu)
    env = {**TEST_ENVIRONMENT, **({GPU_VARIABLE: "1"} if wanted else {})}
    enter = exec_argv(image.path, (), env, wanted, program=find_builder(), variant=variant_of(image))
    return run_self_tests(enter, plain_environment())


def _try_archive(image: Image, *, gpu: bool) -> Report:
    """Run the self-tests of an archive as whoever gets it will see it."""
    if gpu:
        raise ImageError(f"{image.path}: GPUs are handed to a SIF alone", f"apptainer build image.sif oci-archive:{image.path}")
    temporary = this_machine().temporary()
    found = choose(look_for_builders("docker", gather_facts(temporary)))
    with workspace(temporary) as folder:
        engine = Engine(found.name, found.program, folder)
        with entering(engine, image.path) as enter:
            return run_self_tests(enter, engine.environment())


def try_on_cluster(image: Image, site: Site, nodes: int, ranks: int, partition: str | None, *, gpu: bool | None = None) -> Report:
    """Run an image's self-tests over nodes of a cluster: `ranks` containers a node, connected by the cluster's own launcher.

    The working folder has to be on a file system that the nodes share: the ranks write one HDF5 file there. Where a GPU is
    expected, Slurm is asked for one a rank.
    """
    check_is_sif(image)
    wanted, chosen = expects_gpu(image, gpu), partition or site.launch.partition
    options = [] if chosen is None else [f"--partition={chosen}"]
    options += gpu_options(site.launch, nodes, ranks) if wanted else []
    with tempfile.TemporaryDirectory(prefix=".hpcutils-test-", dir=Path.cwd()) as folder:
        said = {TEST_VARIABLE: folder, **({GPU_VARIABLE: "1"} if wanted else {})}
        env = {**site.container.environment, **TEST_ENVIRONMENT, **RANK_ENVIRONMENT, **said}
        binds = (*site.container.binds, bind(folder))
        enter = exec_argv(image.path, binds, env, wanted, program=site.container.program, variant=variant_of(image))
        return run_self_tests(enter, passed_on(os.environ), slurm_words(nodes, ranks, options, site.launch.mpi))


def gpu_options(launch: Launch, nodes: int, ranks: int) -> Sequence[str]:
    """Return how srun is asked for one GPU a rank, in the site's dialect. Pure."""
    kind = "" if launch.gpu_type is None else f"{launch.gpu_type}:"
    spelled = {
        "gpus-per-node": [f"--gpus-per-node={kind}{ranks}"],
        "gres": [f"--gres=gpu:{kind}{ranks}"],
        "gpus": [f"--gpus={kind}{ranks * nodes}"],
        "gpus-per-task": [f"--gpus-per-task={kind}1"],
        "none": [],
    }
    return spelled[launch.gpus]


def check_is_sif(image: Image) -> None:
    """Raise `ImageError` for what Apptainer cannot run."""
    if image.path.suffix != ".sif":
        raise ImageError(f"{image.path} is no SIF", f"apptainer build image.sif oci-archive:{image.path}")
