"""What the documents say is what the code does."""

import re
from pathlib import Path

from hpcutils.cli import COMMANDS
from hpcutils.errors import tree

ROOT = Path(__file__).parents[2]


def test_every_exit_code_is_documented():
    text = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    rows = {(int(code), name) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)}
    assert rows == {(cls.exit_code, cls.__name__) for cls in tree()}


def test_exit_codes_differ():
    codes = [cls.exit_code for cls in tree()]
    assert len(set(codes)) == len(codes)


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Commands") : readme.index("## From Python")]
    assert [name for name in COMMANDS if f"`hpcutils {name}" not in table and f"`{name}`" not in table] == []


def test_links_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_key_of_train_yaml_is_documented():
    from hpcutils.specs.files import DataFile, Split
    from hpcutils.specs.job import Checkpoints, Data, Job, ModelSpec, Resources, Staging, Training

    text = (ROOT / "docs" / "reference" / "train-yaml.md").read_text()
    keys = {key for cls in (Data, Job, ModelSpec, Resources, Training, Checkpoints, Staging) for key in cls.model_fields}
    keys |= {f"files[].{key}" for key in DataFile.model_fields} | {f"split.{key}" for key in Split.model_fields}
    keys -= {"data", "model", "training", "resources", "checkpoints", "split", "staging"}
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_every_key_of_a_recipe_and_of_site_toml_is_documented():
    from hpcutils.specs import recipe, site

    text = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    tables = {"system": recipe.System, "python": recipe.Python, "compile": recipe.Compile}
    keys = {f"{table}.{key}" for table, cls in tables.items() for key in cls.model_fields}
    keys |= {f"base.{key}" for cls in (recipe.DebianBase, recipe.ImageBase, recipe.ArchiveBase) for key in cls.model_fields}
    keys |= {key for cls in (recipe.CompiledPackage, recipe.CopiedFile, recipe.SelfTest) for key in cls.model_fields}
    keys |= set(recipe.Recipe.model_fields) - set(tables) - {"base"}
    assert {key for key in keys if f"`{key}`" not in text} == set()
    text = (ROOT / "docs" / "reference" / "site-toml.md").read_text()
    tables = {"launch": site.Launch, "container": site.Container, "folders": site.Folders, "build": site.Build}
    keys = {f"{table}.{key}" for table, cls in tables.items() for key in cls.model_fields}
    keys |= {*site.Limits.model_fields, *site.PublishedImage.model_fields, "name", "images.ALIAS", "limits.PARTITION"}
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_the_command_reference_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generate import command_page

    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == command_page(), "run: make docs"
