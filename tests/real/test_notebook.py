"""`plot_model` in IPython itself, once as in a Jupyter kernel and once in a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

JUPYTER = '''
import base64
import sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

shell = InteractiveShell.instance(config=Config({"IPKernelApp": {}}) if sys.argv[1] == "kernel" else Config())
cell = """
import keras
from hpcutils.utils import plot_model
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
shown = [plot_model(model, "model." + ending) for ending in ("png", "svg", "pdf", "dot")]
"""
shell.run_cell(cell).raise_error()
png, svg, *others = shell.user_ns["shown"]
assert others == [None, None]
if sys.argv[1] == "kernel":
    formats, _ = shell.display_formatter.format(png)  # what a notebook is sent for the cell's last value
    assert base64.b64decode(formats["image/png"]) == png.data
    assert png.data == Path("model.png").read_bytes()
    assert "<svg" in shell.display_formatter.format(svg)[0]["image/svg+xml"]
else:
    assert (png, svg) == (None, None)
'''


@pytest.mark.parametrize("where", ["kernel", "terminal"])
def test_a_notebook_gets_the_picture(where: str, tmp_path: Path) -> None:
    """IPython itself, with the part of its configuration by which a Jupyter kernel is known."""
    done = subprocess.run([sys.executable, "-c", JUPYTER, where], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
