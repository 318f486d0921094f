"""Reads retrieval data in BEIR's layout (arXiv 2104.08663): corpus.jsonl, queries.jsonl, qrels/*.tsv."""

from __future__ import annotations

from evaluation.tasks.row_files import read_rows
from evaluation.tasks.task import Split
from infra.errors import UserError

_HEADER = ("query-id", "corpus-id", "score")


def read_corpus(path: str) -> dict[str, str]:
    """Returns id -> document: its title, if any, and its text."""
    return _by_id(path, "document")


def read_queries(queries: str, relevance: str, corpus: dict[str, str]) -> Split:
    """Returns the queries that have a relevant document, with document id -> relevance grade as labels.

    ``queries``, ``relevance``: paths of queries.jsonl and of the qrels file. Raises UserError, with the line,
    for a judgement of an unknown query or document.
    """
    texts = _by_id(queries, "query")
    rows = read_rows(relevance, "tsv")
    grades: dict[str, dict[str, float]] = {}
    columns = (rows.column(name) for name in _HEADER)
    for row, (query, document, value) in enumerate(zip(*columns, strict=True)):
        if query not in texts:
            raise rows.error(row, f"query {query!r} is not in {queries}; leave the line out")
        if document not in corpus:
            raise rows.error(row, f"document {document!r} is not in the corpus; leave the line out")
        try:
            grades.setdefault(query, {})[document] = float(int(value))
        except ValueError:
            raise rows.error(row, f"score {value!r} is not a whole number") from None
    answerable = {query: graded for query, graded in grades.items() if max(graded.values()) > 0}
    if not answerable:
        raise UserError(f"{relevance}: no query has a relevant document; give one a score above 0")
    left_out = len(texts) - len(answerable)
    note = f"{relevance}: queries without a relevant document, left out: {left_out:,}"
    asked: list[tuple[str, ...]] = [(texts[query],) for query in answerable]
    labels, notes = list(answerable.values()), [note] if left_out else []
    return Split(asked, labels, list(answerable), corpus=corpus, notes=notes)


def _by_id(path: str, noun: str) -> dict[str, str]:
    """Returns id -> title and text of a JSON-lines file. ``noun``: what a row is called in error messages."""
    rows = read_rows(path, "jsonl")
    ids, texts = rows.texts("_id"), rows.texts("text")
    titles = rows.texts("title") if "title" in rows.columns else [""] * len(rows)
    by_id: dict[str, str] = {}
    for row, (name, title, text) in enumerate(zip(ids, titles, texts, strict=True)):
        if name in by_id:
            raise rows.error(row, f"{noun} {name!r} occurs twice; give each another _id")
        by_id[name] = f"{title} {text}".strip()
    return by_id
