"""One suite for every blob store."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.store.blobs import BlobStore, BucketBlobs, FolderBlobs, materialise, open_blobs
from bitwright.errors import DiskFull, StorageError

ABSENT = "0" * 64
CHUNK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)


def _bucket(folder: Path) -> BlobStore:
    from obstore.store import LocalStore

    folder.mkdir()
    return BucketBlobs(LocalStore(str(folder)))


def _memory(folder: Path) -> BlobStore:
    from obstore.store import MemoryStore

    return BucketBlobs(MemoryStore())


STORES: dict[str, Callable[[Path], BlobStore]] = {"folder": FolderBlobs, "bucket": _bucket, "memory": _memory}


@pytest.fixture(params=STORES)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return STORES[request.param](tmp_path / "blobs")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        path = tmp_path / f"source-{hashlib.sha256(content).hexdigest()[:8]}"
        path.write_bytes(content)
        return path

    return to_file


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 17])
def test_what_was_put_is_read(blobs: BlobStore, write: Callable[[bytes], Path], size: int) -> None:
    content = os.urandom(size)
    blob = blobs.put(write(content))
    assert (blob.sha256, blob.size) == (hashlib.sha256(content).hexdigest(), size)
    with blobs.open(blob.sha256) as reader:
        assert reader.read() == content
    with blobs.open(blob.sha256, start=size // 2) as reader:
        assert reader.read() == content[size // 2 :]
    assert b"".join(blobs.read_range(blob.sha256, 0, size)) == content
    assert b"".join(blobs.read_range(blob.sha256, size // 3, size - size // 4)) == content[size // 3 : size - size // 4]
    assert blobs.exists(blob.sha256)


def test_equal_bytes_are_one_blob(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    first, second = blobs.put(write(b"same")), blobs.put(write(b"same"))
    other = blobs.put(write(b"other"))
    assert first == second
    assert sorted((entry.sha256, entry.size) for entry in blobs.entries()) == sorted(
        [(first.sha256, 4), (other.sha256, 5)]
    )


def test_putting_again_makes_a_blob_new(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    blob = blobs.put(write(b"x"))
    place = blobs.path(blob.sha256)
    if place is not None:
        os.utime(place, (1, 1))
    before = blobs.modified(blob.sha256)
    blobs.put(write(b"x"))
    after = blobs.modified(blob.sha256)
    assert before is not None
    assert after is not None
    assert after >= before
    assert abs(datetime.now(UTC) - after) < timedelta(minutes=1)
    assert [entry.modified for entry in blobs.entries()] == [after]


def test_a_deleted_blob_is_gone(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    kept, blob = blobs.put(write(b"kept")), blobs.put(write(b"x"))
    for _ in range(2):
        blobs.delete(blob.sha256)
    assert not blobs.exists(blob.sha256)
    assert blobs.modified(blob.sha256) is None
    assert [entry.sha256 for entry in blobs.entries()] == [kept.sha256]
    with pytest.raises(StorageError):
        blobs.open(blob.sha256)


def test_an_absent_blob_is_a_storage_error(blobs: BlobStore, tmp_path: Path) -> None:
    assert not blobs.exists(ABSENT)
    for read in (lambda: blobs.open(ABSENT), lambda: list(blobs.read_range(ABSENT, 0, 1))):
        with pytest.raises(StorageError):
            read()
    with pytest.raises(StorageError):
        blobs.put(tmp_path / "no such file")
    assert list(blobs.entries()) == []


def test_a_blob_that_is_too_short_is_noticed(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    blob = blobs.put(write(b"12345"))
    with pytest.raises(StorageError, match="1 bytes shorter"):
        list(blobs.read_range(blob.sha256, 0, 6))


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65, "a/" * 32, "\0" * 64]
)
def test_only_a_hash_names_a_blob(blobs: BlobStore, name: str) -> None:
    uses = (blobs.open, blobs.exists, blobs.delete, blobs.path, blobs.modified)
    for use in (*uses, lambda n: list(blobs.read_range(n, 0, 1))):
        with pytest.raises(StorageError, match="hexadecimal"):
            use(name)


def test_many_may_put_the_same_bytes_at_once(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    source = write(os.urandom(3 * CHUNK))
    start = threading.Barrier(6)

    def put(_: int) -> str:
        start.wait()
        return blobs.put(source).sha256

    with ThreadPoolExecutor(6) as pool:
        names = set(pool.map(put, range(6)))
    assert len(names) == 1
    with blobs.open(names.pop()) as reader:
        assert reader.read() == source.read_bytes()
    assert len(list(blobs.entries())) == 1


def test_a_put_that_is_killed_leaves_no_blob(tmp_path: Path) -> None:
    source = tmp_path / "fifo"
    os.mkfifo(source)
    code = "import sys, pathlib; from app.store.blobs import FolderBlobs; "
    code += "FolderBlobs(pathlib.Path(sys.argv[1])).put(pathlib.Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "b"), str(source)])
    with source.open("wb") as pipe:
        pipe.write(b"x" * CHUNK)
        pipe.flush()
        process.kill()
        process.wait()
    blobs = FolderBlobs(tmp_path / "b")
    assert list(blobs.entries()) == []
    assert not blobs.exists(hashlib.sha256(b"x" * CHUNK).hexdigest())
    assert len(list((tmp_path / "b" / "incoming").iterdir())) == 1
    blobs.tidy(datetime.now(UTC) - timedelta(hours=1))
    assert len(list((tmp_path / "b" / "incoming").iterdir())) == 1, "it may still be written"
    blobs.tidy(datetime.now(UTC) + timedelta(hours=1))
    assert list((tmp_path / "b" / "incoming").iterdir()) == []


class TestAFileThatIsGiven:
    def test_it_becomes_the_blob_and_nothing_else_has_its_bytes(
        self, tmp_path: Path, write: Callable[[bytes], Path]
    ) -> None:
        blobs, source = FolderBlobs(tmp_path / "b"), write(b"given")
        number = source.stat().st_ino
        os.utime(source, (1, 1))
        blob = blobs.put(source, give=True)
        place = blobs.path(blob.sha256)
        assert place is not None
        assert (place.stat().st_ino, place.stat().st_nlink) == (number, 1)
        assert not source.exists()
        assert blob.sha256 == hashlib.sha256(b"given").hexdigest()
        assert list((tmp_path / "b" / "incoming").iterdir()) == []
        modified = blobs.modified(blob.sha256)
        assert modified is not None
        assert datetime.now(UTC) - modified < timedelta(minutes=1), "as old as its put, or garbage would take it"

    def test_what_is_written_to_its_path_later_changes_no_blob(
        self, blobs: BlobStore, write: Callable[[bytes], Path]
    ) -> None:
        source = write(b"before")
        blob = blobs.put(source, give=True)
        source.write_bytes(b"after!")
        with blobs.open(blob.sha256) as reader:
            assert reader.read() == b"before"

    @pytest.mark.parametrize("kind", ["hard", "symbolic"])
    def test_one_that_has_another_name_is_copied(
        self, tmp_path: Path, write: Callable[[bytes], Path], kind: str
    ) -> None:
        """The other name may be a user's, who writes to it next."""
        blobs, own = FolderBlobs(tmp_path / "b"), write(b"mine")
        output = tmp_path / "output"
        (output.hardlink_to if kind == "hard" else output.symlink_to)(own)
        blob = blobs.put(output, give=True)
        with own.open("r+b") as file:
            file.write(b"YOUR")
        with blobs.open(blob.sha256) as reader:
            assert reader.read() == b"mine"
        assert own.read_bytes() == b"YOUR"

    def test_one_on_another_disk_is_copied(
        self, tmp_path: Path, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blobs, source, replace = FolderBlobs(tmp_path / "b"), write(b"far"), Path.replace

        def other_disk(path: Path, target: Path) -> Path:
            if path == source:
                raise OSError(errno.EXDEV, "another disk")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", other_disk)
        blob = blobs.put(source, give=True)
        assert source.read_bytes() == b"far"
        with blobs.open(blob.sha256) as reader:
            assert reader.read() == b"far"

    def test_its_bytes_are_read_once(
        self, tmp_path: Path, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blobs, source, sizes, sha256 = FolderBlobs(tmp_path / "b"), write(b"x" * 3 * CHUNK), list[int](), hashlib.sha256

        class Counting:
            def __init__(self) -> None:
                self._digest = sha256()

            def update(self, data: bytes) -> None:
                sizes.append(len(data))
                self._digest.update(data)

            def hexdigest(self) -> str:
                return self._digest.hexdigest()

        monkeypatch.setattr("app.store.blobs.hashlib.sha256", Counting)
        blobs.put(source, give=True)
        assert sum(sizes) == 3 * CHUNK

    def test_it_is_on_disk_before_it_has_its_name(
        self, tmp_path: Path, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        blobs, source = FolderBlobs(tmp_path / "b"), write(b"safe")
        synced: list[int] = []
        fsync, replace = os.fsync, Path.replace

        def record(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        def named(place: Path, target: Path) -> Path:
            if target.parent.name != "incoming":
                assert place.stat().st_ino in synced
            return replace(place, target)

        monkeypatch.setattr(os, "fsync", record)
        monkeypatch.setattr(Path, "replace", named)
        blobs.put(source, give=True)
        assert len(synced) == 3


def test_a_file_that_is_no_blob_is_not_listed(tmp_path: Path, write: Callable[[bytes], Path]) -> None:
    blobs = FolderBlobs(tmp_path / "b")
    blob = blobs.put(write(b"x"))
    (tmp_path / "b" / blob.sha256[:2] / ".nfs000000000001").write_bytes(b"")
    assert [entry.sha256 for entry in blobs.entries()] == [blob.sha256]


def test_a_failed_put_leaves_no_file(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "b")
    with pytest.raises(StorageError):
        blobs.put(tmp_path)
    assert [path for path in (tmp_path / "b").rglob("*") if path.is_file()] == []


def test_an_open_reader_outlives_its_blob(tmp_path: Path, write: Callable[[bytes], Path]) -> None:
    blobs = FolderBlobs(tmp_path / "b")
    blob = blobs.put(write(b"12345"))
    with blobs.open(blob.sha256) as reader:
        blobs.delete(blob.sha256)
        assert reader.read() == b"12345"


def test_urls_open_stores(tmp_path: Path, write: Callable[[bytes], Path]) -> None:
    folder = tmp_path / "a b"
    for url in (str(folder), folder.as_uri()):
        assert isinstance(open_blobs(url), FolderBlobs)
    blob = open_blobs(str(folder)).put(write(b"x"))
    assert open_blobs(folder.as_uri()).exists(blob.sha256)
    assert open_blobs(str(folder)).path(blob.sha256) == folder / blob.sha256[:2] / blob.sha256
    assert isinstance(open_blobs("memory:///"), BucketBlobs)


def test_a_blob_is_on_disk_before_it_has_its_name_and_its_name_before_put_returns(
    tmp_path: Path, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, rename, the folder of the name, the folder of that folder: a power cut leaves all or nothing."""
    blobs, source = FolderBlobs(tmp_path / "b"), write(b"seventeen bytes..")
    steps: list[tuple[str, str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("fsync", _role(place, blobs), place.stat().st_size if place.is_file() else 0))
        fsync(descriptor)

    def record_replace(place: Path, target: Path) -> Path:
        steps.append(("replace", _role(target, blobs), place.stat().st_size))
        return replace(place, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    blobs.put(source)
    assert steps == [("fsync", "incoming", 17), ("replace", "named", 17), ("fsync", "parent", 0), ("fsync", "root", 0)]


def _role(place: Path, blobs: FolderBlobs) -> str:
    """What a path is within the store."""
    root = Path(str(blobs.path(ABSENT))).parents[1]
    parts = place.relative_to(root).parts
    if len(parts) == 2:
        return "incoming" if parts[0] == "incoming" else "named"
    return "parent" if parts else "root"


@pytest.mark.parametrize("number", [*FULL, errno.EIO])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_disk_that_fails_a_put_is_named_and_keeps_nothing(
    tmp_path: Path, write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    blobs, source = FolderBlobs(tmp_path / "b"), write(b"x")

    def fail(*_: object) -> None:
        raise OSError(number, "it failed")

    monkeypatch.setattr("os.fsync" if place == "fsync" else "pathlib.Path.replace", fail)
    with pytest.raises(DiskFull if number in FULL else StorageError) as caught:
        blobs.put(source)
    assert caught.type is (DiskFull if number in FULL else StorageError)
    assert source.name in caught.value.detail
    assert [path for path in (tmp_path / "b").rglob("*") if path.is_file()] == []


def test_a_bucket_that_fails_is_a_storage_error_whatever_is_asked(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    blobs, source = _memory(Path()), write(b"x")
    sha256 = hashlib.sha256(b"x").hexdigest()
    for fault in (obstore.exceptions.GenericError("the bucket is away"), OSError(errno.ECONNRESET, "reset")):

        def fail(*_: object, fault: Exception = fault) -> None:
            raise fault

        for name in ("put", "open_reader", "head", "delete"):
            monkeypatch.setattr(obstore, name, fail)
        uses = (blobs.open, blobs.exists, blobs.modified, blobs.delete, lambda _: blobs.put(source))
        for use in uses:
            with pytest.raises(StorageError) as caught:
                use(sha256)
            assert caught.value.__cause__ is fault
    monkeypatch.undo()
    assert not blobs.exists(sha256)


class _Failing:
    """A reader that gives a byte and then fails."""

    def __init__(self) -> None:
        self.reads, self.closed = 0, False

    def read(self, size: int) -> bytes:
        self.reads += 1
        if self.reads > 1:
            raise OSError(errno.EIO, "the disk is broken")
        return b"x"

    def close(self) -> None:
        self.closed = True


def test_a_disk_that_fails_on_a_read_is_a_storage_error_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, reader = FolderBlobs(tmp_path / "b"), _Failing()
    monkeypatch.setattr(blobs, "open", lambda *_: reader)
    chunks = blobs.read_range(ABSENT, 0, 3)
    assert next(chunks) == b"x"
    with pytest.raises(StorageError, match="cannot be read"):
        next(chunks)
    assert reader.closed


def test_chunks_that_nobody_has_asked_for_close_what_they_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, reader = FolderBlobs(tmp_path / "b"), _Failing()
    monkeypatch.setattr(blobs, "open", lambda *_: reader)
    chunks = blobs.read_range(ABSENT, 0, 3)
    chunks.close()  # type: ignore[attr-defined]
    assert (reader.reads, reader.closed) == (0, True)


def test_no_chunk_is_larger_than_a_mebibyte(blobs: BlobStore, write: Callable[[bytes], Path]) -> None:
    blob = blobs.put(write(b"x" * (2 * CHUNK + 5)))
    assert [len(chunk) for chunk in blobs.read_range(blob.sha256, 1, 2 * CHUNK + 4)] == [CHUNK, CHUNK, 3]
    with pytest.raises(StorageError, match="2097153 bytes shorter"):
        list(blobs.read_range(blob.sha256, CHUNK, 4 * CHUNK + 6))


def test_a_blob_becomes_a_file_only_if_its_bytes_are_those_of_its_name(
    blobs: BlobStore, write: Callable[[bytes], Path], tmp_path: Path
) -> None:
    blob, target = blobs.put(write(b"12345")), tmp_path / "folder" / "file"
    assert materialise(blobs, blob.sha256, target) is True
    assert target.read_bytes() == b"12345"
    place = blobs.path(blob.sha256)
    if place is None:
        return
    place.write_bytes(b"other")
    damaged = tmp_path / "folder" / "damaged"
    assert materialise(blobs, blob.sha256, damaged) is False
    assert [path.name for path in damaged.parent.iterdir()] == ["file"]
    with pytest.raises(StorageError):
        materialise(blobs, ABSENT, damaged)
    assert [path.name for path in damaged.parent.iterdir()] == ["file"]
