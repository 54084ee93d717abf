"""The journal: what survives a crash, and whose batch it is."""

import json
import subprocess
import sys

import pytest

from lightforcing.lightforcing_core.queue_journal import Attempt, Journal
from lightforcing.lightforcing_core.queue_outputs import settle_folders
from lightforcing.lightforcing_core.queue_overrides import UsageError

ASKED = {"workflow": "w", "prompt file": "p", "options": "o"}
DOG, CAT, COW = (Attempt(name, "http://a", f"id of {name}") for name in ("dog", "cat", "cow"))


@pytest.fixture
def filled(tmp_path):
    """A journal with one job done, one failed, and one of which the end is not known."""
    journal = Journal(tmp_path, ASKED)
    for attempt in (DOG, CAT, COW):
        journal.submitted(attempt)
    journal.finished(DOG, [tmp_path / "dog" / "video" / "clip.mp4"])
    journal.failed(CAT, "out of memory")
    journal.close()
    return journal


def test_next_start_knows_what_is_done_and_what_is_open(filled, tmp_path):
    again = Journal(tmp_path, ASKED)
    assert (filled.is_new, again.is_new) == (True, False)
    assert again.done == {"dog": ["dog/video/clip.mp4"]}
    assert again.attempts == [COW]
    assert again.client_id == filled.client_id
    again.closed(COW)
    again.close()
    assert Journal(tmp_path, ASKED).attempts == []


def test_line_that_a_crash_cut_short_is_removed(filled, tmp_path):
    whole = filled.path.read_bytes()
    filled.path.write_bytes(whole + b'{"note": "done", "prompt": "cow", "ser')
    again = Journal(tmp_path, ASKED)
    assert again.attempts == [COW]
    again.finished(COW, [])
    again.close()
    assert filled.path.read_bytes().startswith(whole)
    assert set(Journal(tmp_path, ASKED).done) == {"dog", "cow"}


@pytest.mark.parametrize("parts", [["workflow"], ["prompt file", "options"]])
def test_journal_of_another_batch_is_refused(filled, tmp_path, parts):
    before = filled.path.read_bytes()
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path, {**ASKED, **dict.fromkeys(parts, "other")})
    assert f"a batch with another {' and '.join(parts)}; undo the change" in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert filled.path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json\n", "is damaged"),
        ('{"journal": 99}\n', "is not a journal of this version"),
        ("[]\n", "is not a journal"),
        ('{"journal": 1, "client": "c"}\n', "is damaged"),
        ('{"journal": 1, "client": "c", "digests": DIGESTS}\n{"note": "done"}\n', "is damaged"),
        ('{"journal": 1, "client": "c", "digests": DIGESTS}\n7\n', "is damaged"),
    ],
)
def test_other_file_under_the_journals_name_is_refused(tmp_path, content, message):
    (tmp_path / "queue.jsonl").write_text(content.replace("DIGESTS", json.dumps(ASKED)))
    with pytest.raises(UsageError, match=message):
        Journal(tmp_path, ASKED)


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked on POSIX systems only")
def test_journal_has_one_process_at_a_time(tmp_path):
    journal = Journal(tmp_path, ASKED)
    code = f"""
from pathlib import Path
from lightforcing.lightforcing_core.queue_journal import Journal
Journal(Path({str(tmp_path)!r}), {ASKED!r})
"""
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process is working on" in second.stderr
    journal.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_line_is_whole_json(filled):
    notes = [json.loads(line) for line in filled.path.read_text().splitlines()]
    assert [note.get("note") for note in notes] == [None, "submitted", "submitted", "submitted", "done", "failed"]


def test_foreign_folder_in_the_way_is_refused(tmp_path):
    journal = Journal(tmp_path, ASKED)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UsageError, match="is there already and not from this batch; choose another --out"):
        settle_folders(tmp_path, ["dog"], journal)
