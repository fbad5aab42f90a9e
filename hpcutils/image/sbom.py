"""The list of everything in an image, as a CycloneDX document. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import hpcutils

SPEC_VERSION = "1.5"
SUITE = "bookworm"


def cyclonedx(name: str, digest: str, sha256: str, packages: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return the CycloneDX document of an image; equal images give equal documents.

    Args:
        name: The image's name.
        digest: Digest of all that went in.
        sha256: Digest of its file.
        packages: Versions by kind (`python`, `debian`) and name.
    """
    named = (_component(kind, package, version) for kind, found in packages.items() for package, version in found.items())
    # Two spellings of a name are one package: a reference may be there but once.
    components = {component["purl"]: component for component in named}.values()
    tools = [{"type": "application", "name": "hpcutils", "version": hpcutils.__version__}]
    hashes = [{"alg": "SHA-256", "content": sha256}]
    image = {"type": "container", "bom-ref": f"image:{digest}", "name": name, "version": digest, "hashes": hashes}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, sha256)}",
        "version": 1,
        "metadata": {"tools": {"components": tools}, "component": image},
        "components": sorted(components, key=lambda component: component["purl"]),
    }


def _component(kind: str, name: str, version: str) -> dict[str, str]:
    purl = package_url(kind, name, version)
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def package_url(kind: str, name: str, version: str) -> str:
    """Return a package's purl, as the package-url specification writes names of PyPI and Debian."""
    shown = quote(version, safe="~.-_")
    if kind == "debian":
        return f"pkg:deb/debian/{quote(name, safe='.-_')}@{shown}?distro={SUITE}"
    return f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{shown}"
