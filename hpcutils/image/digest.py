"""What an image is: one digest over all that decides its content. Pure, the same for every builder.

Who builds, where, when, and what the files are called does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from hpcutils.image.base import bootstrap_options
from hpcutils.image.code import CodeFile
from hpcutils.image.render import definition, dockerfile
from hpcutils.specs.debian import DebianLock, parse_debian_lock
from hpcutils.specs.recipe import DebianBase, Recipe, RecipeFiles
from hpcutils.specs.recipe_file import locked

# Part of every digest: raise it when images are put together in another way, so that old ones count as old.
LAYOUT = 2

# Names of files beside the recipe. Their contents count, under fixed names.
FILE_NAMES = {
    "base": {"archive"},
    "system": {"lock", "extra_locks"},
    "python": {"lock", "extra_locks"},
    "compile": {"lock", "tools_lock"},
    "files": {"__all__": {"source"}},
    # What the finished image is tested with is no part of its environment: see `image_digest`.
    "self_test": True,
}


def digest_of(parts: Mapping[str, str | bytes]) -> str:
    """Return the sha256 over named parts; neither their order nor where one ends and the next begins is left open."""
    state = hashlib.sha256()
    for name in sorted(parts):
        content = parts[name]
        raw = content.encode() if isinstance(content, str) else content
        state.update(f"{name}\0{len(raw)}\0".encode() + raw)
    return state.hexdigest()


def canonical(recipe: Recipe) -> str:
    """Return the recipe as JSON with sorted keys and without file names."""
    return json.dumps(recipe.model_dump(mode="json", exclude=FILE_NAMES), sort_keys=True, ensure_ascii=False)  # type: ignore[arg-type]


def base_digest(files: RecipeFiles) -> str:
    """Return the digest of what is in the base: what was asked for, and the version of each package."""
    base = files.recipe.base
    date = {"epoch": str(base.epoch)} if isinstance(base, DebianBase) else {}
    return digest_of({"packages": _base_packages_digest(files), **date})


def _base_packages_digest(files: RecipeFiles) -> str:
    """Return the digest of all in a base but the date of its files, which nothing that is compiled there depends on."""
    base = files.recipe.base
    if not isinstance(base, DebianBase):
        return digest_of({"layout": str(LAYOUT), "base": base.model_dump_json(exclude=FILE_NAMES["base"])})  # type: ignore[arg-type]
    parts = {"options": json.dumps(bootstrap_options(base)), "sha256": base.sha256 or "", "lock": debian_lock(files).text("base")}
    return digest_of({"layout": str(LAYOUT), **parts})


def debian_lock(files: RecipeFiles) -> DebianLock:
    """Return the version of each Debian package."""
    return parse_debian_lock(files.debian_lock, f"{files.recipe.name}: system.lock")


def wheels_digest(files: RecipeFiles) -> str:
    """Return the digest of all that compiled wheels depend on.

    A wheel of Horovod compiled against another TensorFlow loads and then crashes: it must never be taken for this one.
    """
    recipe, lock = files.recipe, locked(files.lock)
    against = sorted({name for package in recipe.compile.packages for name in package.built_against})
    return digest_of(
        {
            "base": _base_packages_digest(files),
            "compilers": debian_lock(files).text("compile"),
            "python": recipe.python.version,
            "compile": recipe.compile.model_dump_json(exclude=FILE_NAMES["compile"], exclude_defaults=True),  # type: ignore[arg-type]
            "locks": files.compile_lock + files.tools_lock,
            "against": "".join(lock.get(name, f"{name} is not in the lock\n") for name in against),
        }
    )


def environment_digest(files: RecipeFiles) -> str:
    """Return the digest of everything in the image but hpcutils' own code."""
    pairs = zip(files.recipe.files, files.copied, strict=True)
    copied = {f"file {file.target} {file.mode}": content for file, content in pairs}
    return digest_of(
        {
            "base": base_digest(files),
            "recipe": canonical(files.recipe),
            "definition": definition(files.recipe),
            "dockerfile": dockerfile(files.recipe),
            "lock": files.lock,
            "compile lock": files.compile_lock,
            "tools lock": files.tools_lock,
            "debian lock": files.debian_lock,
            **copied,
        }
    )


def code_digest(code: Iterable[CodeFile]) -> str:
    """Return the digest of hpcutils' own code: names, contents, and which files may be executed."""
    return digest_of({f"{file.name} {'755' if file.executable else '644'}": file.content for file in code})


def image_digest(files: RecipeFiles, code: Sequence[CodeFile]) -> str:
    """Return the digest of the whole image, and of the tests that it passed."""
    tests = zip(files.recipe.self_test, files.self_tests, strict=True)
    parts = {f"self-test {i} on {test.ranks}": text for i, (test, text) in enumerate(tests)}
    return digest_of({"environment": environment_digest(files), "code": code_digest(code), **parts})
