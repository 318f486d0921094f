"""Rate of packing relative to the tokenizer alone, and rate of masking, on one core.

The values are medians of interleaved repeats in one process. The tokenizer alone is in its fastest form:
``encode_batch_fast`` on the same batches of texts in memory, without reading the ids. The pipeline reads
files, tokenises, packs, hashes and publishes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from infra.files.cache import Cache
from infra.settings.sections import Corpus, Masking, Sequences
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.masking import mask_sequences, mask_vocab
from offline_teacher.sequences.packing import BATCH_CHARACTERS
from offline_teacher.sequences.tokenised_parts import Tokenising, token_counts
from offline_teacher.sequences.tokenizer import load_encoder
from offline_teacher.store.parts import read_part
from offline_teacher.store.schema import Layout
from offline_teacher.store.unfinished import read_part_index

REPEATS = 5
LAYOUT = Layout(
    length=128,
    masked=0,
    vocab_size=30_522,
    hidden_size=1,
    top_k=0,
    temperatures=(),
    hidden_states="float16",
    positions="all",
)
"""Layout of a store with these sequences."""
SHARED = Path(__file__).resolve().parents[3] / "shared"


def run() -> list[dict[str, Any]]:
    """Returns the rows; [] if ../shared with the real text and tokenizer does not exist."""
    if not (SHARED / "data").is_dir():
        return []
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by the tokenizer at each call
    with tempfile.TemporaryDirectory() as store:
        os.mkdir(f"{store}/tokenizer")
        for path in (SHARED / "teacher").glob("tokenizer*"):
            shutil.copyfile(path, f"{store}/tokenizer/{path.name}")
        return [_packing(store), *_masking(store)]


def _packing(store: str) -> dict[str, Any]:
    corpus = Corpus(path=(str(SHARED / "data/corpus/train/[a-c]*.txt"),))
    settings = Sequences(length=128)
    listed = parts(corpus, settings.part_bytes)
    encoder = load_encoder(f"{store}/tokenizer")
    how = Tokenising(store, LAYOUT, corpus, settings, counted=True)
    batches = _batches([text for part in listed for text in documents(part, corpus, Problems())])
    alone, pipeline = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        tokens = 0
        for batch in batches:
            tokens += sum(map(len, encoder.backend.encode_batch_fast(batch, add_special_tokens=False)))
        alone.append(tokens / (time.perf_counter() - start))
        shutil.rmtree(f"{store}/sequences", ignore_errors=True)
        start = time.perf_counter()
        for index, part in enumerate(listed):
            how.build("train", index, part)
        pipeline.append(tokens / (time.perf_counter() - start))
    value = statistics.median(pipeline) / statistics.median(alone)
    rates = f"{statistics.median(pipeline):,.0f} of {statistics.median(alone):,.0f} text tokens/s"
    return _figure("sequences.over_tokenizer", value, "ratio", 0.8, f"{rates}; L = 128, {tokens:,} tokens")


def _batches(texts: list[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    room = BATCH_CHARACTERS
    for text in texts:
        if room <= 0:
            batches.append([])
            room = BATCH_CHARACTERS
        batches[-1].append(text)
        room -= len(text)
    return batches


def _masking(store: str) -> list[dict[str, Any]]:
    cache = Cache(None, 1 << 30)
    first = read_part(store, LAYOUT, read_part_index(store, "train", 0)[0], cache)
    input_ids, token_count = first["input_ids"][:8192], first["token_count"][:8192]
    ids = np.arange(len(input_ids))
    encoder = load_encoder(f"{store}/tokenizer")
    mask_id = encoder.backend.token_to_id("[MASK]")
    settings = {
        "uniform": Masking(probability=0.15),
        "frequency_whole_word": Masking(probability=0.15, sampling="frequency", whole_word=True),
    }
    counts = token_counts(store, "train", encoder.vocab_size, cache)
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(REPEATS):
        for name, masking in settings.items():
            vocab = mask_vocab(masking, mask_id, encoder, counts)
            start = time.perf_counter()
            mask_sequences(input_ids, token_count, ids, 0, masking, vocab)
            rates[name].append(int(token_count.sum()) / (time.perf_counter() - start))
    return [
        _figure(f"masking.{name}", statistics.median(rate), "tokens/s", 1e6, f"{len(ids)} x 128, one core")
        for name, rate in rates.items()
    ]


def _figure(name: str, value: float, unit: str, goal: float, conditions: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "holds": value >= goal,
        "conditions": conditions,
    }
