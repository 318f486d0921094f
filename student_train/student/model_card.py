"""The model card: which teacher and store the student learned from, its training settings and its results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.settings.recipe import StudentRun
from infra.settings.sections import Train
from offline_teacher.families import family_of
from offline_teacher.families.positions import usable_length
from offline_teacher.store.store import Store
from student_train.data.loss_needs import needs_head
from student_train.student.model import StudentModel


def model_card(
    run: StudentRun, stores: Sequence[Store], model: StudentModel, results: Mapping[str, Any]
) -> str:
    """Returns the model directory's README.md. ``stores``: the recipe's, then those of ``train.phases``."""
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
        *((f"store of phase {number}", other.digest) for number, other in enumerate(stores[1:], 1)),
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
        _lengths([store.layout.length for store in stores], run, model),
        "\n## Held-out text\n",
        _table(("measure", "value"), sorted(results["validation"].items()))
        if results["validation"]
        else "The store holds no held-out text.\n",
        "" if needs_head(train) else "Measures over the vocabulary: not trained.\n",
        "\n## Recipe\n",
        f"```json\n{json.dumps(run.fingerprinted_settings(), indent=1, sort_keys=True)}\n```\n",
    ]
    return "\n".join(parts)


def _loss(train: Train, results: Mapping[str, Any]) -> str:
    """Returns the formula of the loss, with temperature and kind of soft targets."""
    terms = {
        f"{train.alpha_ce:g} * T^2 * KL": train.alpha_ce,
        f"{train.alpha_mlm:g} * MLM": train.alpha_mlm,
        f"{train.alpha_cos:g} * (1 - cosine)": train.alpha_cos,
        f"{train.alpha_relation:g} * relations": train.alpha_relation,
        f"{train.alpha_embedding:g} * embedding distance": train.alpha_embedding,
    }
    text = " + ".join(name for name, weight in terms.items() if weight)
    soft_targets = results["soft_targets"]
    return f"{text}, T = {train.temperature:g}, soft targets: {soft_targets}" if soft_targets else text


def _frozen(model: StudentModel) -> str:
    """Returns a paragraph that lists the frozen parameters; "" if there are none."""
    names = [name.removeprefix("model.") for name, p in model.named_parameters() if not p.requires_grad]
    if not names:
        return ""
    lines = "".join(f"- `{name}`\n" for name in names)
    return f"\nNo term of the loss reaches these parameters; they keep their initial values:\n\n{lines}"


def _lengths(lengths: Sequence[int], run: StudentRun, model: StudentModel) -> str:
    """Returns a paragraph on trained and untrained lengths; "" if the student takes no longer texts."""
    config, trained = model.model.config, max(lengths)
    longest, rotary = usable_length(config), family_of(config).rotary
    phases = list(zip(run.train.phases, lengths[1:], strict=True))
    if longest <= trained and not phases:
        return ""
    text = f"\nThe student was trained on sequences of {lengths[0]} tokens"
    text += "".join(f", then for {phase.steps:,} steps on sequences of {length}" for phase, length in phases)
    text += f", and takes up to {longest} tokens."
    if trained > lengths[0] and not rotary:
        steps = sum(phase.steps for phase, length in phases if length > lengths[0])
        text += f" Only {steps:,} steps trained its position embeddings from {lengths[0]} on."
    if longest <= trained:
        return f"{text}\n"
    if rotary:
        text += " It has no position embeddings, but it has never seen tokens that are further apart."
    else:
        initial = "the teacher's" if run.student.init == "teacher" else "random numbers"
        shrunk = ", made smaller by weight decay" if run.train.weight_decay else ""
        text += f" Its position embeddings {trained} to {longest - 1} are {initial}{shrunk}:"
        text += " no step trained them."
    return f"{text} Evaluate it on longer texts before you use it for them.\n"


def _table(headers: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    """Returns a Markdown table of two columns."""
    lines = [f"| {headers[0]} | {headers[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_shown(value)} |" for name, value in rows)]) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
