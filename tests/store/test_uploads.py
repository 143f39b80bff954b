import pytest
from sqlalchemy import update

from app.store.clock import seconds_from_now
from app.store.ids import new_id
from app.store.jobs import JobRepository
from app.store.models import Upload
from app.store.session import Database
from app.store.uploads import NewUploadFile, UploadRepository, remove_expired_uploads
from bitwright.errors import Conflict, InvalidRequest, NotFound
from tests.store.samples import request

TEXT = NewUploadFile("text.jsonl", 10, "a" * 64)
EMPTY = NewUploadFile("empty.json", 0, "b" * 64)


def create(database: Database, tenant: str, *files: NewUploadFile) -> str:
    with database.transaction() as session:
        return UploadRepository(session, tenant).create(files).id


def complete(database: Database, tenant: str) -> str:
    upload_id = create(database, tenant, TEXT)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        uploads.advance(upload_id, TEXT.name, start=0, end=TEXT.size)
        uploads.complete(upload_id)
    return upload_id


def test_parts_add_up_to_a_complete_upload(database: Database, tenant: str) -> None:
    upload_id = create(database, tenant, TEXT, EMPTY)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        assert uploads.get(upload_id).status == "open"
        with pytest.raises(Conflict, match=r"text\.jsonl \(0 of 10"):
            uploads.complete(upload_id)
        uploads.advance(upload_id, TEXT.name, start=0, end=4)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        assert [(f.name, f.offset) for f in uploads.get(upload_id).files] == [(TEXT.name, 4), (EMPTY.name, 0)]
        uploads.advance(upload_id, TEXT.name, start=4, end=10)
        done = uploads.complete(upload_id)
        assert (done.status, done.complete) == ("complete", True)
        assert uploads.complete(upload_id).completed_at == done.completed_at
        with pytest.raises(Conflict, match="no more bytes"):
            uploads.advance(upload_id, TEXT.name, start=10, end=10)
        with pytest.raises(Conflict):
            uploads.restart(upload_id, TEXT.name)


@pytest.mark.parametrize(("start", "end"), [(3, 5), (5, 7)])
def test_a_part_starts_where_the_last_one_ended(database: Database, tenant: str, start: int, end: int) -> None:
    upload_id = create(database, tenant, TEXT)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        uploads.advance(upload_id, TEXT.name, start=0, end=4)
        with pytest.raises(Conflict, match="has 4 bytes") as caught:
            uploads.advance(upload_id, TEXT.name, start=start, end=end)
        assert caught.value.value == 4


@pytest.mark.parametrize(("start", "end"), [(0, 11), (5, 4), (-1, 4)])
def test_a_part_lies_within_the_file(database: Database, tenant: str, start: int, end: int) -> None:
    upload_id = create(database, tenant, TEXT)
    with database.transaction() as session, pytest.raises(InvalidRequest):
        UploadRepository(session, tenant).advance(upload_id, TEXT.name, start=start, end=end)


def test_a_file_with_another_hash_starts_again(database: Database, tenant: str) -> None:
    upload_id = create(database, tenant, TEXT)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        uploads.advance(upload_id, TEXT.name, start=0, end=10)
        assert uploads.restart(upload_id, TEXT.name).files[0].offset == 0


@pytest.mark.parametrize(
    ("files", "fields"),
    [
        ([], ["files"]),
        ([TEXT] * 1025, ["files"]),
        ([TEXT, TEXT], ["files.1.name"]),
        ([NewUploadFile("", -1, "A" * 64)], ["files.0.name", "files.0.size", "files.0.sha256"]),
        *(
            ([NewUploadFile(name, 1, "a" * 64)], ["files.0.name"])
            for name in ("../x", "a/b", "/etc/passwd", ".", "..", "a\\b", "C:x", "a\0", "a\n", "x" * 256)
        ),
        ([NewUploadFile("x", 2**63, "a" * 64)], ["files.0.size"]),
    ],
)
def test_every_problem_of_an_upload_is_named(
    database: Database, tenant: str, files: list[NewUploadFile], fields: list[str]
) -> None:
    with database.transaction() as session, pytest.raises(InvalidRequest) as caught:
        UploadRepository(session, tenant).create(files)
    assert [problem.field for problem in caught.value.errors] == fields


def test_another_tenant_has_no_such_upload(database: Database, tenant: str, stranger: str) -> None:
    upload_id = complete(database, tenant)
    with database.transaction() as session:
        theirs = UploadRepository(session, stranger)
        for use in (theirs.get, theirs.complete, theirs.delete):
            with pytest.raises(NotFound):
                use(upload_id)
        with pytest.raises(NotFound):
            theirs.advance(upload_id, TEXT.name, start=0, end=1)
        with pytest.raises(InvalidRequest, match="no upload"):
            JobRepository(session, stranger).add(request(model=upload_id))


def test_a_file_that_was_not_announced_is_not_found(database: Database, tenant: str) -> None:
    upload_id = create(database, tenant, TEXT)
    with database.transaction() as session, pytest.raises(NotFound):
        UploadRepository(session, tenant).advance(upload_id, "other\0", start=0, end=0)


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ("model", "model.id"),
        ("calibration", "calibration.dataset.id"),
        ("evaluation", "evaluation.dataset.id"),
    ],
)
def test_a_job_reads_only_complete_uploads(database: Database, tenant: str, place: str, field: str) -> None:
    def asked(upload_id: str) -> dict[str, object]:
        return {place: upload_id if place == "model" else {"dataset": upload_id}}

    still_open = create(database, tenant, TEXT)
    with database.transaction() as session:
        for upload_id, told in ((new_id("upl"), "no upload"), (still_open, "not complete")):
            with pytest.raises(InvalidRequest, match=told) as caught:
                JobRepository(session, tenant).add(request(**asked(upload_id)))
            assert caught.value.field == field


def test_an_upload_that_a_job_reads_stays(database: Database, tenant: str) -> None:
    upload_id = complete(database, tenant)
    with database.transaction() as session:
        job_id = JobRepository(session, tenant).add(request(calibration={"dataset": upload_id})).id
    with database.transaction() as session, pytest.raises(Conflict, match=job_id):
        UploadRepository(session, tenant).delete(upload_id)
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
        UploadRepository(session, tenant).delete(upload_id)
    with database.reading() as session:
        with pytest.raises(NotFound):
            UploadRepository(session, tenant).get(upload_id)
        assert JobRepository(session, tenant).get(job_id).id == job_id


def test_only_uploads_left_open_expire(database: Database, tenant: str) -> None:
    done, late, fresh = complete(database, tenant), create(database, tenant, TEXT), create(database, tenant, TEXT)
    with database.transaction() as session:
        session.execute(update(Upload).where(Upload.id != fresh).values(expires_at=seconds_from_now(-1)))
        assert remove_expired_uploads(session) == [late]
    with database.reading() as session:
        assert [UploadRepository(session, tenant).get(kept).status for kept in (done, fresh)] == ["complete", "open"]


def test_uploads_are_listed_in_pages_newest_first(database: Database, tenant: str, stranger: str) -> None:
    with database.transaction() as session:
        repository = UploadRepository(session, tenant)
        made = [repository.create([NewUploadFile("text.jsonl", 0, "0" * 64)]).id for _ in range(5)]
        repository.complete(made[1])
        theirs = UploadRepository(session, stranger).create([NewUploadFile("text.jsonl", 3, "0" * 64)]).id
    with database.reading() as session:
        repository = UploadRepository(session, tenant)
        first = repository.page(after=None, limit=2)
        second = repository.page(after=first.next_cursor, limit=3)
        assert [upload.id for upload in [*first.items, *second.items]] == made[::-1]
        assert second.next_cursor is None
        assert [upload.id for upload in repository.page(after=None, limit=9, complete=True).items] == [made[1]]
        assert made[1] not in [upload.id for upload in repository.page(after=None, limit=9, complete=False).items]
        assert [upload.id for upload in UploadRepository(session, stranger).page(after=None, limit=9).items] == [theirs]
        with pytest.raises(InvalidRequest, match="cursor"):
            repository.page(after="job_" + "0" * 26, limit=1)


def test_an_open_upload_has_a_day(database: Database, tenant: str) -> None:
    upload_id = create(database, tenant, TEXT)
    with database.reading() as session:
        upload = UploadRepository(session, tenant).get(upload_id)
    assert abs((upload.expires_at - upload.created_at).total_seconds() - 86_400) < 1


def test_files_come_in_the_order_in_which_they_were_announced(database: Database, tenant: str) -> None:
    names = ["b.json", "a.json", "c.json"]
    upload_id = create(database, tenant, *(NewUploadFile(name, 1, "a" * 64) for name in names))
    with database.reading() as session:
        assert [file.name for file in UploadRepository(session, tenant).get(upload_id).files] == names


def test_the_largest_upload_that_is_taken(database: Database, tenant: str) -> None:
    files = [NewUploadFile(f"{n}", 0, "a" * 64) for n in range(1023)]
    upload_id = create(database, tenant, *files, NewUploadFile("x" * 255, 2**63 - 1, "0123456789abcdef" * 4))
    with database.reading() as session:
        last = UploadRepository(session, tenant).get(upload_id).files[-1]
    assert (last.name, last.size) == ("x" * 255, 2**63 - 1)


def test_one_file_that_is_short_keeps_an_upload_open(database: Database, tenant: str) -> None:
    other = NewUploadFile("other.json", 5, "c" * 64)
    upload_id = create(database, tenant, TEXT, other)
    with database.transaction() as session:
        uploads = UploadRepository(session, tenant)
        uploads.advance(upload_id, TEXT.name, start=0, end=10)
        assert [file.offset for file in uploads.advance(upload_id, other.name, start=0, end=4).files] == [10, 4]
        with pytest.raises(Conflict, match=r"not all bytes have arrived: other\.json \(4 of 5 bytes\)\n"):
            uploads.complete(upload_id)


def test_an_expired_upload_that_a_job_reads_stays(database: Database, tenant: str) -> None:
    upload_id = complete(database, tenant)
    with database.transaction() as session:
        JobRepository(session, tenant).add(request(calibration={"dataset": upload_id}))
        session.execute(update(Upload).values(expires_at=seconds_from_now(-1), completed_at=None))
        assert remove_expired_uploads(session) == []
