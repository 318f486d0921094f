"""``verify --repair``: what is damaged is set aside and made again, or nothing is moved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from infra import storage
from infra.errors import UserError
from infra.locks import exclusive
from infra.recipe import Recipe
from offline_teacher import corpus
from offline_teacher.capture_pass import run_pass
from offline_teacher.cluster import Pool
from offline_teacher.sequence_building import refuse_other_text
from offline_teacher.sequences import read_index
from offline_teacher.source import Source, as_made, declare, find_source, made_files, refuse_other
from offline_teacher.store.manifest import DECLARATION_NAME, MANIFEST_NAME
from offline_teacher.store.verify import Problem, declared, quarantine, set_aside_damaged
from offline_teacher.store.writer import has_shards, sidecars, store_files, unexpected

SEQUENCE_FILE = re.compile(
    r"sequences/(part-\d+\.(arrow|json|counts\.arrow)|index\.json|token_counts\.arrow)"
)


def mend(root: str, problems: Sequence[Problem], recipe: Recipe) -> None:
    """Sets everything damaged aside and makes it again, by the teacher and, unless the sequences are known to
    be right, from the text. Where that cannot be done nothing is moved."""
    recipe, validation = as_made(root, recipe)
    source, begun = find_source(recipe), declared(root)
    if begun is not None:
        refuse_other(recipe, source, root, begun)
    else:
        _refuse_other_shards(recipe, source, root)
    files = {problem.file for problem in problems}
    text = MANIFEST_NAME in files or any(SEQUENCE_FILE.fullmatch(name) for name in files)
    if text:
        _refuse_other_corpus(root, files, recipe, validation)
    if MANIFEST_NAME in files:  # nothing but their makers can tell whether the others are right
        problems = [*problems, *_unlisted(root, source)]
    _set_aside(root, problems)
    with Pool(recipe) as pool:
        run_pass(recipe, source, root, pool, validation=validation, text=text)


def _refuse_other_shards(recipe: Recipe, source: Source, root: str) -> None:
    """As ``refuse_other``, where neither manifest nor declaration tells: by what the shards say."""
    try:
        if read_index(root) is None:
            return
    except UserError:
        return
    found = sidecars(root, declare(recipe, source, root))
    if has_shards(root) and not any(found.values()):
        raise UserError(
            f"{root}: none of its shards is of this recipe: give the one it was made of (--recipe)"
        )


def _refuse_other_corpus(root: str, damaged: Iterable[str], recipe: Recipe, validation: bool) -> None:
    """UserError where the text is not there or, as far as undamaged books tell, is another."""
    parts = corpus.parts(recipe.corpus, recipe.sequences.part_bytes, validation)
    if not any(name.startswith((MANIFEST_NAME, "tokenizer/", "sequences/index")) for name in damaged):
        refuse_other_text(root, parts, recipe.corpus, recipe.sequences)


def _unlisted(root: str, source: Source) -> list[Problem]:
    """What is not as it was made, of the files that a manifest would list."""
    found = [name for name in store_files(root) if name != DECLARATION_NAME]
    try:
        expected = made_files(root, source)
    except UserError:  # the sequences' own index or a sidecar: all of them are made again
        return [Problem(name, "is not accounted for") for name in found if name.startswith("sequences/")]
    digests = {name: storage.digest_file(storage.join(root, *name.split("/"))) for name in found}
    return [Problem(name, what) for name, what in unexpected(digests, expected) if name in found]


def _set_aside(root: str, problems: Sequence[Problem]) -> None:
    with exclusive(root):
        names = set_aside_damaged(root, problems)
        for name in [*names, *(problem.file for problem in problems)]:
            for other in _made_together(name):
                storage.remove(storage.join(root, *other.split("/")))
    print(f"{len(names)} {'file' if len(names) == 1 else 'files'} set aside in {quarantine(root)}")


def _made_together(name: str) -> list[str]:
    """Files that are only made again with ``name``: the pass would take the rest of them for the whole."""
    part = re.fullmatch(r"(sequences/part-\d+)\..*", name)
    if part:
        return [part[1] + suffix for suffix in (".json", ".arrow", ".counts.arrow")]
    if SEQUENCE_FILE.fullmatch(name):
        return ["sequences/index.json", "sequences/token_counts.arrow"]
    return []
