"""What a build takes from the machine: apt's sources in both formats, pip's settings, and nothing more than it needs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcutils.errors import ImageError, MissingPartError
from hpcutils.image.machine import (
    AptEntry,
    Machine,
    apt_entries,
    apt_options,
    build_files,
    certificate_file,
    debian_entries,
    network,
    pip_settings,
    proxies,
    sources_list,
    without_addresses,
)
from hpcutils.specs.site import Build

ROOT = Path(__file__).parents[2]
KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"

DEB822 = f"""\
# The release itself
Types: deb deb-src
URIs: http://mirror.example/debian
 http://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEY}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: {KEY}

Types: deb
URIs: https://vendor.example/apt
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/vendor.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""

ONE_LINE = f"""\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by={KEY}] http://one.example/debian bookworm main non-free # a remark
deb http://bare.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/apt bookworm main
"""


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    folder = tmp_path / "etc/apt"
    (folder / "sources.list.d").mkdir(parents=True)
    return folder


def test_deb822(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    found = debian_entries(apt_entries(apt), "bookworm")
    assert {(entry.address, entry.suite) for entry in found} == {
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://second.example/debian", "bookworm"),
        ("http://second.example/debian", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    }
    assert {entry.key for entry in found} == {KEY}


def test_one_line(apt: Path) -> None:
    (apt / "sources.list").write_text(ONE_LINE)
    found = debian_entries(apt_entries(apt), "bookworm")
    assert found == [
        AptEntry("http://one.example/debian", "bookworm", ("main", "non-free"), KEY),
        AptEntry("http://bare.example/debian", "bookworm", ("main",), ""),
    ]


@pytest.mark.parametrize("file", ["sources.list.d/debian.sources", "sources.list"])
def test_the_installer_reads_the_same_mirrors(apt: Path, file: str) -> None:
    """containers/install-apptainer parses the sources in its own language; it wants the release alone."""
    (apt / file).write_text(DEB822 if file.endswith(".sources") else ONE_LINE)
    script = (ROOT / "containers/install-apptainer").read_text().partition("if use_what_is_there")[0]
    script = script.replace(". /etc/os-release", "VERSION_CODENAME=bookworm")
    done = subprocess.run(
        ["bash", "-c", f"{script}\ndebian_mirrors"], env={"APT_SOURCES": str(apt), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    release = [entry for entry in debian_entries(apt_entries(apt), "bookworm") if entry.suite == "bookworm"]
    assert done.stdout.splitlines() == [f"[signed-by={e.key}] {e.address}" if e.key else e.address for e in release]


def test_a_machine_that_is_no_debian_is_told_where_to_name_servers(apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://archive.example/ubuntu noble main\n")
    with pytest.raises(MissingPartError, match="names no servers of Debian's bookworm") as caught:
        sources_list(debian_entries(apt_entries(apt), "bookworm"), "bookworm", {})
    assert "apt_sources" in (caught.value.hint or "")


def test_pip_reads_files_and_variables_and_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/pip.conf").write_text("[global]\nindex-url = https://a.example/simple\ntimeout = 10\n")
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text("[install]\ntimeout = 20\ntrusted-host =\n    b.example\n    c.example\n")
    environ = {"PIP_INDEX_URL": "https://d.example/simple", "PIP_TARGET": "/somewhere", "PIP_REQUIRE_VIRTUALENV": "1"}
    assert pip_settings(Machine(environ, tmp_path, tmp_path / "etc")) == {
        "index-url": "https://d.example/simple",
        "timeout": "20",
        "trusted-host": "b.example c.example",
    }


SERVERS = Build(apt_sources=("deb https://mirror.example/debian bookworm main",))


def test_local_folders_of_packages_are_shown_to_the_build(tmp_path: Path) -> None:
    house = tmp_path / "wheels"
    house.mkdir()
    environ = {"PIP_FIND_LINKS": f"{house} file://{house} {tmp_path}/gone https://e.example/links"}
    files = build_files(Machine(environ, tmp_path, tmp_path / "etc", SERVERS), "bookworm")
    assert files.binds == {house: "/mnt/local/0"}
    assert "find-links = /mnt/local/0 file:///mnt/local/0 https://e.example/links\n" in files.texts["pip.conf"]


def test_keys_and_certificates_come_along(apt: Path) -> None:
    certificates = apt.parent / "ssl/certs/ca-certificates.crt"
    certificates.parent.mkdir(parents=True)
    certificates.write_text("certificate")
    (apt / "sources.list").write_text(ONE_LINE)
    files = build_files(Machine({}, apt, apt.parent), "bookworm")
    assert files.copies == {"ca.crt": certificates, "keyring-0.gpg": Path(KEY)}
    assert "[signed-by=/mnt/keyring-0.gpg] http://one.example/debian bookworm main\n" in files.texts["sources.list"]
    assert "cert = /mnt/ca.crt" in files.texts["pip.conf"] and 'CAInfo "/mnt/ca.crt"' in files.texts["apt.conf"]


def test_proxies_reach_the_build_whatever_is_in_them(tmp_path: Path) -> None:
    password = "http://user:a'b$(id)@proxy.example:3128"
    text = build_files(Machine({"https_proxy": password}, tmp_path, tmp_path, SERVERS), "bookworm").texts["settings.sh"]
    done = subprocess.run(["sh", "-c", f'{text}\nprintf %s "$https_proxy"'], capture_output=True, text=True, check=True)
    assert done.stdout == password


SITE = Build(proxy="http://site.example:1", no_proxy=".site.example", pip_index="https://site.example/simple")


def test_a_users_settings_win_over_the_sites(tmp_path: Path) -> None:
    """Variables in either case, and pip's own files, too."""
    etc = tmp_path / "etc"
    assert pip_settings(Machine({}, tmp_path, etc, SITE)) == {"index-url": "https://site.example/simple"}
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text("[global]\nindex-url = https://mine.example/simple\n")
    assert pip_settings(Machine({}, tmp_path, etc, SITE)) == {"index-url": "https://mine.example/simple"}
    assert proxies(Machine({}, tmp_path, etc, SITE)) == {
        "http_proxy": "http://site.example:1",
        "https_proxy": "http://site.example:1",
        "no_proxy": ".site.example",
    }
    # Most programs read the lower case first: the site's must not stand beside the user's.
    assert proxies(Machine({"HTTPS_PROXY": "http://mine.example:2", "no_proxy": "mine"}, tmp_path, etc, SITE)) == {
        "http_proxy": "http://site.example:1",
        "HTTPS_PROXY": "http://mine.example:2",
        "no_proxy": "mine",
    }


def test_certificates_are_the_users_then_the_sites_then_the_machines(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (etc / "ssl/certs").mkdir(parents=True)
    for name in ("mine.pem", "conf.pem", "site.pem", "etc/ssl/certs/ca-certificates.crt"):
        (tmp_path / name).write_text("certificate")
    site = Build(ca_bundle=str(tmp_path / "site.pem"))
    assert certificate_file(Machine({}, tmp_path, etc)) == etc / "ssl/certs/ca-certificates.crt"
    assert certificate_file(Machine({}, tmp_path, etc, site)) == tmp_path / "site.pem"
    (etc / "pip.conf").write_text(f"[global]\ncert = {tmp_path}/conf.pem\n")
    assert certificate_file(Machine({}, tmp_path, etc, site)) == tmp_path / "conf.pem"
    mine = Machine({"CURL_CA_BUNDLE": str(tmp_path / "mine.pem")}, tmp_path, etc, site)
    assert certificate_file(mine) == tmp_path / "mine.pem"
    assert network(mine) == {"SSL_CERT_FILE": str(tmp_path / "mine.pem")}
    # A program of this machine finds the machine's own by itself.
    assert network(Machine({}, tmp_path, tmp_path / "etc")) == {"SSL_CERT_FILE": str(tmp_path / "conf.pem")}


def test_the_folder_for_builds(tmp_path: Path) -> None:
    for name in ("roomy", "mine"):
        (tmp_path / name).mkdir()
    site = Build(temporary=str(tmp_path / "roomy"))
    assert Machine({}, tmp_path, site=site).temporary() == tmp_path / "roomy"
    assert Machine({"TMPDIR": str(tmp_path / "mine")}, tmp_path, site=site).temporary() == tmp_path / "mine"
    with pytest.raises(ImageError, match=r"/gone: no such folder, and TMPDIR says"):
        Machine({"TMPDIR": "/gone"}, tmp_path, site=site).temporary()
    with pytest.raises(ImageError, match=r"build\.temporary of site\.toml says"):
        Machine({}, tmp_path, site=Build(temporary="/gone")).temporary()


@pytest.mark.parametrize(
    "text", ['Acquire::http::Proxy "http://apt.example:3142";', 'Acquire { http { Proxy "http://apt.example:3142"; }; };']
)
def test_apts_own_proxy_reaches_apt_and_nobody_else(apt: Path, text: str) -> None:
    """One that keeps packages of Debian (apt-cacher) need not serve anything else."""
    (apt / "apt.conf.d").mkdir()
    (apt / "apt.conf.d/99proxy").write_text(f'{text}\nAcquire::http::Proxy::direct.example "DIRECT";\nAPT::Get::Assume-Yes "1";\n')
    (apt / "sources.list").write_text("deb https://mirror.example/debian bookworm main\n")
    machine = Machine({"PATH": "/usr/bin:/bin"}, apt, apt.parent)
    wanted = ['Acquire::http::Proxy "http://apt.example:3142";', 'Acquire::http::Proxy::direct.example "DIRECT";']
    assert apt_options(machine) == wanted
    files = build_files(machine, "bookworm")
    assert all(line in files.texts["apt.conf"] for line in wanted)
    assert "apt.example" not in files.texts["settings.sh"] + files.texts["pip.conf"]


def test_a_machine_without_apt_has_no_settings_of_it(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(apt))
    assert apt_options(Machine({}, apt, apt.parent)) == []


def test_output_is_shown_without_addresses() -> None:
    assert without_addresses("Get:1 http://mirror.example/debian bookworm InRelease") == "Get:1 <address> bookworm InRelease"
    assert without_addresses("Looking in indexes: https://u:p@a.example/simple, file:///srv/x") == (
        "Looking in indexes: <address> <address>"
    )
