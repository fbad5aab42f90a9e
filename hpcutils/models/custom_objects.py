"""`CustomObjectScope`: names for your own classes and functions, for the time of a `with` block.

Keras 3 looks names up in three kinds of tables, and its own scope writes only the first, so it finds a saved layer and not
`kernel_regularizer="MyObject"`:

- one of the calling thread, which Keras' own scope replaces instead of adding to it;
- one of the process, for saved objects;
- one of the process for each kind of object that may be given by name (activations, losses, …).

This scope adds to all of them. The first lets it win over a Keras scope around it; the others are seen by every thread.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hpcutils.errors import RequestError, SpecError

# Keras' name for the calling thread's table.
THREAD_TABLE = "custom_objects_scope_dict"
# Modules with a table of names of their own. Initializers, optimizers and layers are looked up as saved objects are.
NAMED_KINDS = ("activations", "constraints", "losses", "metrics", "quantizers", "regularizers")

Table = dict[str, Any]


@dataclass
class Entered:
    """One `with` block that is open.

    Attributes:
        objects: What it adds.
        thread: The thread that entered it.
        shared_before: The process's tables when it was entered; of those of the kinds, the names of `objects` alone.
        own_before: The thread's table when it was entered; `None` where there was none.
        own: The thread's table inside.
    """

    objects: Table
    thread: threading.Thread
    shared_before: list[Table]
    own_before: Table | None
    own: Table


# Place among the shared tables of the one that `keras.saving.register_keras_serializable` writes; it is the first.
SAVED_OBJECTS = 0

# Every open block of the process, the oldest first. LOCK guards it, and changes of the process's tables.
OPEN: list[Entered] = []
LOCK = threading.RLock()


class CustomObjectScope:
    """Resolve the given names to your own objects inside a `with` block.

    Layers, losses, optimizers, initializers, regularizers, constraints, metrics and activations can then be given by name,
    and `load_model` finds them. Inner scopes add to outer ones and win where both know a name. Threads see the names while
    the block is open. Two threads that give one name two meanings at the same time are not kept apart.

    At the end of the block, also when it raised, the tables are as they were: names that were registered inside it are
    forgotten too.

    Args:
        *dicts: Mappings of names to objects; a later one wins. `None` counts as empty.

    Raises:
        SpecError: An argument is not a mapping, or a name is not a string.

    Example:
        with CustomObjectScope({"MyObject": MyObject}):
            layer = Dense(8, kernel_regularizer="MyObject")
    """

    def __init__(self, *dicts: Mapping[str, Any] | None) -> None:
        self.objects: Table = {}
        for place, given in enumerate(dicts):
            self.objects.update(checked(given, place))
        self.entered: list[Entered] = []

    def __enter__(self) -> CustomObjectScope:
        shared, own_before = shared_tables(), own_table()
        own = {**(own_before or {}), **self.objects}
        with LOCK:
            block = Entered(self.objects, threading.current_thread(), remember(shared, self.objects), own_before, own)
            for table in shared:
                table.update(self.objects)
            OPEN.append(block)
            self.entered.append(block)
        set_own_table(own)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        thread = threading.current_thread()
        with LOCK:
            if not self.entered:
                raise RequestError("this CustomObjectScope is not open", "leave it once for each time that it was entered")
            # Another thread may leave it: a pool that ends, a generator that is closed elsewhere.
            block = next((b for b in reversed(self.entered) if b.thread is thread), self.entered[-1])
            self.entered.remove(block)
            close(block)
        if block.thread is thread:
            set_own_table(block.own_before)
        else:
            # The other thread's table is out of reach, but it is the one that was set on entering.
            replace(block.own, block.own_before or {})


def remember(shared: Sequence[Table], objects: Table) -> list[Table]:
    """Return what closing needs of the process's tables: all of the one that names can be registered in, else the same names."""
    kinds = [{name: table[name] for name in objects if name in table} for table in shared[SAVED_OBJECTS + 1 :]]
    return [shared[SAVED_OBJECTS].copy(), *kinds]


def checked(given: Mapping[str, Any] | None, place: int) -> Mapping[str, Any]:
    """Return `given` as a mapping of names.

    Raises:
        SpecError: It is none, or a name is not a string.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise SpecError(
            f"argument {place + 1} of CustomObjectScope is a {type(given).__name__}; a dict was expected",
            hint="write CustomObjectScope({'MyObject': MyObject})",
        )
    wrong = [name for name in given if not isinstance(name, str)]
    if wrong:
        raise SpecError(f"CustomObjectScope has the name {wrong[0]!r}; a string was expected", "quote the name")
    return given


def close(block: Entered) -> None:
    """Take `block` out of the process's tables.

    Blocks of one thread close in the reverse order, and the tables become what they were. Blocks of several threads need
    not: then this block's names leave the tables and what later blocks remember of them, and the rest stays.
    """
    place = next(i for i, other in enumerate(OPEN) if other is block)
    later = OPEN[place + 1 :]
    del OPEN[place]
    for number, table in enumerate(shared_tables()):
        if later:
            for name in block.objects:
                withdraw(name, block, later, number, table)
        else:
            put_back(table, block, number)


def withdraw(name: str, block: Entered, later: list[Entered], number: int, table: Table) -> None:
    """Undo what `block` did to `name` in table `number`: first in what each later block remembers, then in the table."""
    for other in later:
        give_back(name, block.objects[name], other.shared_before[number], block.shared_before[number])
        if name in other.objects:
            return  # From here on the name is the later block's.
    give_back(name, block.objects[name], table, block.shared_before[number])


def give_back(name: str, added: Any, table: Table, before: Table) -> None:
    """Where `name` still means `added` in `table`, give it the meaning that it had in `before`, or none."""
    if name in table and table[name] is added:
        del table[name]
        if name in before:
            table[name] = before[name]


def put_back(table: Table, block: Entered, number: int) -> None:
    """Make table `number` what it was when `block` was entered, where no other block is open."""
    before = block.shared_before[number]
    if number == SAVED_OBJECTS:
        replace(table, before)
        return
    for name in block.objects:
        if name in before:
            table[name] = before[name]
        else:
            table.pop(name, None)


def replace(table: Table, content: Table) -> None:
    """Give `table` new content in place, because Keras holds on to it; names that stay are never missing meanwhile."""
    for name in [name for name in table if name not in content]:
        del table[name]
    table.update(content)


@functools.cache
def shared_tables() -> tuple[Table, ...]:
    """Return Keras' tables of the process, live: that of saved objects, and those of the kinds in `NAMED_KINDS`."""
    import keras

    # The tables of the kinds have no public name. Keras changes all of these in place and never replaces them.
    kinds = [importlib.import_module(f"keras.src.{kind}").ALL_OBJECTS_DICT for kind in NAMED_KINDS]
    return (keras.saving.get_custom_objects(), *kinds)


def own_table() -> Table | None:
    """Return Keras' table of the calling thread, or `None`."""
    from keras.src.backend.common import global_state

    table: Table | None = global_state.get_global_attribute(THREAD_TABLE)
    return table


def set_own_table(table: Table | None) -> None:
    """Set Keras' table of the calling thread."""
    from keras.src.backend.common import global_state

    global_state.set_global_attribute(THREAD_TABLE, table)
