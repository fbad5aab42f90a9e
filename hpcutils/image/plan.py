"""What `hpcutils build` has to make. Reads the recipe, the code and the names of files that are there; starts nothing.

An image has three layers, from the one that changes least to the one that changes most; each is kept under the digest of what
went into it, and made only when it is not there:

    base          Debian, bootstrapped from its packages           a tar in the cache
    environment   system and Python packages, compiled ones too    a SIF in the cache
    code          hpcutils itself                                  appended: the finished SIF, in the images' folder

An image for Docker, Podman or Pyxis (`--format docker`) is an OCI archive: the same base, and the rest as one build.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hpcutils
from hpcutils.errors import SpecError
from hpcutils.image.code import CodeFile, code_files, self_test_files
from hpcutils.image.digest import base_digest, environment_digest, image_digest, wheels_digest
from hpcutils.image.find import cache_folder, images_folder, read_sidecar
from hpcutils.image.render import definition, dockerfile
from hpcutils.specs.recipe import DebianBase, RecipeFiles
from hpcutils.specs.recipe_file import read_recipe

Format = Literal["apptainer", "docker"]
LAYERS: Mapping[Format, tuple[str, ...]] = {"apptainer": ("base", "environment", "code"), "docker": ("base", "image")}
SUFFIXES: Mapping[Format, str] = {"apptainer": ".sif", "docker": ".oci.tar"}
# Digits of a digest that are part of a file's name.
SHORT = 12


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do.

    Args:
        files: The recipe and the contents of all that it names.
        format: What the image is for: Apptainer, or Docker and its kin.
        code: hpcutils' own code, and the self-tests.
        digest: Digest of all that goes in.
        base: Where the base is, or will be; of no use where the recipe names an image of a registry.
        wheels: Where the compiled wheels are, or will be.
        environment: Where the environment's SIF is, or will be.
        image: Where the finished image is, or will be.
        link: The name that leads to it.
        force: Whether every layer is made, also one that is there.
        relocked: What differs from the recipe's own Debian lock, where this machine has renewed it for itself.
    """

    files: RecipeFiles
    format: Format
    code: tuple[CodeFile, ...]
    digest: str
    base: Path
    wheels: Path
    environment: Path
    image: Path
    link: Path
    force: bool = False
    relocked: tuple[str, ...] = ()

    def to_make(self) -> tuple[str, ...]:
        """Return the layers to make, first to last, as the disk is now; empty when the image is up to date."""
        layers = LAYERS[self.format] if isinstance(self.files.recipe.base, DebianBase) else LAYERS[self.format][1:]
        if self.force:
            return layers
        if self._is_there():
            return ()
        # A layer that nothing asks for is not missed.
        there = {"environment": self.environment.is_file() and self.format == "apptainer", "base": self.base.is_file()}
        finished = next((i + 1 for i in reversed(range(len(layers))) if there.get(layers[i])), 0)
        return layers[finished:]

    def _is_there(self) -> bool:
        sidecar = read_sidecar(self.image)
        whole = self.image.is_file() and sidecar.get("size_bytes") == self.image.stat().st_size
        return whole and sidecar.get("digest") == self.digest

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        paths = {name: str(getattr(self, name)) for name in ("base", "wheels", "environment", "image", "link")}
        facts = {"name": self.files.recipe.name, "format": self.format, "digest": self.digest}
        return {**facts, "to_make": list(self.to_make()), **paths}

    def describe(self) -> str:
        """Return the plan for a person: layers, files, and the definition."""
        rows = {"base": self.base, "environment": self.environment, "code": self.image, "image": self.image}
        to_make = self.to_make()
        lines = [f"# image {self.files.recipe.name}, digest {self.digest}"]
        for layer in LAYERS[self.format]:
            if layer == LAYERS[self.format][1] and self.files.recipe.compile.packages:
                lines.append(_row("wheels", layer in to_make and not self.wheels.is_dir(), self.wheels))
            if layer != "base" or isinstance(self.files.recipe.base, DebianBase):
                lines.append(_row(layer, layer in to_make, rows[layer]))
        return "\n".join([*lines, "", self.text()])

    def text(self) -> str:
        """Return the whole definition: of the environment for Apptainer, of the image for Docker and its kin."""
        return dockerfile(self.files.recipe) if self.format == "docker" else definition(self.files.recipe)


def _row(layer: str, pending: bool, path: Path) -> str:
    return f"# {layer:<12} {'to make' if pending else 'there':<8} {path}"


def recipe_roots(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Return the folders that `recipes` can be in: $HPCUTILS_CONTAINERS, `containers` of the checkout, and of this folder."""
    variables = os.environ if environ is None else environ
    roots = [Path(variables["HPCUTILS_CONTAINERS"])] if variables.get("HPCUTILS_CONTAINERS") else []
    return [*roots, Path(hpcutils.__file__).parents[1] / "containers", Path("containers")]


def find_recipe(name: str, environ: Mapping[str, str] | None = None) -> Path:
    """Return the recipe's file: a path when `name` ends in `.toml`, else `recipes/NAME.toml` in the containers' folder.

    That folder is $HPCUTILS_CONTAINERS, or `containers` beside the package (in a checkout) or in the working folder.
    """
    if name.endswith(".toml"):
        return Path(name)
    roots = recipe_roots(environ)
    found = next((path for root in roots if (path := root / "recipes" / f"{name}.toml").is_file()), None)
    if found is not None:
        return found
    known = sorted({path.stem for root in roots for path in root.glob("recipes/*.toml")})
    hint = f"known recipes: {', '.join(known)}" if known else "set HPCUTILS_CONTAINERS to a checkout's containers folder"
    raise SpecError(f"no recipe is called {name!r}", hint)


def plan_build(name: str, *, format: Format = "apptainer", force: bool = False, package: Path | None = None) -> BuildPlan:
    """Return what building `name` would do. Reads the recipe, its files and hpcutils' code; starts nothing.

    Args:
        name: A recipe's name, or the path of its file.
        format: What the image is for.
        force: Make every layer again, though it is there.
        package: Folder of the hpcutils package that goes in; the running one when left out.
    """
    return plan_of(read_recipe(find_recipe(name), recipe_roots()), format=format, force=force, package=package)


def plan_of(files: RecipeFiles, *, format: Format, force: bool = False, package: Path | None = None) -> BuildPlan:
    """Return what building a recipe would do.

    Args:
        files: The recipe, and the contents of all that it names.
        format: What the image is for.
        force: Make every layer again, though it is there.
        package: Folder of the hpcutils package that goes in; the running one when left out.
    """
    code = code_files(package)
    cache, images, recipe, suffix = cache_folder(), images_folder(), files.recipe, SUFFIXES[format]
    digest = image_digest(files, code)
    return BuildPlan(
        files=files,
        format=format,
        code=(*code, *self_test_files(files)),
        digest=digest,
        base=files.archive or cache / f"bases/debian-{recipe.base.suite}-{base_digest(files)[:SHORT]}.tar",
        wheels=cache / f"wheels/{wheels_digest(files)[:SHORT]}",
        environment=cache / f"layers/{recipe.name}-{environment_digest(files)[:SHORT]}.sif",
        image=images / f"{recipe.name}-{digest[:SHORT]}{suffix}",
        link=images / f"{recipe.name}{suffix}",
        force=force,
    )
