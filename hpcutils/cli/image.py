"""`hpcutils image`: what there is, whether it is sound, and how it becomes a site's. A thin file over `image`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from hpcutils.cli.options import JSON, emit

NAME = click.argument("name")


@click.group()
def image() -> None:
    """List, test, verify, compare, lock and publish images."""
    from hpcutils import log

    log.configure()


@image.command(name="list")
@JSON
def list_command(as_json: bool) -> None:
    """List the site's images and those that were built here."""
    from hpcutils.image.listing import list_images
    from hpcutils.specs.site import load_site

    rows = list_images(load_site())
    lines = [f"{r.name:<24} {r.status:<11} {r.digest:<13} {r.size_bytes / 1e6:7.0f} MB  {r.path}  {r.note}".rstrip() for r in rows]
    emit({"images": [vars(row) for row in rows]}, as_json, "\n".join(lines) or "no images: hpcutils build NAME makes one")


@image.command()
@NAME
@click.option("--sbom", is_flag=True, help="Print the list of packages as CycloneDX.")
@click.option("--sizes", is_flag=True, help="Say what each package takes; reads the image for some ten seconds.")
@JSON
def show(name: str, sbom: bool, sizes: bool, as_json: bool) -> None:
    """Say all that is known of the image NAME (an alias, a name that was built, or a path)."""
    from hpcutils.image.compare import ask
    from hpcutils.image.find import sbom_of
    from hpcutils.image.listing import breakdown, details, known_image
    from hpcutils.specs.site import load_site

    found, published = known_image(name, load_site())
    if sbom:
        click.echo(sbom_of(found.path).read_text(encoding="utf-8"), nl=False)
        return
    known = details(found, published)
    lines = [f"{key:<11} {value if isinstance(value, str) else json.dumps(value)}" for key, value in known.items()]
    if sizes:
        known["sizes"] = json.loads(ask(found, "sizes"))
        lines += breakdown(known["sizes"])
    emit(known, as_json, "\n".join(lines))


@image.command()
@NAME
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes of a cluster to test on; without it, this machine.")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Ranks of each node.")
@click.option("--partition", help="Slurm partition.")
@click.option("--gpu/--no-gpu", default=None, help="Hand GPUs in, and expect one; left out, an image for GPUs does.")
@JSON
def test(name: str, nodes: int | None, ranks: int, partition: str | None, gpu: bool | None, as_json: bool) -> None:
    """Run the self-tests of the image NAME, here or over the nodes of a cluster."""
    from hpcutils.image.listing import known_image
    from hpcutils.image.trials import try_here, try_on_cluster
    from hpcutils.specs.site import load_site

    site = load_site()
    found, _ = known_image(name, site)
    report = try_here(found, gpu=gpu) if nodes is None else try_on_cluster(found, site, nodes, ranks, partition, gpu=gpu)
    lines = [f"{'ok' if check['ok'] else 'FAILED':<7} {check['check']}: {check['seen']}" for check in report.checks]
    emit({"checks": [dict(check) for check in report.checks], "ok": not report.failed()}, as_json, "\n".join(lines))
    if report.failed():
        from hpcutils.errors import ImageError

        raise ImageError(f"{len(report.failed())} of {len(report.checks)} checks failed")


@image.command()
@NAME
@JSON
def verify(name: str, as_json: bool) -> None:
    """Check that the image NAME is the file that was built, or published and signed."""
    from hpcutils.image import trust
    from hpcutils.image.listing import known_image
    from hpcutils.specs.site import load_site

    site = load_site()
    found, published = known_image(name, site)
    verdict = trust.verify(found, published, name, site=site, fresh=True)
    what = f"{'signed' if verdict.signed else 'unsigned'}{f', {verdict.status}' if verdict.status else ''}"
    emit({**vars(verdict), "path": str(verdict.path)}, as_json, f"ok: {verdict.path} ({what}) sha256 {verdict.sha256}")


@image.command()
@click.argument("first")
@click.argument("second")
@click.option("--files", "with_files", is_flag=True, help="Compare file by file, too; reads both images.")
@JSON
def diff(first: str, second: str, with_files: bool, as_json: bool) -> None:
    """Say how the images FIRST and SECOND differ: what went in, packages, files."""
    from hpcutils.image.compare import compare
    from hpcutils.image.listing import known_image
    from hpcutils.specs.site import load_site

    site = load_site()
    found = compare(known_image(first, site)[0], known_image(second, site)[0], with_files=with_files)
    emit(found.as_dict(), as_json, "\n".join(found.lines()))


@image.command()
@click.argument("recipe")
@click.option("--upgrade", is_flag=True, help="Take the newest versions; without it only what is asked for anew, or gone, changes.")
@JSON
def lock(recipe: str, upgrade: bool, as_json: bool) -> None:
    """Renew the locks of RECIPE: each .in file beside a lock into versions and hashes, and its Debian packages into versions."""
    from hpcutils.image.lock import renew
    from hpcutils.image.machine import this_machine

    renewed = renew(recipe, this_machine(), upgrade=upgrade)
    lines = [f"{each.lock.name}: {', '.join(each.changes) or 'as it was'}" for each in renewed]
    emit({each.lock.name: list(each.changes) for each in renewed}, as_json, "\n".join(lines))


@image.command()
@JSON
def builders(as_json: bool) -> None:
    """Say which programs can build images here, and why the others cannot."""
    from hpcutils.image.builders import NAMES, gather_facts, look_for_builders
    from hpcutils.image.machine import this_machine

    facts = gather_facts(this_machine().temporary())
    found = [finding for image_format in NAMES for finding in look_for_builders(image_format, facts)]
    lines = [f"{finding.format:<10} {finding.describe()}" for finding in found]
    emit({"builders": [vars(finding) for finding in found]}, as_json, "\n".join(lines))


@image.command()
@NAME
@click.option("--as", "alias", help="What users call it; NAME when left out.")
@click.option("--to", "folder", type=click.Path(path_type=Path), help="Folder that every node sees.")
@click.option("--key", type=int, help="Number of your key in 'apptainer key list --secret': sign with it.")
@click.option("--status", type=click.Choice(["current", "deprecated", "withdrawn"]), help="Only change what is said of NAME.")
@click.option("--note", default="", help="What users are told with it.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; do nothing.")
def publish(name: str, alias: str | None, folder: Path | None, key: int | None, **said: Any) -> None:
    """Publish the image NAME for the site: a signed copy, and its entry in site.toml."""
    status: Literal["current", "deprecated", "withdrawn"] | None = said["status"]
    if status is not None:
        click.echo(_say(name, status, said["note"]))
    elif folder is None:
        raise click.UsageError("give --to FOLDER, or --status for an image that is published")
    else:
        click.echo(_publish(name, alias or name, folder, key, said["dry_run"]))


def _say(alias: str, status: Literal["current", "deprecated", "withdrawn"], note: str) -> str:
    from hpcutils.image.publish import set_status, writable_site_file
    from hpcutils.specs.site import load_site

    return set_status(writable_site_file(), load_site(), alias, status, note).path


def _publish(name: str, alias: str, folder: Path, key: int | None, dry_run: bool) -> str:
    from hpcutils.image import trust
    from hpcutils.image.find import find_image
    from hpcutils.image.publish import check_alias, check_can_be_published, plan_publication, run_publication, writable_site_file

    check_alias(alias)
    found = find_image(name)
    check_can_be_published(found)
    trust.verify(found, fresh=True)
    plan = plan_publication(found, alias, folder.resolve(), writable_site_file(), key)
    return plan.describe() if dry_run else run_publication(plan, _passphrase(key)).path


def _passphrase(key: int | None) -> str:
    named = os.environ.get("HPCUTILS_SIGN_PASSPHRASE")
    if key is None or named is not None or not sys.stdin.isatty():
        return named or ""
    return str(click.prompt(f"passphrase of key {key}", hide_input=True, default="", show_default=False, err=True))
