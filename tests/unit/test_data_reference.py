"""The examples of the pages of the reference run as they stand, and print what they say they print."""

import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["hdf5matrix", "sequence", "to_categorical", "normalize"])
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    page = (REFERENCE / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    code = "".join(block for block in blocks if not block.startswith("hpcutils."))  # the others are signatures
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}.md", "exec"), {"__name__": "__main__"})
    promised = re.findall(r"^ *print\(.*\)  # (.*)$|^# (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == ["".join(line) for line in promised]
