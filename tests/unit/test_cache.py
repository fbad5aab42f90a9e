"""The cache: who uses what, what goes first, what the command line says."""

import getpass
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from staging_samples import SEGMENT, left_in, make_set, stage_set, tree_of

from hpcutils.cli.cache import cache as cache_commands
from hpcutils.cli.stage import stage as stage_commands
from hpcutils.errors import DataError, HpcutilsError
from hpcutils.staging import cache, private, store
from hpcutils.staging.dataset import dataset_of_manifest
from hpcutils.staging.find import find_files
from hpcutils.staging.items import Item
from hpcutils.staging.look import place_of
from hpcutils.staging.manifest import read_manifest, write_manifest
from hpcutils.staging.owner import Owner, is_alive, owner_in, this_process
from hpcutils.staging.private import open_root
from hpcutils.staging.stage import stage as stage_file
from hpcutils.staging.store import MARKER, Place


def staged(folder: Path, name: str, root: Path, used_s: int, size: int = 1000) -> Place:
    """Stage a dataset of one file that was last used at `used_s`, by a process that is gone."""
    source = folder / name
    source.mkdir()
    (source / "data").write_bytes(os.urandom(size))
    manifest = write_manifest(find_files([source]), folder / f"{name}.jsonl")
    stage_set(manifest.path, source, root)
    place = place_of(dataset_of_manifest(manifest), root)
    cache.unpin(place)
    os.utime(place.entry / MARKER, (used_s, used_s))
    return place


def invoke(group: str, *words: object, **options) -> Result:
    commands = {"cache": cache_commands, "stage": stage_commands}[group]
    return CliRunner().invoke(commands, [*map(str, words)], **options)


def hpcutils(*words: object) -> dict:
    done = invoke(*words, "--json", catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def dead_owner() -> Owner:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    return replace(this_process(), pid=int(child.stdout))


def test_where_the_cache_is(tmp_path, monkeypatch):
    own = f"hpcutils-{getpass.getuser()}/cache"
    monkeypatch.setenv("HPCUTILS_SITE_CONFIG", "")
    for name in ("HPCUTILS_NODE_CACHE", "SLURM_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/some/tmp")
    assert cache.cache_root() == Path("/some/tmp", own)
    monkeypatch.setenv("SLURM_TMPDIR", "/local/job7")
    assert cache.cache_root() == Path("/local/job7", own)
    monkeypatch.setenv("HPCUTILS_NODE_CACHE", str(tmp_path))
    assert cache.cache_root() == tmp_path
    assert cache.cache_root(str(tmp_path / "new")) == tmp_path / "new"
    monkeypatch.delenv("HPCUTILS_NODE_CACHE")
    (tmp_path / "site.toml").write_text(f'[folders]\nnode_local = "{tmp_path}/$SOMEBODY"\n')
    monkeypatch.setenv("SOMEBODY", "me")
    monkeypatch.setenv("HPCUTILS_SITE_CONFIG", str(tmp_path / "site.toml"))
    assert cache.cache_root() == tmp_path / "me"
    monkeypatch.setenv("HPCUTILS_NODE_CACHE", str(tmp_path))
    assert cache.cache_root() == tmp_path
    # A disk for all belongs to somebody else.
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert cache.cache_root() == tmp_path / own


@pytest.mark.parametrize("host", ["node-1", "a", "x-1-2-3"])
def test_owners_are_read_back(host):
    owner = Owner(host, 12, 345, "678_9", "0123abcd")
    assert owner_in(str(owner)) == owner
    assert owner_in("nobody") is None


def test_who_is_alive():
    mine = this_process()
    assert is_alive(mine, 0.0)
    assert not is_alive(replace(mine, start_ticks=mine.start_ticks + 1), 0.0)  # the number came back
    assert not is_alive(dead_owner(), 0.0)
    elsewhere = replace(mine, host="elsewhere")
    assert not is_alive(elsewhere, 0.0)
    assert is_alive(elsewhere, 2**33)


def test_the_least_recently_used_goes_when_the_quota_is_full(tmp_path):
    root = tmp_path / "cache"
    old, new = staged(tmp_path, "old", root, 1000), staged(tmp_path, "new", root, 2000)
    source, manifest = make_set(tmp_path)
    size = read_manifest(manifest).total.size_bytes
    stage_set(manifest, source, root, quota_bytes=size + 1000)
    assert (old.entry.exists(), new.entry.exists()) == (False, True)
    assert left_in(root) == []


def test_a_pinned_dataset_stays(tmp_path):
    root = tmp_path / "cache"
    old, new = staged(tmp_path, "old", root, 1000), staged(tmp_path, "new", root, 2000)
    cache.pin(old)
    source, manifest = make_set(tmp_path)
    size = read_manifest(manifest).total.size_bytes
    stage_set(manifest, source, root, quota_bytes=size + 1000)
    assert (old.entry.exists(), new.entry.exists()) == (True, False)
    assert not cache.evict(old)


def test_the_pin_of_a_dead_process_is_none(tmp_path):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    pin = cache.pin(place)
    pin.rename(pin.with_name(f"{place.kind}.{place.key}.{dead_owner()}"))
    assert cache.pins_of(place) == ()
    assert list((tmp_path / "cache" / "pins").iterdir()) == []
    assert cache.evict(place)


def test_pins_of_dead_processes_are_swept_though_their_dataset_went(tmp_path):
    pins = tmp_path / "pins"
    mine = cache.pin(Place(tmp_path, "manifest", "k"))
    (pins / f"manifest.gone.{dead_owner()}").touch()
    (pins / f"sha256.gone.{replace(dead_owner(), host='node1.cluster.example')}").touch()
    cache.sweep(tmp_path)
    assert sorted(path.name for path in pins.iterdir()) == sorted(
        [mine.name, *(path.name for path in pins.glob("*node1.cluster.example*"))]
    )
    assert len(list(pins.iterdir())) == 2


def test_a_process_pins_once(tmp_path):
    place = Place(tmp_path, "manifest", "k")
    assert cache.pin(place) == cache.pin(place)
    assert len(cache.pins_of(place)) == 1


def test_a_pin_that_comes_after_the_first_look_is_honoured(tmp_path, monkeypatch):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    looks, pins_of = [], cache.pins_of

    def pinned_meanwhile(where: Place) -> tuple[str, ...]:
        found = pins_of(where)
        if not looks:
            # The job finds the dataset, which it pinned: from here on its files must stay where they are.
            cache.pin(place)
            assert store.is_intact(place.entry)
        looks.append((place.files / "data").stat().st_ino)
        return found

    monkeypatch.setattr(cache, "pins_of", pinned_meanwhile)
    assert not cache.evict(place)
    assert len(looks) == 2
    assert store.is_intact(place.entry)


@pytest.mark.parametrize(
    "folder, mode, said",
    [
        ("cache", 0o770, "can be changed by others"),
        ("cache", 0o702, "can be changed by others"),
        (".", 0o770, "can be changed by others"),
        (".", 0o702, "can be changed by others"),
        (".", 0o1777, None),
        (".", 0o755, None),
    ],
)
def test_a_cache_that_others_could_swap_is_refused(tmp_path, folder, mode, said):
    root = tmp_path / "disk" / "cache"
    root.mkdir(parents=True, mode=0o700)
    (tmp_path / "disk" / folder).chmod(mode)
    if said is None:
        open_root(root)
        return
    with pytest.raises(DataError, match=said):
        open_root(root)


@pytest.mark.parametrize("how", ["a folder of theirs", "a link of theirs"])
def test_a_folder_that_somebody_else_made_in_the_users_name_is_refused(tmp_path, monkeypatch, how):
    (tmp_path / "tmp").mkdir(mode=0o1777)
    own = tmp_path / "tmp" / "hpcutils-alice"
    if how == "a folder of theirs":
        own.mkdir(mode=0o1777)
        own.chmod(0o1777)
    else:
        (tmp_path / "real").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "real")
    honest = os.lstat(own)
    (own / "cache").mkdir(mode=0o700)
    # Alice made the cache; what it is in belongs to the machine's user 12345.
    theirs = os.stat_result((honest.st_mode, *honest[1:4], 12345, *honest[5:10]))
    monkeypatch.setattr(private, "_of_parent", lambda parent: theirs)
    with pytest.raises(DataError, match="can be changed by others"):
        open_root(own / "cache")


def test_staging_and_evicting_at_once_never_leaves_half(tmp_path):
    source, manifest = make_set(tmp_path)
    root, wanted = tmp_path / "cache", tree_of(source)
    stage_set(manifest, source, root)
    place = place_of(dataset_of_manifest(read_manifest(manifest)), root)
    cache.unpin(place)
    stop, went = threading.Event(), threading.Event()

    def evict_again_and_again() -> None:
        while not stop.is_set():
            if cache.evict(place):
                went.set()

    thread = threading.Thread(target=evict_again_and_again)
    thread.start()
    try:
        for _ in range(5):
            files = stage_set(manifest, source, root).files
            # Pinned by this process now: nobody takes it away while it is read.
            assert tree_of(files) == wanted
            went.clear()
            cache.unpin(place)
            assert went.wait(30)
    finally:
        stop.set()
        thread.join()


def test_who_evicts_and_is_killed_leaves_nothing_for_long(tmp_path):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    (place.entry / MARKER).rename(place.entry / f"{MARKER}{store.TRASH}{dead_owner()}")
    assert cache.kept_in(place.root) == []
    assert cache.sweep(place.root) == 1
    assert not place.entry.exists()


def test_trash_of_killed_processes_is_swept(tmp_path):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    place.entry.rename(place.root / place.kind / f".{place.key}{store.TRASH}{dead_owner()}")
    assert cache.sweep(place.root) == 1
    assert left_in(place.root) == []


def test_the_command_line(tmp_path):
    root = tmp_path / "cache"
    old, new = staged(tmp_path, "old", root, 1000), staged(tmp_path, "new", root, 2000)
    cache.pin(new)
    listed = hpcutils("cache", "list", "--cache", root)["datasets"]
    assert [(each["name"], len(each["pins"])) for each in listed] == [("old.jsonl", 0), ("new.jsonl", 1)]
    assert hpcutils("cache", "size", "--cache", root) | {"free_bytes": 0} == {
        "datasets": 2, "size_bytes": 2000, "damaged": 0, "left": 0, "left_bytes": 0, "free_bytes": 0,
    }  # fmt: skip
    assert [each["wrong"] for each in hpcutils("cache", "verify", "--cache", root)["datasets"]] == [[], []]
    assert hpcutils("cache", "evict", "--all", "--cache", root) == {"removed": [old.key], "in_use": [new.key]}
    said = invoke("cache", "list", "--cache", root).output
    assert said.split()[:7] == [new.key[:12], "1000", "B", "1", "files", "used", "1970-01-01"]
    assert said.rstrip().endswith("new.jsonl  in use by 1")


def left(folder: Path, name: str, root: Path, files: int = 3) -> Place:
    """Leave the partial of a job that was killed: of `files` segments of 64 KiB."""
    place = Place(root, "manifest", name * 64)
    partial = root / "manifest" / f".{place.key}{store.PART}{dead_owner()}"
    (partial / store.FILES).mkdir(parents=True)
    store.write_finished(partial, SEGMENT, dict.fromkeys(range(files), "0" * 32))
    (partial / store.FILES / "x").write_bytes(os.urandom(files * SEGMENT))
    return place


def test_what_a_killed_job_left_is_shown_and_counted(tmp_path):
    root = tmp_path / "cache"
    staged(tmp_path, "old", root, 1000)
    place = left(tmp_path, "a", root)
    begun = hpcutils("cache", "list", "--cache", root)["datasets"][-1]
    assert (begun["key"], begun["state"], begun["size_bytes"]) == (place.key, "left", 3 * SEGMENT)
    sizes = hpcutils("cache", "size", "--cache", root)
    assert (sizes["datasets"], sizes["left"], sizes["left_bytes"]) == (1, 1, 3 * SEGMENT)
    assert "left" in invoke("cache", "list", "--cache", root).output
    assert hpcutils("cache", "evict", place.key[:9], "--cache", root) == {"removed": [place.key], "in_use": []}
    assert left_in(root) == []


def test_what_a_killed_job_left_goes_before_any_dataset(tmp_path):
    root = tmp_path / "cache"
    old = staged(tmp_path, "old", root, 1000)
    left(tmp_path, "a", root)
    source, manifest = make_set(tmp_path)
    stage_set(manifest, source, root, quota_bytes=read_manifest(manifest).total.size_bytes + 1000)
    assert left_in(root) == []
    assert old.entry.exists()


def test_what_a_running_job_is_at_counts_and_stays(tmp_path):
    root = tmp_path / "cache"
    place = left(tmp_path, "a", root)
    (partial,) = store.hidden(root, "manifest")
    partial.rename(partial.with_name(f".{place.key}{store.PART}{this_process()}"))
    source, manifest = make_set(tmp_path)
    size = read_manifest(manifest).total.size_bytes
    with pytest.raises(DataError, match="no room"):
        stage_set(manifest, source, root, quota_bytes=size + 1000)
    assert hpcutils("cache", "evict", "--all", "--cache", root) == {"removed": [], "in_use": [place.key]}
    stage_set(manifest, source, root, quota_bytes=size + 3 * SEGMENT)


def test_a_dataset_whose_marker_is_empty_is_shown_and_can_go(tmp_path):
    root = tmp_path / "cache"
    place = staged(tmp_path, "old", root, 1000)
    os.truncate(place.entry / MARKER, 0)
    (shown,) = hpcutils("cache", "list", "--cache", root)["datasets"]
    assert (shown["key"], shown["state"], shown["size_bytes"] > 0) == (place.key, "damaged", True)
    assert hpcutils("cache", "size", "--cache", root)["damaged"] == 1
    done = invoke("cache", "verify", "--cache", root)
    assert isinstance(done.exception, HpcutilsError)
    assert done.exception.exit_code == 6
    assert hpcutils("cache", "evict", place.key, "--cache", root)["removed"] == [place.key]
    assert not place.entry.exists()


def test_a_dataset_that_goes_while_it_is_looked_at(tmp_path, monkeypatch):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    honest = store.read_head

    def gone(entry: Path):
        found = honest(entry)
        cache.evict(place)
        return found

    monkeypatch.setattr(store, "read_head", gone)
    assert [kept.name for kept in cache.kept_in(place.root)] == ["old.jsonl"]
    assert cache.kept_in(place.root) == []


@pytest.mark.parametrize(
    "words, code", [(("evict",), 2), (("evict", "x"), 2), (("verify", "nothing"), 2), (("evict", "x", "--all"), 2)]
)
def test_what_the_command_line_refuses(tmp_path, words, code):
    done = invoke("cache", *words, "--cache", tmp_path)
    assert isinstance(done.exception, HpcutilsError)
    assert done.exception.exit_code == code


def test_verify_names_what_changed(tmp_path):
    place = staged(tmp_path, "old", tmp_path / "cache", 1000)
    facts = (place.files / "data").stat()
    (place.files / "data").write_bytes(b"\0" * 1000)
    os.utime(place.files / "data", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    done = invoke("cache", "verify", "old.jsonl", "--cache", place.root)
    assert isinstance(done.exception, HpcutilsError)
    assert done.exception.exit_code == 6
    assert "old.jsonl: data" in done.output


def test_manifest_and_plan_on_the_command_line(tmp_path):
    source, _ = make_set(tmp_path)
    root = tmp_path / "cache"
    made = hpcutils("stage", "manifest", source, "-o", tmp_path / "m.jsonl", "--segment-mib", 1)
    assert (made["files"], made["segments"], made["source"]) == (14, 1, str(source))
    (plan,) = hpcutils("stage", "plan", made["path"], "--cache", root, "--rate", 1)["plans"]
    assert (plan["state"], plan["move_bytes"], plan["lacking_bytes"]) == ("missing", made["size_bytes"], 0)
    assert plan["seconds"] == pytest.approx(made["size_bytes"] / (1 << 20))
    outcome = stage_set(Path(made["path"]), source, root)
    (plan,) = hpcutils("stage", "plan", made["path"], "--cache", root, "--verify")["plans"]
    assert (plan["state"], plan["target"]) == ("present", str(outcome.files.parent))


def test_the_plan_of_a_job(tmp_path):
    (tmp_path / "train.h5").write_bytes(os.urandom(1000))
    (tmp_path / "other.h5").write_bytes(os.urandom(500))
    (tmp_path / "model.py").write_text("def build(): ...\n")
    hpcutils("stage", "manifest", tmp_path / "train.h5", "-o", tmp_path / "m.jsonl")
    (tmp_path / "train.yaml").write_text(
        "name: x\ndata: {files: [{path: train.h5}, {path: other.h5}], x: train.h5:a, y: other.h5:b}\n"
        "model: {function: model.py:build}\ntraining: {epochs: 1, batch_size: 1, loss: mse}\nstaging: {manifest: m.jsonl}\n"
    )
    plans = hpcutils("stage", "plan", tmp_path / "train.yaml", "--cache", tmp_path / "cache")["plans"]
    assert [(plan["name"], plan["move_bytes"]) for plan in plans] == [("m.jsonl", 1000), ("other.h5", 500)]


def test_the_plan_of_a_job_is_made_with_its_settings(tmp_path):
    (tmp_path / "train.h5").write_bytes(body := os.urandom(1000))
    (tmp_path / "model.py").write_text("def build(): ...\n")
    item = Item("train.h5", str(tmp_path / "train.h5"), hashlib.sha256(body).hexdigest())
    path = stage_file(item, tmp_path / "own").path
    facts = path.stat()
    path.write_bytes(bytes(1000))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    staging = f"{{cache: {tmp_path}/own, quota_gb: 0.0000005, verify: true}}"
    (tmp_path / "train.yaml").write_text(
        f"name: x\ndata: {{files: [{{path: train.h5, sha256: {item.sha256}}}], x: 'train.h5:a', y: 'train.h5:b'}}\n"
        f"model: {{function: model.py:build}}\ntraining: {{epochs: 1, batch_size: 1, loss: mse}}\nstaging: {staging}\n"
    )
    (plan,) = hpcutils("stage", "plan", tmp_path / "train.yaml")["plans"]
    assert plan["target"] == str(path.parents[1])
    assert (plan["state"], plan["lacking_bytes"]) == ("corrupt", 500)
    (plan,) = hpcutils("stage", "plan", tmp_path / "train.yaml", "--cache", tmp_path / "other", "--quota-gb", 1)["plans"]
    assert (plan["state"], plan["lacking_bytes"]) == ("missing", 0)
