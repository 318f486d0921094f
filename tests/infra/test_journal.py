"""What a kill leaves of a journal."""

from __future__ import annotations

from pathlib import Path

from infra.tracking.journal import Journal


def entries(path: Path) -> list[dict[str, object]]:
    """As the next process finds them; they stay."""
    journal = Journal(str(path))
    assert journal.on_disk
    found = journal.head(10)
    journal.close()
    return found


def test_what_follows_a_torn_line_is_kept(tmp_path: Path) -> None:
    """Of two processes the first is killed within a write, the second before it has sent anything."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "met')
    killed = Journal(str(path))
    killed.append({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "met\n{"step": 3}\n'
    killed._file.close()  # type: ignore[union-attr]
    assert entries(path) == [{"step": 1}, {"step": 3}]
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_nothing_is_added_to_a_whole_file(tmp_path: Path) -> None:
    for text in ("", '{"step": 1}\n'):
        path = tmp_path / "journal.jsonl"
        path.write_text(text)
        journal = Journal(str(path))
        assert path.read_text() == text
        journal._file.close()  # type: ignore[union-attr]
