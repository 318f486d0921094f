"""Checks of a recipe, its teacher and a sample of its text before any expensive work.

``run`` calls ``check`` before it starts Ray or writes anything. ``plan`` calls the other functions with its
own sample, so that both commands give the same messages. Axes: n sequences, L length.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from infra.errors import UserError
from infra.settings.recipe import Recipe
from offline_teacher.corpus.partition import Part
from offline_teacher.inputs.source import Source, layout_of
from offline_teacher.sequences.sample import sample_sequences
from offline_teacher.sequences.tokenizer import Encoder
from offline_teacher.store.unfinished import finished_parts

UNKNOWN_SHARE = 0.02
"""Share of unknown tokens (in WordPiece: whole words) above which a warning is printed. English text has at
most 0.0002 with an English WordPiece vocabulary (novels, Wikipedia, film reviews)."""
REHEARSED = 2
"""Number of sequences that run through the teacher: any reveals broken weights, most reveal an overflow."""


def check(recipe: Recipe, source: Source, parts: dict[str, list[Part]]) -> None:
    """Raises UserError if the pass, or a student after it, would fail for a reason that can be checked now.

    Reads a sample of each split whose text is not completely tokenised yet.
    """
    assert recipe.corpus is not None
    check_students(recipe, source)
    encoder = source.encoder
    for split, listed in reversed(parts.items()):
        if finished_parts(recipe.store_path, split) == len(listed):
            continue
        input_ids, token_count = sample_sequences(recipe.corpus, recipe.sequences, encoder, listed)
        check_tokens(recipe, encoder, input_ids, token_count, split)
        if split == "train":
            rehearse(recipe, source, input_ids[:REHEARSED], token_count[:REHEARSED])


def check_students(recipe: Recipe, source: Source) -> None:
    """Raises UserError if a student of the recipe cannot be built from this teacher."""
    from offline_teacher.models.students import planned_student

    for run in recipe.runs().values():
        planned_student(run.student, source.config)


def check_tokens(
    recipe: Recipe,
    encoder: Encoder,
    input_ids: np.ndarray,
    token_count: np.ndarray,
    split: str = "train",
) -> None:
    """Raises UserError if no token of the sequences [n, L] can be masked; warns if many are unknown."""
    assert recipe.corpus is not None
    assert recipe.teacher is not None
    held_out = "validation_split" if recipe.corpus.source == "hub" else "validation_path"
    setting = f"corpus.{held_out if split == 'validation' else 'path'}"
    if np.isin(input_ids, encoder.special_ids).all():
        raise UserError(
            f"{setting}: no token of the sample can be masked, because all are special or unknown;"
            f" is the text in a language of {recipe.teacher.model}?"
        )
    not_text = (encoder.cls_id, encoder.sep_id, encoder.pad_id)
    text = input_ids[~np.isin(input_ids, not_text)]
    share = 0.0 if encoder.unk_id is None else float((text == encoder.unk_id).mean())
    if share > UNKNOWN_SHARE:
        print(
            f"warning: {setting}: {100 * share:.0f} % of the tokens of the sample are unknown to"
            f" the tokenizer of {recipe.teacher.model}; their text is lost, and they are never masked",
            file=sys.stderr,
        )


def rehearse(recipe: Recipe, source: Source, input_ids: np.ndarray, token_count: np.ndarray) -> None:
    """Runs a few sequences through the teacher on the CPU, because the GPUs belong to the workers.

    Raises UserError if the hidden states are not finite, or too large for a store in float16.
    """
    import torch

    from offline_teacher.inference.columns import Inference
    from offline_teacher.inference.teacher import load_teacher

    assert recipe.teacher is not None
    layout = layout_of(recipe, source)
    loaded = load_teacher(recipe.teacher, layout.replay_layers, False, "cpu")
    with torch.inference_mode():
        ids, count = torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(token_count)
        if not bool(loaded.lower(ids, count.long()).isfinite().all()):
            raise not_finite(recipe, recipe.teacher.dtype)
    if layout.hidden_states == "float16":
        kept = replace(layout, top_k=0, positions="all")
        Inference(loaded, kept).batch(input_ids, token_count, None)


def not_finite(recipe: Recipe, dtype: str) -> UserError:
    """Returns the error for a teacher with infinite or NaN hidden states in ``dtype``, such as float16."""
    assert recipe.teacher is not None
    return UserError(
        f"teacher.dtype: hidden states of {recipe.teacher.model} in {dtype} are not all finite numbers;"
        " choose another dtype or another teacher"
    )
