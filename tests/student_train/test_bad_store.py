"""Damaged stores, and stores with an invalid teacher: one clear line, nothing trained, nothing
half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offline_teacher.store.paths import CONFIG, WEIGHTS
from student_train.engine.world import World
from tests.student_train.bad_stores import (
    Cases,
    flipped,
    format_1,
    half_a_manifest,
    hostile,
    hostile_file,
    impossible,
    incomplete,
    no_store,
    nothing,
    refuses,
    shards_gone,
    teacher_without_a_head,
)
from tests.student_train.tiny_run import V

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
DENSE = "cls.predictions.transform.dense.weight"

DAMAGED: Cases = {
    "no store": (no_store, [], ["tiny/store"]),
    "no store at a path": (nothing, ["store.path={root}/absent"], ["{root}/absent"]),
    "a store of format 1": (format_1, [], ["tiny/store", "format 1", "make it again"]),
    "store incomplete": (incomplete, [], ["tiny/store", "incomplete", "1 of"]),
    "manifest damaged": (half_a_manifest, [], ["manifest.json", "verify"]),
    "spec damaged": (flipped("spec.json"), [], ["spec.json", "verify"]),
    "index damaged": (flipped("tasks/train/*.json"), [], ["tasks/train/e000", "verify"]),
    "shards damaged": (flipped("shards/train/*/*.arrow"), [], ["shards/train/e000", "sample", "verify"]),
    "held-out shards damaged": (
        flipped("shards/validation/*/*.arrow"), ["train.epochs=1"], ["shards/validation/e000", "verify"],
    ),
    "teacher's configuration damaged": (flipped(CONFIG), [], [CONFIG, "verify"]),
    "teacher's weights damaged": (flipped(WEIGHTS), [], [WEIGHTS, "verify"]),
    "tokenizer damaged": (flipped("tokenizer/tokenizer.json"), ["train.epochs=1"], ["tokenizer/", "verify"]),
    "shards gone": (shards_gone, [], ["shards/train/e000", "missing"]),
    "a label beyond the vocabulary": (
        impossible("masked_labels", V), [], ["masked_labels", "outside 0 to 95", "verify"],
    ),
    "a token beyond the vocabulary": (impossible("input_ids", V + 7), [], ["input_ids", "outside 0 to 95"]),
    "a top-k id beyond the vocabulary": (
        impossible("topk_ids", V), ["train.soft_targets=topk", "train.alpha_cos=0"], ["topk_ids", "outside"],
    ),
    "no token in a sample": (impossible("token_count", 0), [], ["token_count", "outside 1 to 12"]),
    "a masked position in the padding": (impossible("token_count", 1), [], ["masked_positions", "padding"]),
    "a masked position beyond the length": (
        impossible("masked_positions", 12), [], ["masked_positions", "outside -1 to 11"],
    ),
}  # fmt: skip

HOSTILE: Cases = {
    "weights of another shape": (
        hostile(lambda x: x.update({QUERY: x[QUERY][:, 1:]})), [], ["model.safetensors", "size mismatch"],
    ),
    "another vocabulary's words": (
        hostile(lambda x: x.update({WORDS: x[WORDS][1:]})), [], ["model.safetensors", "size mismatch"],
    ),
    "a weight missing": (hostile(lambda x: x.pop(QUERY)), [], ["model.safetensors lacks", QUERY]),
    "words missing": (hostile(lambda x: x.pop(WORDS)), [], ["model.safetensors lacks", WORDS]),
    "a live teacher's weight missing": (
        hostile(lambda x: x.pop(QUERY)), ["train.teacher=live", "student.layers=[1]"], ["lacks", QUERY],
    ),
    "hardly a weight": (
        hostile(lambda x: [x.pop(name) for name in list(x)[1:]]), [], ["model.safetensors lacks", "more"],
    ),
    "a weight that is no number": (
        hostile(lambda x: x[QUERY].view(-1)[3:4].fill_(torch.nan)), [], [QUERY, "not finite"],
    ),
    "an infinite weight": (
        hostile(lambda x: x[DENSE].view(-1)[3:4].fill_(torch.inf)), [], [DENSE, "not finite"],
    ),
    "weights that are integers": (
        hostile(lambda x: x.update({QUERY: x[QUERY].int()})), [], ["tiny/store", "model.safetensors"],
    ),
    "weights that are no safetensors": (hostile_file(b"\x80\x04pickled"), [], ["tiny/store", "safetensors"]),
    "an empty file of weights": (hostile_file(b""), [], ["tiny/store", "safetensors"]),
    "weights cut short": (hostile_file(b"\xff" * 64), [], ["tiny/store", "safetensors"]),
    "a configuration of another width": (hostile(hidden_size=32), [], ["config.json", "hidden_size is 32"]),
    "a configuration of other words": (hostile(vocab_size=97), [], ["config.json", "vocab_size is 97"]),
    "a configuration without end": (hostile(num_hidden_layers=10**9), [], ["num_hidden_layers is 100"]),
    "a depth that is no number": (hostile(num_hidden_layers="two"), [], ["num_hidden_layers is two"]),
    "deeper than its weights": (
        hostile(num_hidden_layers=4), ["student.layers=last:1"], ["lacks", "bert.encoder.layer.2"],
    ),
    "heads that do not divide": (hostile(num_attention_heads=3), [], ["config.json", "3 attention heads"]),
    "an unknown activation": (hostile(hidden_act="evil"), [], ["config.json", "evil"]),
    "a family of decoders": (hostile(model_type="llama"), [], ["llama"]),
    "more neurons than any memory holds": (
        hostile(intermediate_size=10**12), [], ["model.safetensors", "size mismatch"],
    ),
    "fewer positions than a sequence": (
        hostile(max_position_embeddings=4), [], ["config.json", "4 tokens", "12"],
    ),
    "an epsilon that is no number": (hostile(layer_norm_eps="x"), [], ["tiny/store", "config.json"]),
    "vocabulary of a teacher without a head": (teacher_without_a_head, [], ["masked-LM head"]),
}  # fmt: skip
"""The digests are right, but the teacher is none."""

BAD = {**DAMAGED, **HOSTILE}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_store_is_one_clear_line(alone: World, run_dir: Path, name: str) -> None:
    refuses(run_dir, BAD[name])
