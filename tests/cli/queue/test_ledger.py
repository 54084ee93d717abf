"""The ledger of a batch: one command at a time, one batch per folder."""

import pytest

from lightforcing.cli.queue.jobs import Job
from lightforcing.cli.queue.ledger import Ledger
from lightforcing.cli.queue.prompt import UsageError

DOG, CAT, COW = (Job(name, {"1": {"class_type": name}}) for name in ("dog", "cat", "cow"))
OTHER_CAT = Job("cat", {"1": {"class_type": "lion"}})


@pytest.fixture
def filled(tmp_path):
    """A folder whose ledger has one job done, one failed, and one sent."""
    ledger = Ledger(tmp_path, [DOG, CAT, COW])
    for job in (DOG, CAT, COW):
        ledger.set(job.name, state="sent", prompt_id=f"id of {job.name}", client_id=ledger.client_id)
    ledger.set("dog", state="done")
    ledger.set("cat", state="failed", error="out of memory")
    ledger.close()
    return tmp_path


def test_batch_may_grow_but_not_change(filled):
    grown = Ledger(filled, [DOG, CAT, COW, Job("hen", {"1": {"class_type": "hen"}})])
    assert grown.states()["hen"] == "waiting"
    grown.close()
    with pytest.raises(UsageError) as caught:
        Ledger(filled, [DOG, OTHER_CAT, COW])
    assert "has another prompt named cat" in str(caught.value)
    assert "undo that to continue the batch, choose another --out" in str(caught.value)


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0 of another kind"])
def test_other_file_under_the_ledgers_name_is_refused_and_kept(tmp_path, content):
    (tmp_path / "queue.sqlite3").write_bytes(content * 100)
    with pytest.raises(UsageError, match=r"cannot use .*queue\.sqlite3: .*, or choose another --out"):
        Ledger(tmp_path, [DOG])
    assert (tmp_path / "queue.sqlite3").read_bytes() == content * 100


@pytest.mark.parametrize("state", ["new", "failed"])
def test_foreign_folder_in_the_way_is_refused(tmp_path, state):
    if state == "failed":
        ledger = Ledger(tmp_path, [DOG])
        ledger.set("dog", state="failed")
        ledger.close()
    (tmp_path / "dog").mkdir()
    with pytest.raises(UsageError, match="exists already and is not from this batch; choose another --out"):
        Ledger(tmp_path, [DOG])
    assert (tmp_path / "queue.sqlite3").exists() == (state == "failed")
