"""The two formats of an image: golden files, and what must hold for any recipe."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hpcutils.image.base import bootstrap_argv, bootstrap_options
from hpcutils.image.render import definition, dockerfile, stages
from hpcutils.specs.recipe import DebianBase, Recipe
from hpcutils.specs.recipe_file import parse_recipe

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/image"

# As little as a recipe can have, with values that a shell or a Dockerfile could misread.
SMALL = """
name = "small"
summary = "one compiled package and a file"
variant = "cpu"
[base]
suite = "bookworm"
packages = ["python3"]
epoch = 0
[python]
version = "3.11"
lock = "a.txt"
[compile]
tools_lock = "b.txt"
lock = "c.txt"
packages = [{ name = "some-thing", version = "1.0", environment = { FLAGS = "-O2 -DNAME='x'" } }]
[environment]
GREETING = "it's \\"$HOME\\" \\\\ `id`"
[[files]]
source = "motd"
target = "/etc/motd"
mode = "0600"
[[self_test]]
script = "t.py"
"""


def standard() -> Recipe:
    return parse_recipe((ROOT / "containers/recipes/tf-horovod-cpu.toml").read_text(), "tf-horovod-cpu.toml")


def small() -> Recipe:
    return parse_recipe(SMALL, "small.toml")


def cuda() -> Recipe:
    return parse_recipe((ROOT / "containers/recipes/tf-horovod-cuda.toml").read_text(), "tf-horovod-cuda.toml")


def on(name: str, base: str) -> Recipe:
    """The small recipe on another kind of base."""
    text = SMALL.replace('name = "small"', f'name = "{name}"').replace("epoch = 0", base)
    return parse_recipe(text, "small.toml")


RECIPES = [
    standard(),
    cuda(),
    small(),
    on("small-on-image", f'image = "registry.example/debian@sha256:{"0" * 64}"'),
    on("small-on-archive", f'archive = "base.oci.tar"\nsha256 = "{"0" * 64}"'),
]


def assert_golden(name: str, text: str) -> None:
    """Compare with a golden file; HPCUTILS_UPDATE_GOLDEN=1 writes it instead, for a look at the diff."""
    file = GOLDEN / name
    if os.environ.get("HPCUTILS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_golden(recipe: Recipe) -> None:
    assert_golden(f"{recipe.name}.def", definition(recipe))
    assert_golden(f"{recipe.name}.Dockerfile", dockerfile(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_both_formats_have_every_line_of_every_step_in_order(recipe: Recipe) -> None:
    wanted = [line.strip() for stage in stages(recipe) for step in stage.steps for line in step.lines]
    for text in (definition(recipe), dockerfile(recipe)):
        lines = iter(re.sub(r"(;)? \\$", "", line).strip() for line in text.splitlines())
        for line in wanted:
            bare = line.removesuffix(" \\").removesuffix(" then")
            assert any(bare in found for found in lines), f"missing or out of order: {line}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("section", ["%setup", "%post"])
def test_the_shell_accepts_every_section(recipe: Recipe, section: str) -> None:
    bodies = re.findall(rf"^{section}\n((?:    .*\n|\n)+)", definition(recipe), re.MULTILINE)
    assert len(bodies) == (2 if section == "%post" or isinstance(recipe.base, DebianBase) else 0)
    for body in bodies:
        subprocess.run(["sh", "-n"], input=body, text=True, check=True)


def test_the_shell_accepts_every_run_of_the_dockerfile() -> None:
    runs = re.findall(r"^RUN (?:--mount=\S+ )?((?:.*\\\n)+.*\n)", dockerfile(standard()), re.MULTILINE)
    assert len(runs) == sum(len(stage.steps) for stage in stages(standard()))
    for body in runs:
        subprocess.run(["sh", "-n"], input=body, text=True, check=True)


def test_values_reach_the_environment_unchanged() -> None:
    """The exports of %environment, run by a real shell, give the recipe's own value."""
    body = definition(small()).split("%environment\n")[1].split("%labels")[0]
    done = subprocess.run(["sh", "-c", f'{body}\nprintf %s "$GREETING"'], capture_output=True, text=True, check=True)
    assert done.stdout == small().environment["GREETING"]


def test_a_flag_with_spaces_stays_one_word() -> None:
    line = next(line for line in definition(small()).splitlines() if " FLAGS=" in line)
    assert "FLAGS=-O2 -DNAME='x'" in shlex.split(line.rstrip("\\"))


def test_no_step_names_an_address_or_a_path_of_the_builder() -> None:
    for text in (definition(standard()), dockerfile(standard())):
        assert "://" not in text
        assert str(ROOT) not in text and str(Path.home()) not in text


def test_compilers_are_not_in_the_image() -> None:
    compiling, image = stages(standard())
    words = {word for step in image.steps for line in step.lines for word in line.split()}
    assert words >= set(standard().system.packages)
    assert not words & set(standard().compile.system_packages)
    assert image.taken == "/opt/hpcutils-env" and compiling.taken is None


def test_a_gpu_image_links_nccl_in_and_leaves_the_compiler_out() -> None:
    text = definition(cuda())
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in text and "nvidia/nccl/lib" in text
    _, image = stages(cuda())
    assert not any("/opt/tools" in line for step in image.steps for line in step.lines)


def test_the_base_is_told_no_addresses() -> None:
    options = bootstrap_options(standard().base)
    assert any("etc/apt/sources.list" in option for option in options)
    assert "://" not in " ".join(options)
    argv = bootstrap_argv(standard().base, Path("sources.list"), Path("base.tar"))
    assert argv[-3:] == ["bookworm", "base.tar", "sources.list"]


def test_apts_settings_hold_for_the_bootstrap_and_leave_nothing(tmp_path: Path) -> None:
    """The hooks, run by the shell as mmdebstrap runs them: with the new system's folder as their argument."""
    settings, root = tmp_path / "it's settings", tmp_path / "root"
    settings.mkdir()
    (root / "etc/apt/apt.conf.d").mkdir(parents=True)
    (settings / "apt.conf").write_text("proxy")
    argv = bootstrap_argv(standard().base, Path("sources.list"), Path("base.tar"), settings)
    hooks = [word.partition("=")[2] for word in argv if "zz-build" in word]
    assert [word.partition("=")[0] for word in argv if "zz-build" in word] == ["--setup-hook", "--customize-hook"]
    subprocess.run(["sh", "-ec", hooks[0], "exec", str(root)], check=True)
    assert (root / "etc/apt/apt.conf.d/zz-build").read_text() == "proxy"
    subprocess.run(["sh", "-ec", hooks[1], "exec", str(root)], check=True)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_an_image_without_fonts_is_built_too() -> None:
    """Not every recipe has fontconfig: what is in its folder is dated only where there is one."""
    text = SMALL.replace("[python]", '[system]\npackages = ["git"]\n[python]')
    lines = [line for step in stages(parse_recipe(text, "small.toml"))[1].steps for line in step.lines if "/etc/fonts" in line]
    assert len(lines) == 1 and lines[0].startswith("if command -v fc-cache; then ") and lines[0].endswith("; fi")


def test_a_recipe_without_compiled_packages_has_no_step_for_them() -> None:
    text = SMALL.replace(SMALL[SMALL.index("packages = [{") : SMALL.index("[environment]")], "")
    assert "wheel" not in definition(parse_recipe(text, "small.toml"))
