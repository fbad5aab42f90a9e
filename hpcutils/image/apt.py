"""An index of Debian's packages of our own: what a mirror has, and what apt would install, asked as an ordinary user.

apt reads and writes nothing but a folder of this module's: neither the machine's own settings nor its installed packages count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcutils.errors import ImageError
from hpcutils.image.caller import plain_environment
from hpcutils.image.machine import Machine, apt_options, proxies, sources_text, without_addresses
from hpcutils.shell import run

UPDATE_S = 300.0
ANSWER_S = 60.0
# What mmdebstrap's smallest variant with apt has, before any package is asked for.
MINIMAL = ("?essential", "?priority(required)", "apt")
# A version that is locked goes before all others, older or newer; in a build nothing else may be installed at all.
LOCKED_PRIORITY = 1001
NOTHING_ELSE = "Package: *\nPin: release *\nPin-Priority: -1\n"


@dataclass(frozen=True)
class Index:
    """The packages of one suite, as this machine's mirrors have them now.

    Args:
        folder: Where apt keeps its lists.
        environment: What apt is started with.
    """

    folder: Path
    environment: Mapping[str, str]

    def available(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the versions of each package that can be had, the newest first."""
        found: dict[str, list[str]] = {}
        asked = self._ask("apt-cache", "madison", *sorted(names))
        for line in asked.splitlines():
            name, version, _ = (part.strip() for part in line.split("|"))
            found.setdefault(name, []).append(version)
        return {name: tuple(dict.fromkeys(versions)) for name, versions in found.items()}

    def installs(self, packages: Sequence[str], installed: str, preferred: Mapping[str, str]) -> dict[str, str]:
        """Return what apt would install for `packages`, with versions.

        Args:
            packages: What is asked for.
            installed: dpkg's status of what is there already.
            preferred: Versions to take where nothing speaks against them.

        Raises:
            ImageError: They cannot be had together.
        """
        if not packages:
            return {}
        (self.folder / "status").write_text(installed, encoding="utf-8")
        (self.folder / "preferences").write_text(preferences(preferred, only=False), encoding="utf-8")
        said = self._ask("apt-get", "install", "--simulate", "--quiet", "--no-install-recommends", *packages)
        return dict(re.findall(r"^Inst (\S+) (?:\[\S*\] )?\((\S+)", said, re.MULTILINE))

    def status(self, versions: Mapping[str, str]) -> str:
        """Return dpkg's status of a system that has these packages and no others."""
        (self.folder / "status").write_text("", encoding="utf-8")
        said = self._ask("apt-cache", "show", *(f"{name}={version}" for name, version in sorted(versions.items())))
        return re.sub(r"^(Package: .*\n)", r"\1Status: install ok installed\n", said, flags=re.MULTILINE)

    def _ask(self, *words: str) -> str:
        done = run(words, env=self.environment, check=False, timeout_s=ANSWER_S, error=ImageError)
        if done.returncode != 0:
            said = without_addresses(done.stderr.strip() or done.stdout.strip())
            raise ImageError(f"apt cannot do what the recipe asks for:\n{said}", "are the packages' names right?")
        return done.stdout


def open_index(folder: Path, machine: Machine, suite: str) -> Index:
    """Fetch the lists of a suite's packages into `folder`, which takes some seconds.

    Raises:
        ImageError: No mirror answers.
        MissingPartError: There is no apt on this machine.
    """
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    # An address can have a password in it.
    (folder / "sources.list").touch(mode=0o600)
    (folder / "sources.list").write_text(sources_text(machine, suite), encoding="utf-8")
    (folder / "status").touch()
    (folder / "apt.conf").touch(mode=0o600)
    (folder / "apt.conf").write_text("".join(f"{line}\n" for line in _settings(folder, machine)), encoding="utf-8")
    environment = plain_environment(APT_CONFIG=str(folder / "apt.conf"), LC_ALL="C", **proxies(machine))
    done = run(["apt-get", "update", "--quiet"], env=environment, check=False, timeout_s=UPDATE_S, error=ImageError)
    if done.returncode != 0:
        said = without_addresses(done.stderr.strip())
        raise ImageError(f"the lists of Debian's packages could not be fetched:\n{said}", "see apt's sources of this machine")
    return Index(folder, environment)


def _settings(folder: Path, machine: Machine) -> list[str]:
    places = {
        "Dir::Etc::SourceList": "sources.list",
        "Dir::Etc::Preferences": "preferences",
        "Dir::State": "state",
        "Dir::State::status": "status",
        "Dir::Cache": "cache",
        "Dir::Log": "log",
    }
    nothing = [f'Dir::Etc::{name} "/dev/null";' for name in ("Main", "Parts", "SourceParts", "PreferencesParts")]
    ours = [f'{key} "{folder / name}";' for key, name in places.items()]
    return [*nothing, *ours, 'Acquire::Languages "none";', 'APT::Sandbox::User "";', *apt_options(machine)]


def preferences(versions: Mapping[str, str], *, only: bool) -> str:
    """Return apt's preferences for the versions of a lock. Pure.

    Args:
        versions: Version by name.
        only: Whether apt may install nothing but these; a package that is not listed then has no candidate.
    """
    pins = [
        f"Package: {name}\nPin: version {version}\nPin-Priority: {LOCKED_PRIORITY}\n" for name, version in sorted(versions.items())
    ]
    return "\n".join([*([NOTHING_ELSE] if only else []), *pins])


def installed_versions(status: str) -> dict[str, str]:
    """Return the packages in the text of dpkg's status. Pure."""
    found = {}
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return found
