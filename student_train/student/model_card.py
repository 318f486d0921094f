"""The model card: the student's teacher, training settings and results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.settings.recipe import StudentRun
from infra.settings.sections import Train
from offline_teacher.families import family_of
from offline_teacher.families.positions import usable_length
from offline_teacher.store.reader import Store
from student_train.student.model import StudentModel, needs_head


def model_card(
    run: StudentRun, stores: Sequence[Store], model: StudentModel, results: Mapping[str, Any]
) -> str:
    """README.md of the model directory. ``stores``: the recipe's own, then those of ``train.phases``."""
    train, store = run.train, stores[0]
    fingerprint = store.spec.fingerprint
    task, library = "fill-mask" if needs_head(train) else "feature-extraction", "transformers"
    use = f'from transformers import pipeline\n\npipeline("{task}", model="path/to/this/directory")'
    if model.pooling is not None:
        task, library = "sentence-similarity", "sentence-transformers"
        use = "from sentence_transformers import SentenceTransformer\n\n"
        use += 'SentenceTransformer("path/to/this/directory")'
    front = f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- distillation\n---\n"
    split = store.splits["train"].plan
    lineage = [
        ("store", store.digest),
        ("teacher weights", fingerprint.get("teacher")),
        ("tokenizer", fingerprint.get("tokenizer")),
        ("sequences x masking epochs", f"{split.samples_per_epoch:,} x {split.masking_epochs}"),
        ("sequence length", store.layout.length),
        *((f"store of phase {number}", one.digest) for number, one in enumerate(stores[1:], 1)),
    ]
    kind = "masked language model" if needs_head(train) else "text encoder (no masked-LM head was trained)"
    parts = [
        f"{front}\n# {run.recipe.name} / {run.name}\n",
        f"A {kind} distilled from a larger teacher, whose outputs came from a store on disk.\n",
        f"```python\n{use}\n```\n",
        "## Lineage\n",
        _table(("what", "value"), lineage),
        f"\n## Training\n\nLoss: {_loss(train, results)}; {results['steps']:,} steps of {train.batch_size}"
        " sequences.\n",
        _table(("at the last logged step", "value"), sorted(results["training"].items())),
        _frozen(model),
        _lengths([one.layout.length for one in stores], run, model),
        "\n## Held-out text\n",
        _table(("measure", "value"), sorted(results["validation"].items()))
        if results["validation"]
        else "The store holds none.\n",
        "" if needs_head(train) else "Measures over the vocabulary: not trained.\n",
        "\n## Recipe\n",
        f"```json\n{json.dumps(run.outcome_settings(), indent=1, sort_keys=True)}\n```\n",
    ]
    return "\n".join(parts)


def _loss(train: Train, results: Mapping[str, Any]) -> str:
    terms = {
        f"{train.alpha_ce:g} * T^2 * KL": train.alpha_ce,
        f"{train.alpha_mlm:g} * MLM": train.alpha_mlm,
        f"{train.alpha_cos:g} * (1 - cosine)": train.alpha_cos,
        f"{train.alpha_relation:g} * relations": train.alpha_relation,
        f"{train.alpha_embedding:g} * distance of vectors": train.alpha_embedding,
    }
    text = " + ".join(name for name, weight in terms.items() if weight)
    soft_targets = results["soft_targets"]
    return f"{text}, T = {train.temperature:g}, soft targets: {soft_targets}" if soft_targets else text


def _frozen(model: StudentModel) -> str:
    """The parameters that no term of the loss reaches."""
    names = [name.removeprefix("model.") for name, p in model.named_parameters() if not p.requires_grad]
    if not names:
        return ""
    return "\nNo term of the loss reaches these parameters, which are as they began:\n\n" + "".join(
        f"- `{name}`\n" for name in names
    )


def _lengths(lengths: Sequence[int], run: StudentRun, model: StudentModel) -> str:
    """The lengths of the training sequences, by phase, and what the student has not seen beyond them."""
    config, trained = model.model.config, max(lengths)
    longest, rotary = usable_length(config), family_of(config).rotary
    phases = list(zip(run.train.phases, lengths[1:], strict=True))
    if longest <= trained and not phases:
        return ""
    text = f"\nIt was trained on sequences of {lengths[0]} tokens"
    text += "".join(f", then for {phase.steps:,} steps on sequences of {length}" for phase, length in phases)
    text += f", and takes up to {longest}."
    if trained > lengths[0] and not rotary:
        steps = sum(phase.steps for phase, length in phases if length > lengths[0])
        text += f" Only {steps:,} steps reached its embeddings of positions from {lengths[0]} on."
    if longest <= trained:
        return f"{text}\n"
    if rotary:
        text += " It has no embeddings of positions, but it has never seen tokens that are further apart."
    else:
        began = "the teacher's" if run.student.init == "teacher" else "random numbers"
        text += f" Its embeddings of positions {trained} to {longest - 1} are {began}, as they began: no step"
        text += " reached them."
    return f"{text} Measure it on longer texts before you rely on it there.\n"


def _table(headers: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {headers[0]} | {headers[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_shown(value)} |" for name, value in rows)]) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
