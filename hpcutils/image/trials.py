"""Testing an image that is finished, at any time: on this machine, or over the nodes of a cluster."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.image.caller import plain_environment
from hpcutils.image.exec_line import bind, exec_argv
from hpcutils.image.find import Image, find_builder
from hpcutils.image.selftest import TEST_ENVIRONMENT, Report, run_self_tests, slurm_words
from hpcutils.specs.site import Site

TEST_VARIABLE, GPU_VARIABLE = "HPCUTILS_TEST_FOLDER", "HPCUTILS_TEST_GPU"


def try_here(image: Image, *, gpu: bool) -> Report:
    """Run an image's self-tests on this machine, their ranks inside one container."""
    check_is_sif(image)
    env = {**TEST_ENVIRONMENT, **({GPU_VARIABLE: "1"} if gpu else {})}
    return run_self_tests(exec_argv(image.path, (), env, gpu, program=find_builder()), plain_environment())


def try_on_cluster(image: Image, site: Site, nodes: int, ranks: int, partition: str | None, *, gpu: bool) -> Report:
    """Run an image's self-tests over nodes of a cluster: `ranks` containers a node, connected by the cluster's own launcher.

    The working folder has to be on a file system that the nodes share: the ranks write one HDF5 file there.
    """
    check_is_sif(image)
    chosen = partition or site.launch.partition
    options = [] if chosen is None else [f"--partition={chosen}"]
    with tempfile.TemporaryDirectory(prefix=".hpcutils-test-", dir=Path.cwd()) as folder:
        env = {**site.container.environment, **TEST_ENVIRONMENT, TEST_VARIABLE: folder, **({GPU_VARIABLE: "1"} if gpu else {})}
        enter = exec_argv(image.path, (*site.container.binds, bind(folder)), env, gpu, program=site.container.program)
        return run_self_tests(enter, dict(os.environ), slurm_words(nodes, ranks, options, site.launch.mpi))


def check_is_sif(image: Image) -> None:
    """Raise `ImageError` for what Apptainer cannot run."""
    if image.path.suffix != ".sif":
        raise ImageError(f"{image.path} is no SIF", "it was tested when it was built; its format is for Docker and its kin")
