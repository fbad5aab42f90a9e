"""Lines of the batch script that make a node ready for ranks in containers: folders, and what of the environment goes in.

They run on the job's first node, before srun; what they export every rank gets.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpcutils.errors import RequestError
from hpcutils.image.exec_line import PASSED_ON
from hpcutils.rundir import RunDirectory
from hpcutils.specs.site import Site

# What folders of the site's profile are called in a rank's environment.
FOLDER_VARIABLES = {"scratch": "HPCUTILS_SCRATCH", "node_local": "HPCUTILS_NODE_CACHE"}
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
# Another on each node, or in each rank: the batch script has but one value of it.
OF_ONE_NODE = re.compile(r"SLURM_(PROCID|LOCALID|NODEID|STEP_.*|TASK_PID|LAUNCH_NODE_IPADDR)|SLURMD_NODENAME")


@dataclass(frozen=True)
class SiteFolders:
    """The folders of a site's profile, by the variables that tell a rank of them.

    Args:
        known: Paths that are known now.
        in_job: Words of shell for those that depend on the job (`/local/$SLURM_JOB_ID`).
    """

    known: Mapping[str, str] = field(default_factory=dict)
    in_job: Mapping[str, str] = field(default_factory=dict)


def site_folders(site: Site, environ: Mapping[str, str]) -> SiteFolders:
    """Return the site's folders; one that the user has named in `environ` is the user's own.

    Raises:
        RequestError: A variable in one is not known, or the result is no absolute path.
    """
    known: dict[str, str] = {}
    in_job: dict[str, str] = {}
    for name, text in site.folders:
        variable = FOLDER_VARIABLES[name]
        if text is None or variable in environ:
            continue
        names = [first or second for first, second in VARIABLE.findall(text)]
        _check_variables(f"folders.{name}", text, names, environ)
        target = in_job if any(map(_is_of_a_job, names)) else known
        target[variable] = _in_shell(text, environ) if target is in_job else VARIABLE.sub(lambda m: environ[m[1] or m[2]], text)
        start = re.split(r"\$", text)[0] if target is in_job else known[variable]
        if start and not start.startswith("/"):
            raise RequestError(f"folders.{name} of {site.name}: an absolute path was expected, got {start!r}", "see site.toml")
    return SiteFolders(known, in_job)


def _is_of_a_job(name: str) -> bool:
    """Whether a variable's value is known only in the job: one of a shell that is in a job already would be another job's."""
    return name.startswith("SLURM") or name == "TMPDIR"


def _check_variables(key: str, text: str, names: Sequence[str], environ: Mapping[str, str]) -> None:
    for name in names:
        if OF_ONE_NODE.fullmatch(name):
            raise RequestError(f"{key}: {text}: ${name} is another on each node", "$SLURM_JOB_ID is one for the whole job")
        if not _is_of_a_job(name) and not environ.get(name):
            raise RequestError(f"{key}: {text}: ${name} is not set here, and is none of a job's", "set it, or mend site.toml")


def _in_shell(text: str, environ: Mapping[str, str]) -> str:
    """Return a word of shell: a job's variables are left to it, all else is as it is."""
    parts, end = [], 0
    for match in VARIABLE.finditer(text):
        name = match[1] or match[2]
        value = f'"${{{name}:-}}"' if _is_of_a_job(name) else shlex.quote(environ[name])
        parts += [shlex.quote(text[end : match.start()]) if text[end : match.start()] else "", value]
        end = match.end()
    return "".join([*parts, shlex.quote(text[end:]) if text[end:] else ""])


def give_up_lines(run: RunDirectory) -> list[str]:
    """Lines of a function that ends the job with a message, where `hpcutils status` and a person find it."""
    failure, code = shlex.quote(str(run.failure)), shlex.quote(str(run.exit_code))
    hint = f"see {run.batch_log}".replace("%", "%%")
    told = json.dumps({"rank": None, "node": "%s", "message": "%s", "exit_code": RequestError.exit_code, "hint": hint})
    pattern = shlex.quote(told.replace("\\", "\\\\") + r"\n")
    return [
        "give_up() {",
        '  echo "hpcutils: error: $1" >&2',
        # No quote or backslash of a folder's name may end the text.
        f"""  printf {pattern} "$(uname -n)" "$(tr -d '"\\\\' <<<"$1")" > {failure}""",
        f"  echo {RequestError.exit_code} > {code}.part && mv {code}.part {code}",
        f"  exit {RequestError.exit_code}",
        "}",
    ]


def folder_lines(folders: Sequence[str], in_job: Mapping[str, str]) -> list[str]:
    """Lines that make the named folders on every node, and let a container see them and this node's own.

    Apptainer shows /tmp, and refuses to start where a folder to be shown is not there. Which scratch folder a job has is often
    known only when it runs.
    """
    everywhere = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    names = " ".join([*map(shlex.quote, folders), *(f'"${name}"' for name in in_job)])
    shown = " ".join([*(f'"${name}"' for name in in_job), '"${SLURM_TMPDIR:-}"', '"${TMPDIR:-}"'])
    failed = 'give_up "a folder of the site or the job cannot be made on each node: $*"'
    return [
        *([f"set -- {names}", f'command srun {everywhere} mkdir -p "$@" || {failed}'] if names else []),
        f"for folder in {shown}; do",
        "  case $folder in",
        "    /tmp | /tmp/* | *[,:]*) ;;",
        '    /*) [ ! -d "$folder" ] || export APPTAINER_BIND="${APPTAINER_BIND:+$APPTAINER_BIND,}$folder" ;;',
        "  esac",
        "done",
    ]


def job_folder_lines(in_job: Mapping[str, str]) -> list[str]:
    """Lines that tell the ranks of folders that depend on the job."""
    return [
        line
        for name, word in in_job.items()
        for line in (
            f"export {name}={word}",
            f'case ${name} in *[,:\\"]* | [!/]* | "") give_up "{name}=${name}: an absolute path was expected" ;; esac',
        )
    ]


def environment_lines() -> list[str]:
    """Lines that leave the ranks only what a container is to know of the caller's environment: Apptainer hands on all of it."""
    return [
        "for name in $(compgen -e); do",
        f'  case $name in {" | ".join(PASSED_ON)}) ;; *) unset "$name" 2>/dev/null ;; esac',
        "done",
    ]


def own_folders(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the folders that the user has named."""
    variables = os.environ if environ is None else environ
    return {name: variables[name] for name in FOLDER_VARIABLES.values() if variables.get(name)}
