"""The base of an image: Debian, bootstrapped from its packages as an ordinary user. Pure: argument lists only."""

from __future__ import annotations

import shlex
from pathlib import Path

from hpcutils.specs.recipe import DebianBase

# The image's own sources.list: where packages come from is the affair of the machine that builds, or installs more.
NO_SOURCES = "# Debian {suite}, its packages those of a lock: no server is named here. Add one to install more."
# Manuals and translations; licences stay.
LEFT_OUT = ("/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/doc/*")
KEPT = ("/usr/share/doc/*/copyright",)


def bootstrap_options(base: DebianBase) -> tuple[str, ...]:
    """Return mmdebstrap's options: all that decides what is in the base."""
    return (
        "--variant=minbase",
        f"--include={','.join(base.packages)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--dpkgopt=path-include={pattern}" for pattern in KEPT),
        # mmdebstrap leaves the builder's mirrors, name and resolver inside; dpkg's logs tell the hour.
        '--customize-hook=rm -f "$1"/etc/apt/sources.list.d/* "$1"/var/log/*.log "$1"/var/log/apt/*',
        f'--customize-hook=echo "{NO_SOURCES.format(suite=base.suite)}" > "$1/etc/apt/sources.list"',
        '--customize-hook=for file in hostname resolv.conf; do : > "$1/etc/$file"; chmod 644 "$1/etc/$file"; done',
    )


def bootstrap_argv(base: DebianBase, sources: Path, archive: Path, settings: Path | None = None) -> list[str]:
    """Return the command that makes the base's archive from what `sources` (a sources.list) offers.

    Run it with `bootstrap_environment`: equal packages then give equal bytes.

    Args:
        base: What is asked for.
        sources: Where packages come from.
        archive: Where the result goes.
        settings: Folder with apt's settings for the time of the bootstrap (`apt.conf`, `preferences`), readable for others.
    """
    hooks = [] if settings is None else list(_passing_settings(settings))
    options = ["--mode=unshare", "--format=tar", *bootstrap_options(base), *hooks]
    return ["mmdebstrap", *options, base.suite, str(archive), str(sources)]


def _passing_settings(settings: Path) -> tuple[str, ...]:
    """apt reads its settings in the folder that becomes the base; nothing of them stays there."""
    places = {"apt.conf": "etc/apt/apt.conf.d/zz-build", "preferences": "etc/apt/preferences.d/build"}
    copies = "; ".join(
        f'! [ -e {shlex.quote(str(settings / name))} ] || cp {shlex.quote(str(settings / name))} "$1/{place}"'
        for name, place in places.items()
    )
    removed = " ".join(f'"$1/{place}"' for place in places.values())
    return f'--setup-hook=mkdir -p "$1/etc/apt/preferences.d"; {copies}', f"--customize-hook=rm -f {removed}"


def bootstrap_environment(base: DebianBase, temporary: Path) -> dict[str, str]:
    """Return the variables that mmdebstrap needs beside a plain environment."""
    return {"SOURCE_DATE_EPOCH": str(base.epoch), "TMPDIR": str(temporary)}
