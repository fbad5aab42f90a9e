"""Publishing an image for a whole site: a signed copy where every node sees it, and its entry in site.toml."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hpcutils.errors import ImageError, SpecError
from hpcutils.fs import publishing, write_text
from hpcutils.hashing import digest_file
from hpcutils.image.caller import plain_environment
from hpcutils.image.find import Image, find_builder, sbom_of, sidecar_of
from hpcutils.image.listing import ENDINGS
from hpcutils.image.plan import SHORT
from hpcutils.log import LOGGER
from hpcutils.shell import run
from hpcutils.specs.site import PublishedImage, Site, Status, parse_site, site_file


@dataclass(frozen=True)
class Publication:
    """What publishing an image would do.

    Args:
        image: What is published.
        alias: The name for users.
        target: The copy.
        site_file: The profile that gets the entry.
        key: Number of the private key in Apptainer's keyring; `None` leaves the copy unsigned.
        public_key: Where the public key goes; `None` without a signature.
    """

    image: Image
    alias: str
    target: Path
    site_file: Path
    key: int | None
    public_key: Path | None

    def describe(self) -> str:
        """Return the plan for a person."""
        signing = "unsigned" if self.key is None else f"signed with key {self.key}, whose public half goes to {self.public_key}"
        return f"copy {self.image.path}\nto   {self.target}, {signing}\nsay  [images.{self.alias}] in {self.site_file}"


def writable_site_file() -> Path:
    """Return the site.toml that gets an entry: the one that is read, or `$HPCUTILS_SITE_CONFIG` though it is not there yet.

    Raises:
        SpecError: There is none.
    """
    named = os.environ.get("HPCUTILS_SITE_CONFIG")
    found = Path(named) if named else site_file()
    if found is None:
        raise SpecError("there is no site.toml to write to", "name one in HPCUTILS_SITE_CONFIG, or make /etc/hpcutils/site.toml")
    return found


def plan_publication(image: Image, alias: str, folder: Path, site_file: Path, key: int | None) -> Publication:
    """Return what publishing `image` as `alias` would do; nothing is written.

    Raises:
        SpecError: The alias cannot be one.
    """
    check_alias(alias)
    public = folder / f"{alias}.asc" if key is not None else None
    # The alias is in the name: a signature is part of the file, and another alias's may be another.
    ending = next((ending for ending in ENDINGS if image.path.name.endswith(ending)), image.path.suffix)
    target = folder / f"{alias}-{(image.digest or digest_file(image.path))[:SHORT]}{ending}"
    return Publication(image, alias, target, site_file, key, public)


def check_alias(alias: str) -> None:
    """Raise `SpecError` for what cannot be the name of a published image."""
    try:
        Site(images={alias: PublishedImage(path="/", sha256="0" * 64)})
    except ValidationError as exc:
        raise SpecError(f"{alias!r} cannot be the name of a published image", "give it one: --as NAME") from exc


def run_publication(plan: Publication, passphrase: str = "") -> PublishedImage:
    """Copy, sign, and give the image its entry: in this order, so that the entry never names what is not there.

    Args:
        plan: What to do.
        passphrase: That of the key; empty for a key that has none.

    Raises:
        ImageError: The copy could not be signed.
    """
    with publishing(plan.target, suffix=plan.target.suffix) as temporary:
        shutil.copyfile(plan.image.path, temporary)
        temporary.chmod(0o755)
        if plan.key is not None and plan.public_key is not None:
            sign(temporary, plan.key, plan.public_key, passphrase)
        sha256 = digest_file(temporary)
        # A signature is part of the file: the copy has a digest of its own.
        sidecar = {
            **plan.image.sidecar,
            "sha256": sha256,
            "size_bytes": temporary.stat().st_size,
            "built_sha256": plan.image.sha256,
        }
        write_text(sidecar_of(plan.target), json.dumps(sidecar, indent=1) + "\n")
    if sbom_of(plan.image.path).is_file():
        shutil.copyfile(sbom_of(plan.image.path), sbom_of(plan.target))
    published = PublishedImage(path=str(plan.target), sha256=sha256, key=str(plan.public_key) if plan.public_key else None)
    write_entry(plan.site_file, plan.alias, published)
    return published


def set_status(site_file: Path, site: Site, alias: str, status: Status, note: str) -> PublishedImage:
    """Change what the site says of a published image.

    Raises:
        SpecError: The site has no image of this name.
    """
    if alias not in site.images:
        raise SpecError(f"{site_file}: no image is published as {alias!r}", f"there are: {', '.join(site.images) or 'none'}")
    published = site.images[alias].model_copy(update={"status": status, "note": note})
    write_entry(site_file, alias, published)
    return published


def sign(image: Path, key: int, public_key: Path, passphrase: str) -> None:
    """Sign a SIF with a key of Apptainer's own keyring, and leave the public half in a file.

    Raises:
        ImageError: There is no such key, or its passphrase is another.
    """
    builder, environment = find_builder(), keyring_environment()
    secret = fingerprints(run([builder, "key", "list", "--secret"], env=environment, error=ImageError).stdout)
    if key not in secret:
        known = ", ".join(f"{number} ({mark[-8:]})" for number, mark in secret.items()) or "none"
        raise ImageError(f"there is no key {key} to sign with; there are: {known}", "'apptainer key newpair' makes one")
    run([builder, "sign", "--keyidx", str(key), str(image)], env=environment, input=f"{passphrase}\n", error=ImageError)
    public = fingerprints(run([builder, "key", "list"], env=environment, error=ImageError).stdout)
    number = next(number for number, mark in public.items() if mark == secret[key])
    # Users check signatures with the file that is there meanwhile.
    with publishing(public_key, suffix=public_key.suffix) as temporary:
        run([builder, "key", "export", "--armor", str(temporary)], env=environment, input=f"{number}\n", error=ImageError)
        temporary.chmod(0o644)


def fingerprints(listing: str) -> dict[int, str]:
    """Return the fingerprint of each key in the output of `apptainer key list`, by its number."""
    rows = re.findall(r"^(\d+)\)(?:.*\n)*?\s*Fingerprint:\s*([0-9A-F]+)", listing, re.MULTILINE)
    return {int(number): mark for number, mark in rows}


def keyring_environment() -> dict[str, str]:
    """Return the environment for Apptainer's key commands: which keyring is meant is for the caller to say."""
    kept = {name: os.environ[name] for name in ("APPTAINER_KEYSDIR", "SINGULARITY_KEYSDIR") if name in os.environ}
    return plain_environment(**kept)


def write_entry(site_file: Path, alias: str, published: PublishedImage) -> None:
    """Give an image its table in site.toml, in place of the one it has; all other lines stay as they are."""
    before = site_file.read_text(encoding="utf-8") if site_file.is_file() else ""
    after = with_entry(before, alias, published)
    if parse_site(after, site_file.name).images.get(alias) != published:
        raise SpecError(f"{site_file}: the entry of {alias!r} cannot be replaced", "write [images.NAME] as a table of its own")
    write_text(site_file, after)
    LOGGER.info(f"{site_file}: {alias} is {published.status}")


def with_entry(text: str, alias: str, published: PublishedImage) -> str:
    """Return the text of a site.toml with the table of one image put in, or replaced. Pure."""
    values = {key: value for key, value in published.model_dump().items() if value not in (None, "")}
    table = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    entry = f'[images."{alias}"]\n{table}'
    old = re.compile(rf'^\[images\.(?:"{re.escape(alias)}"|{re.escape(alias)})\]\n(?:(?!\[).*\n?)*', re.MULTILINE)
    found = old.search(text)
    if found is None:
        return f"{text.rstrip()}\n\n{entry}".lstrip()
    blank = "\n" if found.group().endswith("\n\n") else ""
    return f"{text[: found.start()]}{entry}{blank}{text[found.end() :]}"


def check_can_be_published(image: Image) -> None:
    """Raise `ImageError` for an image that nobody knows anything of: it was not built by `hpcutils build`, or has no tests."""
    if not image.sidecar.get("self_test"):
        raise ImageError(f"{image.path} has no sidecar with passed self-tests", "publish what 'hpcutils build' made")
