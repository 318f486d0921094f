"""A tiny teacher, its store and a recipe, made in a second, for the tests of the trainer.

Axes: n samples, L length, P recorded positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from infra.files import storage
from offline_teacher.models.weights import named_weights, top_weights
from offline_teacher.store.manifest import Spec
from offline_teacher.store.paths import POOLING
from offline_teacher.store.schema import Layout
from offline_teacher.store.store import Store
from student_train import main
from tests.store import synthetic
from tests.store.synthetic import SPECIAL, Columns, Teacher

V, D, L, M, K = 96, 16, 12, 2, 8
LAYERS = 2
assert (SPECIAL.pad, SPECIAL.cls, SPECIAL.sep, SPECIAL.mask) == (0, 2, 3, 4)  # as in WORDS
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_teacher(seed: int = 0, **changes: Any) -> BertForMaskedLM:
    """A BERT masked LM with random weights, in evaluation mode."""
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": L,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(**{**sizes, **changes})).eval()


def make_store(
    directory: Path,
    teacher: BertForMaskedLM,
    *,
    sequences: int = 50,
    held_out: int = 9,
    masking_epochs: int = 2,
    block_samples: int = 2,
    seed: int = 0,
    documents: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    **layout: Any,
) -> Store:
    """Makes a finished store of ``teacher``'s outputs on random text; ``layout`` are fields of ``Layout``.
    ``documents``: every sequence is one text, whose embedding is pooled by `synthetic.POOLED`.
    ``fingerprint``: members that replace the usual ones."""
    sizes = {"length": L, "masked": M, "vocab_size": V, "hidden_size": D, "top_k": K}
    made = synthetic.small_layout(**{**sizes, **layout})
    rows = {"train": (sequences,), **({"validation": (held_out,)} if held_out else {})}
    kept = named_weights(teacher) if made.teacher_weights else top_weights(teacher, made.replay_layers)
    if documents:
        storage.publish_if_changed(str(directory / POOLING), json.dumps(synthetic.POOLED).encode())
    told = {
        **({"recipe": {"sequences": {"packing": "document"}}} if documents else {}),
        **(fingerprint or {}),
    }
    with mock.patch.object(synthetic, "make_spec", _spec_with(told)):
        return synthetic.make_store(
            str(directory),
            made,
            rows,
            synthetic.small_plan(masking_epochs=masking_epochs, block_samples=block_samples),
            seed,
            live(teacher),
            teacher.config.to_dict(),
            {name: tensor.detach().numpy() for name, tensor in kept.items()},
            _tokenizer(V),
        )


def _spec_with(told: Mapping[str, Any]) -> Callable[..., Spec]:
    """Returns ``synthetic.make_spec`` with these members in the fingerprint."""
    make_spec = synthetic.make_spec

    def spec(*arguments: Any) -> Spec:
        made = make_spec(*arguments)
        return replace(made, fingerprint={**made.fingerprint, **told})

    return spec


def _tokenizer(size: int) -> dict[str, bytes]:
    words = [*WORDS, *(f"w{i}" for i in range(size - len(WORDS)))]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "vocab.txt")
        path.write_text("\n".join(words) + "\n")
        BertTokenizer(vocab=str(path)).save_pretrained(scratch)
        path.unlink()
        return {file.name: file.read_bytes() for file in Path(scratch).iterdir()}


def live(teacher: BertForMaskedLM) -> Teacher:
    """Returns a function that computes a store's columns with this teacher."""

    @torch.no_grad()
    def fill(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
        real = torch.arange(layout.length) < torch.tensor(columns["token_count"].astype(np.int64))[:, None]
        ids = torch.tensor(columns["input_ids"].astype(np.int64))
        out = teacher(ids, attention_mask=real.long(), output_hidden_states=True)
        hidden, logits = out.hidden_states[LAYERS - layout.replay_layers], out.logits
        if layout.positions == "pooled":
            columns["embedding"][:] = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            return
        if layout.positions == "masked":
            at = torch.tensor(columns["masked_positions"].astype(np.int64))
            real, at = at >= 0, at.clamp_min(0)[..., None]
            hidden, logits = hidden.take_along_dim(at, 1), logits.take_along_dim(at, 1)
        hidden, logits = (x.where(real[..., None], 0.0) for x in (hidden, logits))
        _fill(layout, columns, hidden, logits, real)

    return fill


def _fill(
    layout: Layout, columns: Columns, hidden: torch.Tensor, logits: torch.Tensor, real: torch.Tensor
) -> None:
    """Fills the teacher's columns, given hidden states [n, P, D] and logits [n, P, V]; ``real``: bool [n,
    P]."""
    if layout.top_k:
        values, best = logits.half().topk(layout.top_k, dim=2)
        sums = [torch.logsumexp(logits / t, 2) for t in layout.temperatures]
        columns["topk_ids"][:] = best * real[..., None]
        columns["topk_logits"][:] = values
        columns["logsumexp"][:] = torch.stack(sums, 2) * real[..., None]
    if layout.hidden_states == "float16":
        columns["hidden_states"][:] = hidden.numpy()
    if layout.hidden_states == "bfloat16":
        columns["hidden_states"][:] = hidden.bfloat16().view(torch.int16).numpy().view(np.uint16)
    if layout.hidden_states == "int8":
        columns["hidden_states"][:], columns["hidden_scale"][:] = synthetic.quantise(hidden.numpy())


def make_run(
    root: Path, *, recipe: dict | None = None, teacher: BertForMaskedLM | None = None, **store: Any
) -> Path:
    """Makes a store at ``root/runs/tiny/store`` and its recipe, without corpus or teacher. Returns the
    recipe's path."""
    make_store(root / "runs" / "tiny" / "store", teacher or make_teacher(), **store)
    sections: dict = {
        "name": "tiny",
        "output": str(root / "runs"),
        "student": {"layers": [0]},
        "train": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 2,
            "dtype": "float32",
            "compile": False,
            "log_every": 1,
            "checkpoint_every": 4,
            "learning_rate": 1e-3,
            "window_batches": 2,
        },
        "tracking": {"enabled": False},
    }
    for name, values in (recipe or {}).items():
        sections[name] = {**sections.get(name, {}), **values}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def make_phased_run(
    root: Path, *, steps: int, more: int, store: Mapping[str, Any] | None = None, **train: Any
) -> Path:
    """Makes a run of ``steps`` steps, then ``more`` steps on a store of 20 sequences twice as long, at
    ``root/longer``. ``store``: settings of both stores."""
    teacher, same = make_teacher(max_position_embeddings=2 * L + 4), dict(store or {})
    longer = root / "longer"
    make_store(
        longer, teacher,
        **{**same, "sequences": 20, "held_out": 0, "masking_epochs": 1, "seed": 1, "length": 2 * L},
    )  # fmt: skip
    phased = {"max_steps": steps, "phases": [{"store": str(longer), "steps": more}], **train}
    return make_run(root, teacher=teacher, recipe={"train": phased}, **same)


def command(root: Path, *words: str) -> int:
    """Runs ``student_train/main.py --recipe root/recipe.yaml`` with these words. Returns its exit code."""
    return main.run(main.parse(["--recipe", str(root / "recipe.yaml"), *words]))


def student(root: Path, name: str = "student") -> Path:
    """Returns the directory of a student of the recipe."""
    return root / "runs" / "tiny" / "students" / name


def history(root: Path, name: str = "student") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (student(root, name) / "history.jsonl").read_text().splitlines()]


def logged(root: Path, name: str = "student") -> list[dict[str, Any]]:
    """Returns the records of training steps in history.jsonl."""
    return [line for line in history(root, name) if "loss" in line]


def validated(root: Path, name: str = "student") -> dict[str, float]:
    """Returns the validation measures of the trained student."""
    lines = [line for line in history(root, name) if any(key.startswith("validation_") for key in line)]
    return {k.removeprefix("validation_"): v for k, v in lines[-1].items() if k != "step"}


def weights(root: Path, name: str = "student") -> dict[str, torch.Tensor]:
    """Returns the weights of the published model."""
    return load_file(student(root, name) / "model" / "model.safetensors")
