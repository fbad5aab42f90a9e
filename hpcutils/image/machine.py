"""How the machine that builds reaches its package servers: mirrors, indexes, proxies, certificates.

They are handed to the build in a folder that it sees as `/mnt`, and are no part of the image.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpcutils.errors import ImageError, MissingPartError
from hpcutils.shell import run
from hpcutils.specs.site import Build, load_site

# pip's settings that say where from and how; any other (targets, constraints, user installs) is not for an image.
PIP_KEYS = (
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy"),
    *("timeout", "default-timeout", "retries"),
)
PIP_SECTIONS = ("global", "download", "wheel", "install")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
CERTIFICATE_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
CERTIFICATE_FILES = ("ssl/certs/ca-certificates.crt", "pki/tls/certs/ca-bundle.crt")
# apt's settings of how a mirror is reached, and whether old lists of it are taken (a snapshot's are).
APT_KEYS = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until", "Acquire::Check-Date")
ANSWER_S = 20.0


@dataclass(frozen=True)
class Machine:
    """What the settings are read from: a user's variables win over the user's files, those over the site's profile.

    Args:
        environ: Environment of the caller.
        home: The caller's home.
        etc: The system's configuration.
        site: What the site's profile says.
    """

    environ: Mapping[str, str]
    home: Path
    etc: Path = Path("/etc")
    site: Build = field(default_factory=Build)

    def temporary(self) -> Path:
        """Return the folder for builds.

        Raises:
            ImageError: It is not there.
        """
        named = {"TMPDIR": self.environ.get("TMPDIR"), "build.temporary of site.toml": self.site.temporary}
        key, folder = next(((key, folder) for key, folder in named.items() if folder), ("/tmp", tempfile.gettempdir()))
        if not Path(folder).is_dir():
            raise ImageError(f"{folder}: no such folder, and {key} says that builds use it", "make it, or name another")
        return Path(folder)


@dataclass(frozen=True)
class AptEntry:
    """One line of apt's sources: packages of one vendor and suite."""

    address: str
    suite: str
    components: tuple[str, ...]
    key: str = ""


@dataclass(frozen=True)
class BuildFiles:
    """What the folder `/mnt` of a build gets.

    Args:
        texts: File name → text; not for other users' eyes, as an address may have a password in it.
        copies: File name → file of this machine.
        binds: Folder of this machine → where the build sees it.
    """

    texts: dict[str, str]
    copies: dict[str, Path] = field(default_factory=dict)
    binds: dict[Path, str] = field(default_factory=dict)


def this_machine() -> Machine:
    """Return the machine that this process runs on, with the site's profile."""
    return Machine(os.environ, Path.home(), site=load_site().build)


def build_files(machine: Machine, suite: str) -> BuildFiles:
    """Return the settings that a build for `suite` needs on this machine."""
    certificates = certificate_file(machine)
    copies = {} if certificates is None else {"ca.crt": certificates}
    entries = _sources(machine, suite)
    keys = sorted({entry.key for entry in entries if entry.key.startswith("/")})
    renamed = {key: f"/mnt/keyring-{i}{Path(key).suffix}" for i, key in enumerate(keys)}
    copies |= {Path(renamed[key]).name: Path(key) for key in keys}
    settings, binds = _without_local_folders(pip_settings(machine))
    if certificates is not None:
        settings["cert"] = "/mnt/ca.crt"
    texts = {
        "sources.list": sources_list(entries, suite, renamed),
        "apt.conf": _apt_conf(apt_options(machine, "/mnt/ca.crt")),
        "pip.conf": "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()),
        "settings.sh": _shell_settings(proxies(machine)),
    }
    return BuildFiles(texts, copies, binds)


def sources_text(machine: Machine, suite: str) -> str:
    """Return the sources.list for programs that run on this machine itself."""
    return sources_list(_sources(machine, suite), suite, {})


def _sources(machine: Machine, suite: str) -> list[AptEntry]:
    said = _one_line("\n".join(machine.site.apt_sources))
    return debian_entries(said or apt_entries(machine.etc / "apt"), suite)


def proxies(machine: Machine) -> dict[str, str]:
    """Return the variables that name proxies: the user's where there are any, in the case that the user wrote them."""
    said = {"http_proxy": machine.site.proxy, "https_proxy": machine.site.proxy, "no_proxy": machine.site.no_proxy}
    result: dict[str, str] = {}
    for lower in PROXY_VARIABLES:
        own = {name: machine.environ[name] for name in (lower, lower.upper()) if machine.environ.get(name)}
        result |= own or {name: value for name, value in said.items() if name == lower and value}
    return result


def network(machine: Machine) -> dict[str, str]:
    """Return the variables with which a program reaches registries and indexes from here."""
    certificates = certificate_file(machine)
    # A program of this machine finds the machine's own certificates by itself.
    own = certificates is not None and certificates not in _system_certificates(machine)
    return {**proxies(machine), **({"SSL_CERT_FILE": str(certificates)} if own else {})}


def apt_options(machine: Machine, certificates: str | None = None) -> list[str]:
    """Return the lines of an apt.conf that say how mirrors are reached from here: this machine's own, and its certificates.

    Args:
        machine: What they are read from.
        certificates: Where apt sees the certificates; their place on this machine when left out.
    """
    # The lists of a snapshot are past their date.
    any_age = {"Acquire::Check-Valid-Until": "false"} if machine.site.apt_sources else {}
    lines = [f'{key} "{value}";' for key, value in {**_apt_settings(machine), **any_age}.items()]
    file = certificate_file(machine)
    return lines if file is None else [*lines, f'Acquire::https::CAInfo "{certificates or file}";']


def _apt_settings(machine: Machine) -> dict[str, str]:
    """Ask apt for its settings; on a machine without apt there are none."""
    with tempfile.NamedTemporaryFile("w", prefix="hpcutils-apt-", suffix=".conf") as file:
        file.write(f'Dir::Etc "{machine.etc / "apt"}";\n')
        file.flush()
        try:
            environment = {**machine.environ, "APT_CONFIG": file.name, "LC_ALL": "C"}
            said = run(["apt-config", "dump", *APT_KEYS], env=environment, check=False, timeout_s=ANSWER_S).stdout
        except MissingPartError:
            return {}
    # A key with more below it (`Proxy::host`) is told as `Key::`, and is taken as well.
    found = re.findall(r'^([\w:.-]+) "([^"]*)";$', said, re.MULTILINE)
    return {key: value for key, value in found if value and key.startswith(APT_KEYS)}


def apt_entries(folder: Path) -> list[AptEntry]:
    """Return what apt's sources name, from deb822 files (*.sources) and one-line files (*.list)."""
    parts = folder / "sources.list.d"
    lines = [folder / "sources.list", *sorted(parts.glob("*.list"))]
    entries = [entry for path in sorted(parts.glob("*.sources")) for entry in _deb822(_text(path))]
    return entries + [entry for path in lines for entry in _one_line(_text(path))]


def debian_entries(entries: Iterable[AptEntry], suite: str) -> list[AptEntry]:
    """Return the entries that are Debian's own for `suite`: the release, its updates and its security fixes."""
    suites = {suite, f"{suite}-updates", f"{suite}-security"}
    return [
        entry
        for entry in entries
        if entry.suite in suites and "main" in entry.components and (not entry.key or "debian-archive" in entry.key)
    ]


def sources_list(entries: Iterable[AptEntry], suite: str, renamed: Mapping[str, str]) -> str:
    """Return a sources.list of `entries`, with each key under its new name.

    Raises:
        MissingPartError: There are none: this machine is no Debian, or of another release.
    """
    lines = []
    for entry in entries:
        key = f"[signed-by={renamed.get(entry.key, entry.key)}] " if entry.key else ""
        lines.append(f"deb {key}{entry.address} {entry.suite} main\n")
    if not lines:
        raise MissingPartError(
            f"this machine names no servers of Debian's {suite}",
            "give them in the site's profile: apt_sources of [build] in site.toml, as lines of a sources.list",
        )
    return "".join(dict.fromkeys(lines))


def pip_settings(machine: Machine) -> dict[str, str]:
    """Return how pip reaches its index here: from the site's profile, pip's own files, its variables; later ones win."""
    merged = {"index-url": machine.site.pip_index} if machine.site.pip_index else {}
    for path in _pip_files(machine):
        merged |= _pip_file(path)
    merged |= {name[4:].lower().replace("_", "-"): value for name, value in machine.environ.items() if name.startswith("PIP_")}
    # A setting may have several lines; pip reads words.
    return {key: " ".join(merged[key].split()) for key in PIP_KEYS if key in merged}


def _pip_files(machine: Machine) -> list[Path]:
    named = [Path(machine.environ["PIP_CONFIG_FILE"])] if machine.environ.get("PIP_CONFIG_FILE") else []
    return [machine.etc / "pip.conf", machine.home / ".pip/pip.conf", machine.home / ".config/pip/pip.conf", *named]


def _pip_file(path: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    parser.read_string(_text(path))
    sections = (name for name in PIP_SECTIONS if parser.has_section(name))
    return {key.replace("_", "-"): value for section in sections for key, value in parser.items(section)}


def without_addresses(line: str) -> str:
    """Return a line of a build's output with each server's address left out."""
    return re.sub(r"\b[a-z+]+://[^\s'\"]+", "<address>", line)


def _without_local_folders(settings: Mapping[str, str]) -> tuple[dict[str, str], dict[Path, str]]:
    """Replace folders of this machine (a wheelhouse, a file:// index) by the places where the build will see them."""
    binds: dict[Path, str] = {}
    result = {}
    for key, value in settings.items():
        words = []
        for word in value.split():
            folder = Path(word.removeprefix("file://"))
            if not folder.is_absolute():
                words.append(word)
            elif folder.is_dir():
                inside = binds.setdefault(folder, f"/mnt/local/{len(binds)}")
                words.append(word.replace(str(folder), inside, 1))
        if words:
            result[key] = " ".join(words)
    return result, binds


def _deb822(text: str) -> list[AptEntry]:
    entries = []
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", plain):
        pairs = re.findall(r"^([\w-]+):((?:.*(?:\n[ \t].*)*))", stanza, re.MULTILINE)
        fields = {key.lower(): value.strip() for key, value in pairs}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for address in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                entries.append(AptEntry(address, suite, components, fields.get("signed-by", "")))
    return entries


def _one_line(text: str) -> list[AptEntry]:
    entries = []
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line.strip())
        if match is not None:
            key = re.search(r"signed-by=(\S+)", match[1] or "")
            entries.append(AptEntry(match[2], match[3], tuple(match[4].split()), key[1] if key else ""))
    return entries


def _apt_conf(options: Iterable[str]) -> str:
    lines = [
        'Dir::Etc::SourceList "/mnt/sources.list";',
        'Dir::Etc::SourceParts "/dev/null";',
        # The folder is ours alone; apt's own unprivileged user could not read it.
        'APT::Sandbox::User "root";',
        'Dpkg::Use-Pty "0";',
        *options,
    ]
    return "\n".join(lines) + "\n"


def _shell_settings(proxy_variables: Mapping[str, str]) -> str:
    variables = {
        "APT_CONFIG": "/mnt/apt.conf",
        "PIP_CONFIG_FILE": "/mnt/pip.conf",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_ROOT_USER_ACTION": "ignore",
        **proxy_variables,
    }
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def certificate_file(machine: Machine) -> Path | None:
    """Return the certificates that servers are checked with: the user's, else the site's, else the machine's own."""
    said = [machine.environ[name] for name in CERTIFICATE_VARIABLES if machine.environ.get(name)]
    said += [each["cert"] for path in reversed(_pip_files(machine)) if "cert" in (each := _pip_file(path))]
    said += [machine.site.ca_bundle] if machine.site.ca_bundle else []
    return next((path for path in [*map(Path, said), *_system_certificates(machine)] if path.is_file()), None)


def _system_certificates(machine: Machine) -> list[Path]:
    return [machine.etc / name for name in CERTIFICATE_FILES]


def _text(path: Path) -> str:
    """Return a file's text; one that is not there, or not for us, says nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
