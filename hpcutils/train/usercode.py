"""The user's own Python: functions named `file.py:function`, loaded from the run's snapshot."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcutils.errors import SpecError


def load_function(reference: str, folder: Path) -> Callable[..., Any]:
    """Return the function `file.py:function` of `folder`.

    Modules beside the file can be imported by it. Errors inside the user's file pass through with their own traceback.

    Raises:
        SpecError: The file or the function is not there.
    """
    file, _, name = reference.partition(":")
    path = folder / file
    if not path.is_file():
        raise SpecError(f"no such file: {file} in the run's code", "'function' is relative to the folder of train.yaml")
    module = _module(path, folder)
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SpecError(f"{file} has no function {name!r}", f"it has: {known or 'none'}")
    return function  # type: ignore[no-any-return]


def _module(path: Path, folder: Path) -> Any:
    name = f"hpcutils_user_{path.relative_to(folder).with_suffix('').as_posix().replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
