"""What is checked of a recipe, its teacher and a sample of its text before anything is paid for.

``run`` calls ``check`` before it starts Ray or writes anything, ``plan`` calls the single checks on its own
sample, so that both refuse the same recipes with the same sentences. Shapes: n sequences, L length, D hidden.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from infra.errors import UserError
from infra.recipe import Recipe
from offline_teacher.corpus import parts
from offline_teacher.corpus_sample import sample_sequences
from offline_teacher.packing import Encoder, load_encoder
from offline_teacher.pass_record import has_validation
from offline_teacher.sequences import read_index
from offline_teacher.source import Source, layout_of
from offline_teacher.teacher_directory import tokenizer_files

UNKNOWN_SHARE = 0.02
"""More unknown tokens than this are said: a hundred times what text in the tokenizer's language has (novels,
Wikipedia, film reviews and an English WordPiece vocabulary: at most 0.02 %). It is a share of tokens; of the
characters it is far more, since WordPiece makes one unknown token of a whole run of them."""
REHEARSED = 2
"""Sequences that run through the teacher: broken weights show in any, an overflow in most."""


def check(recipe: Recipe, source: Source) -> None:
    """UserError where the pass, or the student after it, would fail for what can be known now.

    The files of the text and of the held-out text are always looked for. A sample of either is read until
    its sequences are finished.
    """
    from offline_teacher.soft_target_error import student_layers

    student_layers(recipe.student, source.config.num_hidden_layers)
    encoder = encoder_of(source)
    for validation in (False, True) if has_validation(recipe) else (False,):
        listed = parts(recipe.corpus, recipe.sequences.part_bytes, validation)
        if read_index(recipe.validation_store_dir if validation else recipe.store_dir) is not None:
            continue
        input_ids, token_count = sample_sequences(recipe.corpus, recipe.sequences, encoder, listed)
        check_tokens(recipe, encoder, input_ids, token_count, validation)
        if not validation:
            _rehearse(recipe, source, input_ids[:REHEARSED], token_count[:REHEARSED])


def encoder_of(source: Source) -> Encoder:
    """The teacher's tokenizer as packing needs it, from the files that a store keeps of it."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in tokenizer_files(source.tokenizer).items():
            Path(directory, name).write_bytes(data)
        return load_encoder(directory)


def check_tokens(
    recipe: Recipe, encoder: Encoder, input_ids: np.ndarray, token_count: np.ndarray, validation: bool = False
) -> None:
    """UserError where no token of the sequences [n, L] can be masked, a line where many are unknown."""
    held_out = "validation_split" if recipe.corpus.source == "hub" else "validation_path"
    setting = f"corpus.{held_out if validation else 'path'}"
    if np.isin(input_ids, encoder.special_ids).all():
        raise UserError(
            f"{setting}: no token of what was read can be masked, all are special or unknown; is the text in"
            f" a language of {recipe.teacher.model}?"
        )
    framing = (encoder.cls_id, encoder.sep_id, encoder.pad_id)
    text = input_ids[~np.isin(input_ids, framing)]
    share = 0.0 if encoder.unk_id is None else float((text == encoder.unk_id).mean())
    if share > UNKNOWN_SHARE:
        print(
            f"warning: {setting}: {100 * share:.0f} % of the tokens of what was read are unknown to the"
            f" tokenizer of {recipe.teacher.model}; its text is lost, and never masked",
            file=sys.stderr,
        )


def _rehearse(recipe: Recipe, source: Source, input_ids: np.ndarray, token_count: np.ndarray) -> None:
    """Runs a few sequences through the teacher on the CPU: GPUs are for the workers."""
    import torch

    from offline_teacher.capture import Capture
    from offline_teacher.teacher import load_teacher

    loaded = load_teacher(recipe.teacher, "cpu", recipe.sequences.length)
    capture = Capture(loaded, replace(layout_of(recipe, source), top_k=0, hidden_states="float16"))
    with torch.inference_mode():
        hidden = capture.encode(input_ids, token_count)
    real = np.arange(input_ids.shape[1]) < token_count[:, None]
    if not bool(hidden[torch.from_numpy(real)].isfinite().all()):
        raise not_finite(recipe, recipe.teacher.dtype)


def not_finite(recipe: Recipe, dtype: str) -> UserError:
    """Of a teacher that gives infinity or NaN in ``dtype``, as float16 may have it."""
    return UserError(
        f"teacher.dtype: hidden states of {recipe.teacher.model} in {dtype} are not all finite numbers;"
        " choose another dtype or another teacher"
    )
