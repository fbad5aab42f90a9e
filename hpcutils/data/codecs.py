"""Codecs of HDF5 chunks beside deflate: zstd, lz4 and blosc through `numcodecs`, everything else through plugins of HDF5.

Each call makes exactly as many bytes as the chunk has, or fails: what a stream says about its own size is compared first, and no
more memory is written to than that. The extra `filters` installs both packages; neither is imported before a dataset needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias

import h5py

from hpcutils.errors import DataError, MissingPartError

# Bytes of a chunk as stored, and how many they must give.
Codec: TypeAlias = Callable[[bytes, int], bytes]

# Registered numbers (https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md).
BLOSC, LZ4, ZSTD = 32001, 32004, 32015
NAMES = {307: "bzip2", BLOSC: "blosc", LZ4: "lz4", 32008: "bitshuffle", 32013: "zfp", ZSTD: "zstd", 32017: "sz", 32026: "blosc2"}
ZSTD_MAGIC = 0xFD2FB528


@cache
def has_numcodecs() -> bool:
    """Tell whether `numcodecs` is installed, without importing it."""
    return importlib.util.find_spec("numcodecs") is not None


def unzstd(stored: bytes, size_bytes: int) -> bytes:
    """Decompress a zstd frame, as HDF5's zstd filter writes it.

    Raises:
        DataError: It is damaged, or gives another number of bytes.
    """
    said = zstd_content_bytes(stored)
    if said is not None:
        check_size(said, size_bytes)
    return _into(_engine("zstd"), stored, size_bytes)


def zstd_content_bytes(stored: bytes) -> int | None:
    """Return what the header of a zstd frame says of its size, or `None` where it says nothing (RFC 8878, 3.1.1.1)."""
    if len(stored) < 5 or struct.unpack_from("<I", stored)[0] != ZSTD_MAGIC:
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: it is no zstd frame")
    descriptor = stored[4]
    single_segment = bool(descriptor & 0x20)
    field = {0: int(single_segment), 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    value = stored[start : start + field]
    if field == 0 or len(value) < field:
        return None
    return int.from_bytes(value, "little") + (256 if field == 2 else 0)


def unlz4(stored: bytes, size_bytes: int) -> bytes:
    """Decompress the blocks of HDF5's lz4 filter: size of all (8 bytes) and of a block (4), then each block behind its length (4).

    Big-endian; a block as long as what it holds is stored as it is.

    Raises:
        DataError: It is damaged, or gives another number of bytes.
    """
    if len(stored) < 12:
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: it has no lz4 header")
    total, block = struct.unpack_from(">QI", stored)
    check_size(total, size_bytes)
    parts, place, left = [], 12, size_bytes
    while left:
        rows = min(block or left, left)
        (length,) = struct.unpack_from(">I", stored.ljust(place + 4, b"\0"), place)
        data = stored[place + 4 : place + 4 + length]
        if length == 0 or len(data) != length:
            raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: it breaks off {left} bytes before its end")
        # numcodecs' own form: the size, little-endian, before the block.
        parts.append(data if length == rows else _into(_engine("lz4"), struct.pack("<I", rows) + data, rows))
        place, left = place + 4 + length, left - rows
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unblosc(stored: bytes, size_bytes: int) -> bytes:
    """Decompress a blosc buffer (version 1 of the format), which undoes its own shuffle.

    Raises:
        DataError: It is damaged, or gives another number of bytes.
    """
    if len(stored) < 16:
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: it has no blosc header")
    said, _, compressed = struct.unpack_from("<III", stored, 4)
    check_size(said, size_bytes)
    if compressed > len(stored):
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: its header says {compressed}")
    return _into(_engine("blosc"), stored, size_bytes)


CODECS: dict[int, Codec] = {BLOSC: unblosc, LZ4: unlz4, ZSTD: unzstd}


def check_size(said: int, size_bytes: int) -> None:
    """Raise `DataError` where a compressed chunk says that it holds more or less than a chunk."""
    if said != size_bytes:
        raise DataError(f"a compressed chunk should hold {size_bytes} bytes and holds {said}")


def _engine(name: str) -> Any:
    return importlib.import_module(f"numcodecs.{name}")


def _into(engine: Any, stored: bytes, size_bytes: int) -> bytes:
    """Decompress into a buffer of the right size; the engines refuse what does not fit."""
    out = bytearray(size_bytes)
    try:
        engine.decompress(stored, out)
    except (RuntimeError, ValueError) as exc:
        raise DataError(f"a compressed chunk of {len(stored)} bytes is damaged: {exc}") from exc
    return out  # type: ignore[return-value]  # read like bytes, and not copied for it


def need_filters(dataset: h5py.Dataset) -> None:
    """Make sure that HDF5 itself can read a dataset; `hdf5plugin` is imported where HDF5 lacks one of its filters.

    Raises:
        MissingPartError: A filter is not there.
    """
    for code, name in _filters(dataset):
        if h5py.h5z.filter_avail(code):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            raise _missing(dataset, code, name)


def _filters(dataset: h5py.Dataset) -> Iterator[tuple[int, str]]:
    plist = dataset.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(i)
        yield code, NAMES.get(code, name.decode(errors="replace").partition(";")[0] or "no name")


def _missing(dataset: h5py.Dataset, code: int, name: str) -> MissingPartError:
    where = f"{dataset.file.filename}: dataset {dataset.name!r} is compressed with {name} (HDF5 filter {code})"
    if code in CODECS:
        hint = "install numcodecs, or hdf5plugin: pip install 'hpcutils[filters]'"
    elif importlib.util.find_spec("hdf5plugin") is None:
        hint = "install hdf5plugin (pip install hdf5plugin), or write the file anew with gzip or zstd"
    else:
        hint = "hdf5plugin does not have it: set HDF5_PLUGIN_PATH to the folder of its plugin, or write the file anew with gzip"
    return MissingPartError(f"{where}, which is not installed", hint)
