"""What an image costs: a build with nothing to do, one after a change of code, and what is in the file.

python -m benchmarks.bench_images        (as root; builds as the sandbox's ordinary user; the image must be built)

Beside them: the cheapest question that Apptainer answers of an image, and what one would do by hand after a change of code,
`apptainer build` on top of the environment (`Bootstrap: localimage`).
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import statistics
import subprocess
from pathlib import Path

from benchmarks.harness import compare
from hpcutils.image.find import find_builder
from hpcutils.image.listing import breakdown

ROOT = Path(__file__).parents[1]
USER = "hpcuser"
NAME = "tf-horovod-cpu"
BY_HAND = "Bootstrap: localimage\nFrom: {environment}\n\n%files\n    {code} /hpcutils-src/hpcutils\n"
RUNS = 5


def as_user(*words: str, **environ: str) -> str:
    argv = [str(ROOT / "slurm/sandbox"), "user", "--", "env", *(f"{name}={value}" for name, value in environ.items()), *words]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout


def cpu_s(*words: str) -> float:
    """Return user and system seconds of a command of the ordinary user's."""
    timer = "import os, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); t = os.times()"
    return float(as_user("python", "-c", f"{timer}; print(t.children_user + t.children_system)", *words).splitlines()[-1])


def nothing_to_do(image: Path) -> None:
    ours, peer = ["hpcutils", "build", NAME], [find_builder(), "inspect", "--json", str(image)]
    pairs = [(cpu_s(*ours), cpu_s(*peer)) for _ in range(RUNS)]
    own_s, peer_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"nothing to do: CPU time of hpcutils build {own_s:.2f} s (limit 0.5), of apptainer inspect {peer_s:.2f} s")


def after_a_change(home: Path, image: Path) -> None:
    """Each of our builds gets other code, so that none is up to date; both write a SIF with the same files."""
    shutil.copytree(ROOT / "hpcutils", home / "code/hpcutils", ignore=shutil.ignore_patterns("__pycache__"))
    mark, images = home / "code/hpcutils/mark.py", home / "images"
    environment = next(
        path for path in sorted((image.parents[1] / "layers").glob(f"{NAME}-*.sif"), key=os.path.getmtime, reverse=True)
    )
    (home / "by-hand.def").write_text(BY_HAND.format(environment=environment, code=home / "code/hpcutils"))
    give_away(home)
    variables = {"PYTHONPATH": str(home / "code"), "HPCUTILS_CONTAINERS": str(ROOT / "containers"), "HPCUTILS_IMAGES": str(images)}
    number = 0

    def ours() -> None:
        nonlocal number
        number += 1
        mark.write_text(f"MARK = {number}\n")
        as_user("hpcutils", "build", NAME, **variables)
        shutil.rmtree(images)

    def by_hand() -> None:
        as_user(find_builder(), "build", "--force", str(home / "by-hand.sif"), str(home / "by-hand.def"))

    compare("a change of code, tested", ours, {"apptainer build localimage, untested": by_hand}, repeats=2)


def give_away(folder: Path) -> None:
    entry = pwd.getpwnam(USER)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, entry.pw_uid, entry.pw_gid)


def main() -> None:
    built = json.loads(as_user("hpcutils", "build", NAME, "--json"))
    image = Path(built["path"])
    seconds = json.loads(image.with_suffix(".json").read_text())["seconds"]
    print(f"{image.name}: {built['size_bytes'] / 1e6:.0f} MB; made in {seconds} (layers that were there already are not named)")
    print("\n".join(breakdown(json.loads(as_user("hpcutils", "image", "show", NAME, "--sizes", "--json"))["sizes"])))
    nothing_to_do(image)
    home = Path(pwd.getpwnam(USER).pw_dir) / f"bench-images-{os.getpid()}"
    home.mkdir()
    try:
        after_a_change(home, image)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
