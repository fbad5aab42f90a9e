"""Reading YAML: plain data, the place of everything in it, and a sentence for all that plain data cannot hold.

A job is written to `job.json` and read again on every rank: only what JSON has too comes back as it was.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

from hpcutils.errors import SpecError
from hpcutils.specs.source import Location, Problem, Source

# Far more than any job has: what goes beyond is a mistake, or aliases of aliases that would fill the memory.
MOST_NODES = 100_000
DEEPEST = 40
# Escapes can make them; UTF-8 has no bytes for them.
SURROGATE = re.compile("[\ud800-\udfff]")
SYNTAX_HINT = "YAML indents with spaces, and puts text with a ':' or '#' in quotes; compare with jobs/digits/train.yaml"


def read_yaml(path: Path) -> Source:
    """Read a YAML 1.2 mapping with the place of everything in it.

    Returns:
        The data; `problems` has what is wrong with single keys and values.

    Raises:
        SpecError: No such file, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path}: cannot be read: {exc}", "give the path of a train.yaml") from exc
    yaml, root = _compose(text, path.name)
    source = Source(path.name, {})
    data = _Reader(source, yaml).plain(root, (), ()) if root is not None else None
    if not isinstance(data, dict):
        raise SpecError(f"{path.name}:1:1: a mapping of keys to values was expected", "start from jobs/digits/train.yaml")
    source.data.update(data)
    return source


def _compose(text: str, name: str) -> tuple[Any, Any]:
    """Return ruamel's reader and the tree of nodes that it made of `text`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings():
            # An anchor may be given anew in YAML.
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            return yaml, yaml.compose(text)
    except MarkedYAMLError as exc:
        mark = exc.problem_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark is not None else "1:1"
        raise SpecError(f"{name}:{where}: not valid YAML: {exc.problem}", SYNTAX_HINT) from exc
    except ReaderError as exc:
        before = text[: exc.position]
        where = f"{before.count(chr(10)) + 1}:{exc.position - before.rfind(chr(10))}"
        raise SpecError(f"{name}:{where}: not valid YAML: no text: {exc.reason}", "remove the character") from exc
    except RecursionError as exc:
        raise SpecError(f"{name}:1:1: not valid YAML: brackets nested too deep", SYNTAX_HINT) from exc
    except (YAMLError, ValueError) as exc:
        raise SpecError(f"{name}:1:1: not valid YAML: {exc}", SYNTAX_HINT) from exc


class _Reader:
    """Turns composed nodes into plain data, noting places and problems on the way down."""

    def __init__(self, source: Source, yaml: Any) -> None:
        self._source, self._yaml, self._seen = source, yaml, 0

    def plain(self, node: Any, location: Location, above: tuple[int, ...]) -> Any:
        """Return the data of `node`; `above` are the nodes that it lies in."""
        self._source.values[location] = place_of(node)
        self._seen += 1
        if self._seen > MOST_NODES:
            raise SpecError(f"{self._source.name}:{place_of(node)}: more than {MOST_NODES} values", "take the aliases apart")
        if id(node) in above:
            return self._refuse(location, "an anchor that contains itself")
        if len(above) > DEEPEST:
            return self._refuse(location, f"nested more than {DEEPEST} deep")
        if node.id == "scalar":
            return self._scalar(node, location)
        if str(node.tag) not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            return self._refuse(location, f"plain YAML was expected, got the tag {node.tag}")
        if node.id == "sequence":
            return [self.plain(item, (*location, i), (*above, id(node))) for i, item in enumerate(node.value)]
        return self._mapping(node, location, (*above, id(node)))

    def _mapping(self, node: Any, location: Location, above: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if key_node.id == "scalar" else "?"
            here = (*location, key)
            if key_node.id != "scalar":
                self._source.problems.append(Problem(here, "a key must be text", at_key=True))
            elif key in result:
                self._source.problems.append(Problem(here, f"key {key!r} is given twice", at_key=True))
            self._source.keys[here] = place_of(key_node)
            result[key] = self.plain(value_node, here, above)
        return result

    def _scalar(self, node: Any, location: Location) -> Any:
        from ruamel.yaml.error import YAMLError

        try:
            value = self._yaml.constructor.construct_object(node)
        except YAMLError as exc:
            return self._refuse(location, f"plain YAML was expected: {getattr(exc, 'problem', None) or exc}")
        except (ValueError, OverflowError) as exc:
            return self._refuse(location, f"not a value: {exc}")
        said = what_json_lacks(value)
        return value if said is None else self._refuse(location, said)

    def _refuse(self, location: Location, message: str) -> None:
        dotted = ".".join(map(str, location)) or "the file"
        self._source.problems.append(Problem(location, f"{dotted}: {message}"))


def what_json_lacks(value: Any) -> str | None:
    """Return what is wrong with a scalar that would not come back from JSON as it was; `None` for one that would."""
    if value is None or isinstance(value, bool | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"a finite number was expected, got {value}"
    if isinstance(value, str):
        return None if SURROGATE.search(value) is None else "half a character (a surrogate)"
    kind = type(value).__name__
    return f"text, a number, true, false or null was expected, got a {kind}; text that looks like one goes in quotes"


def place_of(node: Any) -> str:
    """Return where a node begins, as `line:column`, both from 1."""
    return f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"
