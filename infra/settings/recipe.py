"""The recipe: all settings of a run, in one YAML file. `recipe_file` reads and checks the file."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import ConfigDict

from infra.errors import UserError
from infra.files import storage
from infra.recipe_words import with_nearest_name
from infra.settings import sections
from infra.settings.sections import SOFT_TARGETS, StoreNeeds, is_name, require
from infra.trees import tuples_as_lists
from infra.yaml_text import dump_yaml

DEFAULT_STUDENT = "student"
"""Name of the only student of a recipe without ``students``."""
ROWS = ("teacher", "undistilled", "start")
"""Names of rows that every report has, and that no student may have."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run: its name, its output directory and nine sections. Creating an invalid recipe
    raises ValueError."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    output: str = "runs"
    corpus: sections.Corpus | None = None
    """Required by the teacher pass, and read only by it."""
    sequences: sections.Sequences = field(default_factory=sections.Sequences)
    masking: sections.Masking = field(default_factory=sections.Masking)
    teacher: sections.Teacher | None = None
    """Required by the teacher pass, and read only by it."""
    store: sections.Store = field(default_factory=sections.Store)
    student: sections.Student = field(default_factory=sections.Student)
    train: sections.Train = field(default_factory=sections.Train)
    students: dict[str, sections.Variant] = field(default_factory=dict)
    """Name of one of several students -> its settings; ``student`` and ``train`` are their defaults."""
    evaluation: sections.Evaluation = field(default_factory=sections.Evaluation)
    tracking: sections.Tracking = field(default_factory=sections.Tracking)

    def __post_init__(self) -> None:
        for field_name, value in (("name", self.name), *(("students", name) for name in self.students)):
            allowed = "letters, digits, dots, dashes and underscores, at most 100"
            require(is_name(value), f"{field_name}: must be {allowed}, not {value!r}")
        lower_names = {name.lower() for name in self.students}
        names, differ = ", ".join(self.students), len(lower_names) == len(self.students)
        require(differ, f"students: two of {names} differ only in upper and lower case; rename one")
        taken = lower_names & set(ROWS)
        another = "is the name of another row of the report; choose another"
        require(not taken, f"students: {', '.join(taken)} {another}")
        require(self.output != "", "output: is empty; name a directory")
        _check_models(self)
        _check_across_sections(self)

    @property
    def root(self) -> str:
        """Directory or URL of all outputs of this recipe."""
        return storage.join(self.output, self.name)

    @property
    def store_path(self) -> str:
        """Directory or URL of the store."""
        return self.store.path or storage.join(self.root, "store")

    def refuse_outputs_in_store(self) -> None:
        """Raises UserError if the store's directory contains this recipe's outputs. ``verify`` would report
        the outputs as foreign files, and ``--repair`` would move them away."""
        paths = (self.store_path, self.root)
        store, root = (path if storage.is_remote(path) else os.path.realpath(path) for path in paths)
        if f"{root}/".startswith(store.rstrip("/") + "/"):
            raise UserError(
                f"store.path: {self.store_path} would hold {self.root}, where students and evaluation go;"
                " give the store a directory of its own"
            )

    def runs(self) -> dict[str, StudentRun]:
        """Returns student name -> student, in the order of the file."""
        only = sections.Variant(student=self.student, train=self.train)
        variants = self.students or {DEFAULT_STUDENT: only}
        return {name: StudentRun(self, name, one.student, one.train) for name, one in variants.items()}

    def run(self, name: str) -> StudentRun:
        """Returns the student ``name``. Raises UserError, which suggests a name, if there is none."""
        runs = self.runs()
        if name not in runs:
            raise UserError(with_nearest_name(f"the recipe has no student {name!r}", name, list(runs)))
        return runs[name]

    @property
    def evaluation_dir(self) -> str:
        return storage.join(self.root, "evaluation")

    def fingerprinted_settings(self, *names: str) -> dict[str, dict[str, Any]]:
        """Returns section -> setting -> value of the fingerprinted settings in these sections, for JSON."""
        return {name: fingerprinted_settings(getattr(self, name)) for name in names}

    def to_yaml(self) -> str:
        """Returns all settings, defaults included, as YAML; ``load_recipe`` reads an equal recipe from it."""
        return dump_yaml(tuples_as_lists(dataclasses.asdict(self)))

    def save(self, directory: str) -> None:
        """Publishes ``directory/recipe.yaml``."""
        storage.publish_if_changed(storage.join(directory, "recipe.yaml"), self.to_yaml().encode())


@dataclass(frozen=True)
class StudentRun:
    """One student of a recipe: its settings and its output directory."""

    recipe: Recipe
    name: str
    student: sections.Student
    train: sections.Train

    @property
    def directory(self) -> str:
        return storage.join(self.recipe.root, "students", self.name)

    @property
    def registered_name(self) -> str:
        """Name in the model registry: the recipe's, followed by the student's if the recipe has several."""
        name = self.recipe.tracking.model_name or self.recipe.name
        return f"{name}-{self.name}" if self.recipe.students else name

    @property
    def title(self) -> str:
        """Name on progress bars and in messages."""
        return self.name if self.name == DEFAULT_STUDENT else f"student {self.name}"

    def fingerprinted_settings(self) -> dict[str, dict[str, Any]]:
        """Returns section -> setting -> value of the student's fingerprinted settings, for JSON."""
        return {"student": fingerprinted_settings(self.student), "train": fingerprinted_settings(self.train)}


def fingerprinted_settings(section: Any) -> dict[str, Any]:
    """Returns setting -> value of a section's fingerprinted settings, for JSON. A setting that earlier
    versions lacked is left out if it has its default (`fields.added`)."""
    values, fields = dataclasses.asdict(section), dataclasses.fields(section)
    unset = [item.name for item in fields if "added" in item.metadata and values[item.name] == item.default]
    names = [item.name for item in fields if item.metadata["fingerprinted"] and item.name not in unset]
    return {name: tuples_as_lists(values[name]) for name in names}


def _check_models(recipe: Recipe) -> None:
    """Raises ValueError if a name in ``evaluation.models`` is also the name of another row of the report."""
    taken = {name.lower() for name in (*ROWS, *(recipe.students or (DEFAULT_STUDENT,)))}
    for name in recipe.evaluation.models:
        another = "is the name of another row of the report; choose another"
        require(name.lower() not in taken, f"evaluation.models: {name} {another}")


def _check_across_sections(recipe: Recipe) -> None:
    """Raises ValueError if settings of different sections contradict each other."""
    corpus, store = recipe.corpus, recipe.store
    if corpus is None:
        return
    require(
        corpus.source == "hub" or (corpus.config is None and corpus.validation_split is None),
        f"corpus.config and corpus.validation_split are for source: hub, not {corpus.source}; leave them out",
    )
    require(
        corpus.source != "hub" or not corpus.validation_path,
        "corpus.validation_path: is not for a hub corpus; name its held-out split in corpus.validation_split",
    )
    require(
        corpus.source == "text" or corpus.document == "line",
        f"corpus.document: {corpus.document} is for source: text; a row of {corpus.source} is one document",
    )
    require(
        store.positions != "pooled" or recipe.sequences.packing == "document",
        "store.positions: pooled keeps one vector per document; set sequences.packing: document",
    )
    require(
        store.positions != "masked" or recipe.masking.probability != 0,
        "store.positions: masked keeps nothing if masking.probability is 0; set one of them differently",
    )


class StoreContent(Protocol):
    """What a store holds: the section ``store`` of a recipe, or the ``Layout`` of a finished store."""

    @property
    def positions(self) -> str: ...
    @property
    def hidden_states(self) -> str: ...
    @property
    def replay_layers(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def temperatures(self) -> tuple[float, ...]: ...
    @property
    def teacher_weights(self) -> bool: ...


def unmet_needs(train: sections.Train, store: StoreContent, has_masks: bool = True) -> list[str]:
    """Returns one message for each thing that the loss needs and the store lacks. Each message begins with
    the name of a field of ``train``. ``has_masks``: whether the store's text is masked."""
    kind = train.soft_target_kind(store.hidden_states)
    needs = StoreNeeds() if kind is None else SOFT_TARGETS[kind]
    problems = []
    if train.alpha_mlm and not has_masks:
        problems.append(
            "alpha_mlm: the text of the store is not masked; set train.alpha_mlm: 0 or run the teacher with"
            " masking.probability: 0.15"
        )
    if train.alpha_ce and train.kl_positions == "masked" and not has_masks:
        remedy = "set train.kl_positions: all"
        problems.append(f"kl_positions: masked, but the store's text is not masked; {remedy}")
    if train.teacher == "live" and not store.teacher_weights:
        problems.append(
            "teacher: live runs the whole teacher, whose weights the store does not hold"
            " (store.teacher_weights: false); set train.teacher: store"
        )
    replayed = max(store.replay_layers, int(train.teacher == "live"))
    layer = train.relation_teacher_layer
    if train.alpha_relation and replayed and layer is not None and not -replayed <= layer < 0:
        problems.append(
            f"relation_teacher_layer: {layer} is not a replayed layer of the teacher; set a number from"
            f" {-replayed} to -1, or run the teacher with more store.replay_layers"
        )
    if train.teacher == "live" or store.positions == "pooled":
        return problems
    if train.alpha_embedding and (store.positions != "all" or store.hidden_states == "none"):
        problems.append(
            "alpha_embedding: embeddings of texts need pooled embeddings or hidden states at all positions;"
            " set train.alpha_embedding: 0 or run the teacher with store.positions: all and"
            " store.hidden_states: float16"
        )
    if train.alpha_cos and store.hidden_states == "none":
        problems.append(
            "alpha_cos: the cosine term needs hidden states, which the store does not hold; set"
            " train.alpha_cos: 0 or run the teacher with store.hidden_states: float16"
        )
    if train.alpha_relation and store.replay_layers == 0:
        problems.append(
            "alpha_relation: relations need the input of the teacher's top layer, which the store does not"
            " hold; set train.alpha_relation: 0 or run the teacher with store.replay_layers: 1"
        )
    if train.alpha_ce and train.kl_positions == "all" and store.positions == "masked":
        problems.append(
            "kl_positions: all, but the store holds masked positions only; set train.kl_positions: masked or"
            " run the teacher with store.positions: all"
        )
    if needs.hidden_states and store.hidden_states == "none":
        problems.append(
            f"soft_targets: {kind} needs hidden states, which the store does not hold; set another kind or"
            " run the teacher with store.hidden_states: float16"
        )
    if needs.top_k and store.top_k == 0:
        problems.append(
            f"soft_targets: {kind} needs top-k logits, which the store does not hold; set another kind or run"
            " the teacher with store.top_k: 64"
        )
    elif needs.top_k and train.temperature not in store.temperatures:
        problems.append(
            f"temperature: {train.temperature:g} is not among the store's temperatures"
            f" {list(store.temperatures)}, which {kind} needs; use one of them or train.soft_targets: exact"
        )
    return problems
