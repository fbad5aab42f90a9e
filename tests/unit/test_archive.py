"""Hostile archives: each is built for real, and refused as a whole; honest ones come out as they went in."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import names_in

from hpcutils.errors import ArchiveError
from hpcutils.staging.archive import unpack
from hpcutils.staging.get_file import get_file
from hpcutils.staging.members import Forward, Limits

USUAL = Limits(unpacked_bytes=1 << 24, members=1000)
FORMATS = ("tar", "zip")


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, size: int = 0) -> tarfile.TarInfo:
    """Return a header of a tar."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.mode, header.size = kind, link, mode, size
    return header


def tar(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return a tar of headers, and of headers with their content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as pack:
        for member in members:
            header, content = member if isinstance(member, tuple) else (member, b"")
            header.size = header.size or len(content)
            pack.addfile(header, io.BytesIO(content) if content else None)
    return out.getvalue()


def zipped(*members: tuple[str, int, bytes]) -> bytes:
    """Return a zip of (name, Unix mode with its kind, content)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, mode, content in members:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.create_system, entry.compress_type = mode << 16, 3, zipfile.ZIP_DEFLATED
            pack.writestr(entry, content)
    return out.getvalue()


def raw_header(kind: bytes, size: int) -> bytes:
    return info("x", kind, size=size).tobuf(tarfile.GNU_FORMAT)


def lying_zip(claimed: int) -> bytes:
    """Return a zip whose only member, 1000 bytes long, claims another size."""
    packed = zipped(("a", 0, b"a" * 1000))
    return packed.replace(struct.pack("<L", 1000), struct.pack("<L", claimed))


def encrypted_zip() -> bytes:
    packed = bytearray(zipped(("a", 0, b"a")))
    packed[6] |= 1
    packed[packed.index(b"PK\1\2") + 8] |= 1
    return bytes(packed)


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
GOOD = (info("d/good.txt"), b"good" * 300)
ZEROS = bytes(1 << 25)

ATTACKS: dict[str, bytes] = {
    "absolute name": tar(GOOD, (info("/tmp/hpcutils-evil"), b"evil")),
    "absolute folder": tar(GOOD, info("/tmp/hpcutils-evil", tarfile.DIRTYPE, mode=0o755)),
    "dotdot": tar(GOOD, (info("../evil"), b"evil")),
    "dotdot inside": tar(GOOD, (info("d/../../evil"), b"evil")),
    "dotdot that stays": tar(GOOD, (info("d/../evil"), b"evil")),
    "dotdot folder": tar(GOOD, info("../evil", tarfile.DIRTYPE, mode=0o755)),
    "backslash": tar(GOOD, (info("..\\evil"), b"evil")),
    "drive letter": tar(GOOD, (info("C:\\evil"), b"evil")),
    "no name": tar(GOOD, (info("./"), b"evil")),
    "zip absolute": zipped(("good", 0, b"g"), ("/tmp/hpcutils-evil", 0, b"evil")),
    "zip dotdot": zipped(("good", 0, b"g"), ("a/../../evil", 0, b"evil")),
    "zip dotdot folder": zipped(("good", 0, b"g"), ("../evil/", stat.S_IFDIR | 0o755, b"")),
    "symlink absolute": tar(GOOD, info("l", LINK, "/etc/passwd")),
    "symlink dotdot": tar(GOOD, info("d/l", LINK, "../../evil")),
    "symlink to the cache itself": tar(GOOD, info("l", LINK, "..")),
    "symlink by a detour": tar(GOOD, info("d/p", LINK, ".."), info("l", LINK, "d/p/../evil")),
    "symlink up a chain": tar(
        GOOD, info("a/b/c/up", LINK, "../../.."), info("a/b/c/out", LINK, "up/../../secret")
    ),
    "symlink to nothing": tar(GOOD, info("l", LINK, "missing")),
    "symlink to itself": tar(GOOD, info("l", LINK, "l")),
    "symlink without words": tar(GOOD, info("l", LINK, "")),
    "file through a symlink": tar(GOOD, info("l", LINK, "d"), (info("l/evil"), b"evil")),
    "file through a symlink out": tar(GOOD, info("l", LINK, "/tmp"), (info("l/hpcutils-evil"), b"evil")),
    "file over a symlink": tar(GOOD, info("l", LINK, "d/good.txt"), (info("l"), b"evil")),
    "symlink over a file": tar(GOOD, info("d/good.txt", LINK, "../d")),
    "symlink over a folder": tar(GOOD, info("d", LINK, ".")),
    "symlink through a symlink": tar(GOOD, info("l", LINK, "d"), info("l/m", LINK, "good.txt")),
    "file over a folder": tar(GOOD, (info("d"), b"evil")),
    "folder over a file": tar(GOOD, (info("d/good.txt/evil"), b"evil")),
    "hard link absolute": tar(GOOD, info("h", HARD, "/etc/passwd")),
    "hard link dotdot": tar(GOOD, info("h", HARD, "../secret")),
    "hard link through a symlink": tar(GOOD, info("l", LINK, ".."), info("h", HARD, "l/secret")),
    "hard link to a symlink": tar(GOOD, info("l", LINK, "d/good.txt"), info("h", HARD, "l")),
    "hard link to what comes later": tar(info("h", HARD, "d/good.txt"), GOOD),
    "hard link to itself": tar(GOOD, info("d/good.txt", HARD, "d/good.txt")),
    "hard link to a folder": tar(GOOD, info("h", HARD, "d")),
    "zip symlink absolute": zipped(("l", stat.S_IFLNK | 0o777, b"/etc/passwd")),
    "zip symlink dotdot": zipped(("d/l", stat.S_IFLNK | 0o777, b"../../evil")),
    "zip file through a symlink": zipped(("l", stat.S_IFLNK | 0o777, b"/tmp"), ("l/hpcutils-evil", 0, b"evil")),
    "zip symlink of many bytes": zipped(("l", stat.S_IFLNK | 0o777, b"a/" * 3000)),
    "character device": tar(GOOD, info("null", tarfile.CHRTYPE)),
    "block device": tar(GOOD, info("disk", tarfile.BLKTYPE)),
    "pipe": tar(GOOD, info("pipe", tarfile.FIFOTYPE)),
    "unknown kind": tar(GOOD, info("x", b"Z")),
    "zip device": zipped(("null", stat.S_IFCHR | 0o666, b"")),
    "zip pipe": zipped(("pipe", stat.S_IFIFO | 0o666, b"")),
    "set-uid": tar(GOOD, (info("su", mode=0o4755), b"evil")),
    "set-gid": tar(GOOD, (info("sg", mode=0o2755), b"evil")),
    "set-uid folder": tar(GOOD, info("su", tarfile.DIRTYPE, mode=0o4755)),
    "zip set-uid": zipped(("su", stat.S_IFREG | 0o4755, b"evil")),
    "deep": tar(GOOD, (info("a/" * 1500 + "x"), b"evil")),
    "claims 5 GiB": tar(GOOD, info("big", size=5 << 30))[:4096],
    "negative size": tar(GOOD)[:2048] + raw_header(tarfile.REGTYPE, -1024) + bytes(1024),
    "negative header": tar(GOOD)[:2048] + raw_header(tarfile.XHDTYPE, -1024) + bytes(1024),
    "header of 2 MiB": raw_header(tarfile.XHDTYPE, 2 << 20) + bytes(2 << 20),
    "long name of 2 MiB": raw_header(tarfile.GNUTYPE_LONGNAME, 2 << 20) + b"x" * (2 << 20),
    "gzip cut off": gzip.compress(tar(GOOD))[:-12],
    "gzip checksum": gzip.compress(tar(GOOD))[:-8] + bytes(8),
    "bzip2 cut off": bz2.compress(tar(GOOD))[:-12],
    "xz cut off": lzma.compress(tar(GOOD))[:-12],
    "tar cut off in a file": tar(GOOD)[:1000],
    "tar cut off in a header": tar(GOOD, (info("e"), b"e"))[:2200],
    "tar with a spoilt header": tar(GOOD)[:2048] + b"garbage" * 73 + b"!" + bytes(1024),
    "zip cut off": zipped(("a", 0, os.urandom(3000)))[:2000],
    "zip checksum": zipped(("a", 0, b"abc")).replace(struct.pack("<L", zlib.crc32(b"abc")), b"\1\2\3\4"),
    "zip spoilt": zipped(("a", 0, b"a" * 1000)).replace(b"KL\x1c\x05\xa3", b"KL\xff\xff\xa3"),
    "zip that claims less": lying_zip(10),
    "zip that claims more": lying_zip(2000),
    "zip encrypted": encrypted_zip(),
    "not an archive": b"plain text " * 100,
    "empty": b"",
}  # fmt: skip

# Where another check would also have refused, in other words or later.
WORDS = {
    "absolute name": "absolute",
    "dotdot": "'..' in its name",
    "file through a symlink": "passes through the link 'l'",
    "file over a symlink": "passes through the link 'l'",
    "symlink absolute": "outside the archive",
    "symlink up a chain": "ends outside the archive",
    "header of 2 MiB": "header of 2097152 bytes",
    "long name of 2 MiB": "header of 2097152 bytes",
    "deep": "deeper than 100",
    "pipe": "device, a pipe",
}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of everything below `folder`."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.timeout(20)
def test_an_attack_leaves_no_trace(tmp_path: Path, name: str) -> None:
    (tmp_path / "packed").write_bytes(ATTACKS[name])
    cache = tmp_path / "keras" / "datasets"
    (cache / "d").mkdir(parents=True)
    (cache / "d" / "precious").write_bytes(b"precious")
    (tmp_path / "keras" / "secret").write_bytes(b"secret")
    before = snapshot(tmp_path)
    with pytest.raises(ArchiveError) as caught:
        get_file("x.pack", str(tmp_path / "packed"), extract=True, cache_dir=tmp_path / "keras")
    assert caught.value.hint
    assert WORDS.get(name, "") in caught.value.message
    assert snapshot(tmp_path) == before
    assert not Path("/tmp/hpcutils-evil").exists()


@pytest.mark.parametrize("name", ["dotdot", "symlink absolute", "claims 5 GiB", "gzip cut off"])
def test_an_archive_of_the_cache_stays_when_it_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.pack").write_bytes(ATTACKS[name])
    before = snapshot(tmp_path)
    with pytest.raises(ArchiveError):
        get_file(str(tmp_path / "x.pack"), "http://127.0.0.1/x", extract=True)
    assert snapshot(tmp_path) == before


def unpacked(tmp_path: Path, packed: bytes, limits: Limits = USUAL) -> Path:
    (tmp_path / "packed").write_bytes(packed)
    folder = tmp_path / "tree"
    folder.mkdir()
    unpack(tmp_path / "packed", folder, FORMATS, limits)
    return folder


class TestLimits:
    @pytest.mark.parametrize(
        "packed",
        [
            tar((info("a"), bytes(600)), (info("b"), bytes(600))),
            zipped(("a", 0, bytes(600)), ("b", 0, bytes(600))),
        ],
        ids=["tar", "zip"],
    )
    def test_claimed_bytes(self, tmp_path: Path, packed: bytes) -> None:
        with pytest.raises(ArchiveError, match="claims 1200 bytes; 1100 are allowed" if packed[:2] == b"PK" else "1100"):
            unpacked(tmp_path, packed, Limits(unpacked_bytes=1100))

    def test_a_zip_is_refused_before_a_byte_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError):
            unpacked(tmp_path, zipped(("a", 0, bytes(600)), ("b", 0, bytes(600))), Limits(unpacked_bytes=1100))
        assert snapshot(tmp_path / "tree") == {}

    def test_unpacked_bytes_that_no_member_claims(self, tmp_path: Path) -> None:
        # 32 MiB of zeros after the end of the archive: 32 KiB packed.
        packed = gzip.compress(tar(GOOD) + ZEROS)
        assert len(packed) < 50_000
        with pytest.raises(ArchiveError, match="unpacks to"):
            unpacked(tmp_path, packed, Limits(unpacked_bytes=1 << 20))

    def test_a_sparse_file_counts_as_what_it_becomes(self, tmp_path: Path) -> None:
        header = bytearray(info("sparse", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"%011o\0" % (1 << 26)
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(ArchiveError, match="claims 67108864 bytes"):
            unpacked(tmp_path, bytes(header) + bytes(1024))

    @pytest.mark.parametrize("count", [5, 6])
    @pytest.mark.parametrize("kind", ["tar", "zip"])
    def test_members(self, tmp_path: Path, kind: str, count: int) -> None:
        names = [f"{number}" for number in range(count)]
        packed = tar(*map(info, names)) if kind == "tar" else zipped(*((name, 0, b"") for name in names))
        limits = Limits(unpacked_bytes=1 << 20, members=5)
        if count > 5:
            with pytest.raises(ArchiveError, match="more than 5 members"):
                unpacked(tmp_path, packed, limits)
            # A zip says at once how many there are; a tar is read to find out.
            assert len(names_in(tmp_path / "tree")) == (0 if kind == "zip" else 5)
        else:
            assert names_in(unpacked(tmp_path, packed, limits)) == names

    def test_reading_goes_forward_only(self) -> None:
        forward = Forward(io.BytesIO(b"0123456789"), USUAL)
        assert (forward.read(4), forward.seek(3), forward.read(2), forward.seek(8), forward.read(9)) == (
            b"0123",
            3,
            b"34",
            8,
            b"89",
        )
        with pytest.raises(ArchiveError, match="negative"):
            forward.seek(2)

    def test_the_usual_ones_grow_with_the_archive(self, tmp_path: Path) -> None:
        with (tmp_path / "x").open("wb") as stream:
            stream.truncate(1 << 30)
        assert Limits.of(tmp_path / "x").unpacked_bytes == 50 << 30
        os.truncate(tmp_path / "x", 10)
        assert Limits.of(tmp_path / "x").unpacked_bytes == 4 << 30


class TestHonest:
    @pytest.mark.parametrize("squeeze", [bytes, gzip.compress, bz2.compress, lzma.compress])
    def test_tar(self, tmp_path: Path, squeeze: Callable[[bytes], bytes]) -> None:
        long_name = "d/" + "n" * 200
        folder = unpacked(
            tmp_path,
            squeeze(
                tar(
                    info("./", tarfile.DIRTYPE),
                    info("empty/", tarfile.DIRTYPE, mode=0o2775),
                    GOOD,
                    (info("./run.sh", mode=0o700), b"#!/bin/sh"),
                    (info(long_name), b"long"),
                    info("none"),
                    (info("big"), bytes(3_000_000)),
                    info("d/e/up", LINK, "../../d/good.txt"),
                    info("folder", LINK, "d"),
                    info("chain", LINK, "folder"),
                    info("hard", HARD, "d/good.txt"),
                )
            ),
        )
        assert (folder / "d/good.txt").read_bytes() == (folder / "d/e/up").read_bytes() == GOOD[1]
        assert (folder / "chain/good.txt").samefile(folder / "hard")
        assert (folder / "hard").stat().st_nlink == 2
        assert (folder / long_name).read_bytes() == b"long"
        assert (folder / "big").stat().st_size == 3_000_000
        assert (folder / "none").read_bytes() == b""
        assert (folder / "folder").readlink() == Path("d")
        assert names_in(folder / "empty") == []

    def test_rights_are_those_of_the_umask(self, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            folder = unpacked(
                tmp_path,
                tar((info("run", mode=0o777), b"x"), (info("shut", mode=0), b"x"), info("d", tarfile.DIRTYPE, mode=0o2777)),
            )
        finally:
            os.umask(old)
        modes = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in ("run", "shut", "d")}
        assert modes == {"run": 0o750, "shut": 0o640, "d": 0o750}

    def test_the_later_of_two_files_wins(self, tmp_path: Path) -> None:
        folder = unpacked(tmp_path, tar((info("a"), b"1"), info("h", HARD, "a"), (info("a"), b"2")))
        assert ((folder / "a").read_bytes(), (folder / "h").read_bytes()) == (b"2", b"1")

    def test_zip(self, tmp_path: Path) -> None:
        folder = unpacked(
            tmp_path,
            zipped(
                ("d/", stat.S_IFDIR | 0o755, b""),
                ("d/run.sh", stat.S_IFREG | 0o755, b"#!/bin/sh"),
                ("자료.txt", 0, b"text"),
                ("link", stat.S_IFLNK | 0o777, b"d/run.sh"),
            ),
        )
        assert os.access(folder / "d" / "run.sh", os.X_OK)
        assert (folder / "link").readlink() == Path("d/run.sh")
        assert (folder / "자료.txt").read_bytes() == b"text"

    def test_pax_headers(self, tmp_path: Path) -> None:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as pack:
            header = info("자료/" + "x" * 200)
            header.pax_headers = {"comment": "y" * 2000}
            header.size = 3
            pack.addfile(header, io.BytesIO(b"abc"))
        folder = unpacked(tmp_path, out.getvalue())
        assert (folder / header.name).read_bytes() == b"abc"

    def test_many_empty_members_are_read_once(self, tmp_path: Path) -> None:
        # tarfile steps back a byte before each header; on a gzip that can mean to start again from the beginning.
        folder = unpacked(tmp_path, gzip.compress(tar(*(info(f"d{number}/", tarfile.DIRTYPE) for number in range(900)))))
        assert len(names_in(folder)) == 900

    def test_what_was_made_is_listed(self, tmp_path: Path) -> None:
        (tmp_path / "packed").write_bytes(tar(GOOD, info("e/", tarfile.DIRTYPE), info("l", LINK, "d")))
        (tmp_path / "tree").mkdir()
        assert unpack(tmp_path / "packed", tmp_path / "tree", FORMATS, USUAL) == ["d/good.txt", "l"]
