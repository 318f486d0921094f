"""Every setting of a recipe: one frozen dataclass per section, with a docstring below each field.

All sections are in this module, not beside their stages, because every command validates the whole recipe (a
typo in ``train`` must be found before the teacher pass, not after it) and no stage may import another.

A field made with ``outcome`` changes the result and is part of the fingerprint. A field made with
``speed`` changes only speed or place, and may differ when a run is resumed.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from infra.settings.task_settings import TaskSettings

TEMPERATURES = (0.1, 1000.0)
"""Smallest and largest temperature that the number formats allow. Logits have a relative error of 2^-9 for a
bfloat16 teacher (0.03 near 16) and of 2^-11 for a float32 teacher stored in float16 (0.008). Below T = 0.1
these errors change a probability by a third, or by 8 %. Above T = 1000 teacher and student are both almost
uniform, and the gradient, their difference, is not much larger than float32's rounding error."""


CorpusSource = Literal["text", "jsonl", "parquet", "hub"]
DocumentUnit = Literal["file", "line", "block"]
Precision = Literal["bfloat16", "float16", "float32"]

MAX_LENGTH = 1024
"""Largest number of tokens in a sequence; the teacher's position embeddings may allow fewer."""


def outcome(default: Any = MISSING) -> Any:
    """A field that changes the result: part of the fingerprint."""
    return field(default=default, metadata={"outcome": True})


def speed(default: Any = MISSING, factory: Any = MISSING) -> Any:
    """A field that changes only speed, place or appearance: free to differ on resume.

    ``factory`` is of a mapping, which cannot be hashed.
    """
    hashed = None if factory is MISSING else False
    return field(default=default, default_factory=factory, hash=hashed, metadata={"outcome": False})


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def in_a_grid(value: Any) -> tuple[Any, ...]:
    """The values that a setting takes: those of a list, or the one."""
    return value if isinstance(value, tuple) else (value,)


_RANGE = "{:g} to {:g}".format(*TEMPERATURES)


def _is_temperature(value: float) -> bool:
    return TEMPERATURES[0] <= value <= TEMPERATURES[1]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where the documents come from."""

    source: CorpusSource = outcome("text")
    path: tuple[str, ...] = speed()
    """Globs of files (local or URL; .gz and .zst are decompressed), or the hub name of a dataset.
    Content, not path, is fingerprinted."""
    validation_path: tuple[str, ...] = speed(())
    """The same for held-out text; empty: no validation store (hub: see ``validation_split``)."""
    document: DocumentUnit = outcome("line")
    """The unit of a text file that is one document. Blank lines separate blocks."""
    text_column: str = outcome("text")
    config: str | None = outcome(None)
    """Hub configuration name, e.g. ``wikitext-103-raw-v1``."""
    split: str = outcome("train")
    validation_split: str | None = outcome(None)
    streaming: bool = outcome(False)
    """Read a hub dataset as a stream instead of downloading it whole. An outcome field: a stream is cut by
    its files, a downloaded dataset by rows, and sequences do not cross a cut."""
    strict: bool = speed(False)
    """Stop at the first invalid byte, empty document or missing field instead of counting it."""

    def __post_init__(self) -> None:
        require(len(self.path) > 0, "path: names no files; give a glob or a hub dataset name")
        require(
            self.source != "hub" or len(self.path) == 1,
            "path: a hub corpus is exactly one dataset name",
        )


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """How documents become fixed-length sequences."""

    length: int = outcome(128)
    """L, special tokens included."""
    packing: Literal["packed", "document"] = outcome("packed")
    """``packed``: documents are concatenated and cut every L tokens. ``document``: a sequence is one
    document, truncated to L tokens."""
    part_bytes: int = outcome(16 << 20)
    """Bytes of text in a part, which one worker tokenises. If packed, only a part's last sequence can be
    short."""

    def __post_init__(self) -> None:
        require(8 <= self.length <= MAX_LENGTH, f"length: must be 8 to {MAX_LENGTH}, not {self.length}")
        require(self.part_bytes >= 1 << 10, f"part_bytes: must be at least 1024, not {self.part_bytes}")


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which tokens the teacher and the student must predict."""

    probability: float | None = outcome(None)
    """ceil(probability * maskable tokens) positions of every sequence are masked; 0: masking is off.
    None: 0.15 for a teacher with a masked-LM head, else 0."""
    sampling: Literal["uniform", "frequency"] = outcome("uniform")
    """``frequency``: p proportional to count^-smoothing (DistilBERT, XLM)."""
    smoothing: float = outcome(0.7)
    whole_word: bool = outcome(False)
    epochs: int = outcome(1)
    """R: how many times the corpus is masked and passed through the teacher."""
    seed: int = outcome(0)

    def __post_init__(self) -> None:
        require(
            self.probability is None or 0 <= self.probability <= 0.5,
            f"probability: must be 0 to 0.5, not {self.probability}",
        )
        require(1 <= self.epochs <= 1000, f"epochs: must be 1 to 1000, not {self.epochs}")
        require(
            self.probability != 0 or self.epochs == 1,
            f"epochs: {self.epochs} passes over text that is not masked would all be the same; set epochs: 1",
        )
        require(self.smoothing >= 0, f"smoothing: must be >= 0, not {self.smoothing}")
        require(0 <= self.seed < 2**63, f"seed: must be 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher model, and the workers that run it."""

    model: str = speed()
    """Hub name or local directory; its weights, not its name, are fingerprinted."""
    revision: str | None = speed(None)
    dtype: Precision = outcome("bfloat16")
    batch_size: int = outcome(32)
    """Sequences a forward. An outcome field: the blocking of matrix products changes last bits."""
    cpu_threads: int = outcome(1)
    """Torch threads of one worker. The number is fixed, so the teacher's numbers do not depend on
    ``workers``."""
    workers: int = speed(2)
    """At most this many workers."""
    min_workers: int = speed(1)
    """The pass runs only while at least this many workers are available."""
    gpus_per_worker: float = speed(0.0)
    task_attempts: int = speed(3)
    """A task that has failed this many times on healthy workers is quarantined and named; the pass
    continues."""
    ray_address: str | None = speed(None)
    """None: the cluster this process was submitted to, else a local one."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size: must be >= 1, not {self.batch_size}")
        require(self.cpu_threads >= 1, f"cpu_threads: must be >= 1, not {self.cpu_threads}")
        require(
            1 <= self.min_workers <= self.workers,
            f"min_workers: must be 1 to workers = {self.workers}, not {self.min_workers}",
        )
        gpus = self.gpus_per_worker
        require(
            0 <= gpus <= 1,
            f"gpus_per_worker: must be 0 to 1, not {gpus}: a worker uses one GPU; start more workers",
        )
        require(self.task_attempts >= 1, f"task_attempts: must be >= 1, not {self.task_attempts}")


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where the store is, and what it keeps of every sample. Students and evaluation only read ``path``."""

    path: str | None = speed(None)
    """Directory or URL of the store; None: ``<output>/<name>/store``."""
    replay_layers: int = outcome(0)
    """n: the store keeps the input of the teacher's top n encoder layers; students run these layers on it. 0:
    the store keeps the output of the last layer."""
    hidden_states: Literal["float16", "bfloat16", "int8", "none"] = outcome("float16")
    positions: Literal["all", "masked", "pooled"] = outcome("all")
    """Which positions are kept. ``pooled``: only the sentence encoder's vector of each sequence."""
    top_k: int = outcome(64)
    """K: the number of largest logits kept for each position. 0: neither logits nor logsumexp are kept."""
    temperatures: tuple[float, ...] = outcome((1.0, 2.0))
    """The temperatures at which logsumexp(logits / T) is kept; ascending."""
    teacher_weights: bool = outcome(True)
    """true: the store holds all weights of the teacher. false: only those that replay needs, for teachers
    that may not be redistributed; students can then not start from the teacher's layers."""
    task_sequences: int = outcome(4096)
    """Sequences of a task, the unit of work, retry and commit."""
    block_bytes: int | None = outcome(None)
    """Bytes of a block, the unit of range requests and of shuffling. None: 4 MiB, or more where a request for
    the smaller of top-k and hidden states would otherwise have less than 1 MiB."""
    shard_bytes: int = outcome(256 << 20)
    """At most this many bytes in one file."""

    def __post_init__(self) -> None:
        require(0 <= self.top_k <= 1024, f"top_k: must be 0 to 1024, not {self.top_k}")
        require(
            0 <= self.replay_layers <= 1000, f"replay_layers: must be 0 or more, not {self.replay_layers}"
        )
        require(
            all(_is_temperature(t) for t in self.temperatures)
            and list(self.temperatures) == sorted(set(self.temperatures)),
            f"temperatures: must be {_RANGE}, ascending and distinct, not {list(self.temperatures)}",
        )
        require(
            self.top_k == 0 or 1.0 in self.temperatures,
            "temperatures: must contain 1.0 where top_k > 0",
        )
        require(
            1 <= self.task_sequences <= 1 << 24, f"task_sequences: must be >= 1, not {self.task_sequences}"
        )
        least = 1 if self.block_bytes is None else self.block_bytes
        require(least >= 1, f"block_bytes: must be >= 1, not {self.block_bytes}")
        require(
            self.shard_bytes >= least,
            f"shard_bytes: {self.shard_bytes} is less than block_bytes = {self.block_bytes}",
        )
        self._check_positions()

    def _check_positions(self) -> None:
        if self.positions == "pooled":
            require(
                self.top_k == 0 and self.replay_layers == 0,
                "positions: pooled keeps one vector a sequence; set top_k: 0 and replay_layers: 0",
            )
            require(
                self.hidden_states in ("float16", "none"),
                "hidden_states: a pooled vector is kept in float16; leave it out with positions: pooled",
            )
            return
        require(
            self.top_k > 0 or self.hidden_states != "none",
            "top_k = 0 and hidden_states = none: the store would hold nothing of the teacher",
        )
        require(
            self.replay_layers == 0 or (self.positions == "all" and self.hidden_states != "none"),
            "replay_layers: the top layers can only be replayed from hidden states at all positions; set"
            " positions: all and hidden_states: float16",
        )


@dataclass(frozen=True, kw_only=True)
class Student:
    """The architecture and where its weights start."""

    layers: str | tuple[int, ...] = outcome("every_second")
    """Teacher layers the student starts from: a list, ``last:N``, or ``every_second``, which ends with the
    teacher's last."""
    init: Literal["teacher", "random"] = outcome("teacher")
    hidden_size: int | None = outcome(None)
    """None: the teacher's hidden size. A narrower student starts from slices of the teacher's layers unless
    ``init`` is random; for the cosine loss it also learns a projection to the teacher's width."""
    attention_heads: int | None = outcome(None)
    """None: as many as the teacher has."""
    intermediate_size: int | None = outcome(None)
    """Width of the feed-forward layers. None: the teacher's, shrunk like ``hidden_size``."""
    dropout: float = outcome(0.1)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            name, _, count = self.layers.partition(":")
            require(
                self.layers == "every_second" or (name == "last" and count.isdigit() and int(count) > 0),
                f"layers: must be a list of layer numbers, every_second or last:N, not {self.layers!r}",
            )
        else:
            require(len(self.layers) > 0, "layers: names no layer")
            require(
                all(layer >= 0 for layer in self.layers) and list(self.layers) == sorted(set(self.layers)),
                f"layers: must be ascending and distinct, counted from 0, not {list(self.layers)}",
            )
        require(0 <= self.dropout < 1, f"dropout: must be in [0, 1), not {self.dropout}")
        for name in ("hidden_size", "attention_heads", "intermediate_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: must be >= 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class StoreNeeds:
    """The columns that a kind of soft target reads from a store."""

    hidden_states: bool = False
    top_k: bool = False
    """Top-k logits, and the logsumexp at the temperature of the loss."""


TERMS = ("alpha_ce", "alpha_mlm", "alpha_cos", "alpha_relation", "alpha_embedding")
"""The weights of the loss's terms."""
SOFT_TARGETS = {"exact": StoreNeeds(hidden_states=True), "topk": StoreNeeds(top_k=True)}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """More steps after those on the recipe's own store, for example with longer sequences."""

    store: str = speed()
    """Directory or URL of a store of the same teacher, with the teacher's outputs in the same form."""
    steps: int = outcome()
    """Number of its optimiser steps, each of ``batch_size`` sequences."""

    def __post_init__(self) -> None:
        require(self.store != "", "phases: a phase's store names no directory")
        require(self.steps >= 1, f"phases: a phase's steps must be >= 1, not {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How the student learns from the store. Weights of the loss are DistilBERT's (arXiv 1910.01108)."""

    epochs: float = outcome(3.0)
    """Passes over the corpus; epoch e reads masking epoch e mod R."""
    max_steps: int | None = outcome(None)
    """Ends the training on the recipe's own store earlier, at this many optimiser steps."""
    phases: tuple[Phase, ...] = speed(())
    """Phases that follow, each ``{store: PATH, steps: N}``: N steps on another store of the same teacher, for
    example with longer sequences. One schedule of the learning rate spans all of them. Steps and content of
    the stores are fingerprinted, their places are not."""
    batch_size: int = outcome(256)
    """Sequences of one optimiser step, over all ranks and accumulation steps."""
    micro_batch_size: int = speed(32)
    """Sequences of one forward on one rank."""
    learning_rate: float = outcome(5e-4)
    betas: tuple[float, float] = outcome((0.9, 0.98))
    eps: float = outcome(1e-6)
    weight_decay: float = outcome(0.0)
    schedule: Literal["linear", "cosine", "constant"] = outcome("linear")
    warmup_ratio: float = outcome(0.05)
    max_grad_norm: float = outcome(5.0)
    temperature: float = outcome(2.0)
    alpha_ce: float = outcome(5.0)
    alpha_mlm: float = outcome(2.0)
    alpha_cos: float = outcome(1.0)
    alpha_relation: float = outcome(0.0)
    """Weight of MiniLMv2's relations (arXiv 2012.15828); needs ``store.replay_layers`` of 1 or more."""
    alpha_embedding: float = outcome(0.0)
    """Weight of the distance between the student's and the teacher's vector of a text. It needs the store of
    a sentence encoder, with ``positions: pooled`` (then no other term is possible) or ``sequences.packing:
    document``."""
    relation_heads: int | None = outcome(None)
    """Number of relation heads, which must divide both widths. None: their largest common divisor up to
    64."""
    relation_weights: tuple[float, float, float] = outcome((1.0, 1.0, 1.0))
    """Relative weights of the query, key and value relations; 0 leaves one out."""
    relation_layer: int = outcome(-1)
    """The student's layer whose queries, keys and values are compared; -1: its last."""
    soft_targets: Literal["auto", "exact", "topk"] = outcome("auto")
    """One of ``SOFT_TARGETS``; ``auto``: exact where the store holds hidden states, else topk."""
    kl_positions: Literal["all", "masked"] = outcome("all")
    teacher: Literal["store", "live"] = outcome("store")
    """``store``: the loss uses the stored outputs of the teacher. ``live``: every step runs the whole teacher
    on the store's text, which needs ``store.teacher_weights: true``."""
    dtype: Precision = outcome("bfloat16")
    zero_stage: Literal[0, 1, 2] = speed(0)
    deepspeed_config: str | None = speed(None)
    """A DeepSpeed JSON merged under the recipe; a key set in both to different values is an error."""
    seed: int = outcome(0)
    window_batches: int = outcome(64)
    """Size of the shuffle window in batches. Each window takes random blocks from the whole corpus."""
    prefetch: int = speed(4)
    """Micro-batches decoded ahead of the step."""
    compile: bool = speed(True)
    """Fuse the elementwise part of the loss with torch.compile; falls back to eager with a warning."""
    deterministic: bool = speed(False)
    """Use torch's deterministic algorithms. With them, a resumed run on a GPU is bit-equal to an
    uninterrupted one, but slower. On a CPU this holds without them."""
    profile_steps: int = speed(0)
    """Number of steps that rank 0 profiles, after the first ten; it writes ``trace.json`` beside the
    history."""
    log_every: int = speed(10)
    """Steps between two lines of the history."""
    validate_every: int = speed(0)
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = speed(0)
    """Steps between two checkpoints; 0: only ``checkpoint_minutes`` counts."""
    checkpoint_minutes: float = speed(5.0)
    """Minutes between two checkpoints; 0: only ``checkpoint_every`` counts."""
    keep_checkpoints: int = speed(2)
    cache_dir: str | None = speed(None)
    """Directory that caches blocks of a remote store for all ranks of a node; None: a temporary directory."""
    cache_bytes: int = speed(20 << 30)

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batch_size",
            "window_batches",
            "prefetch",
            "log_every",
        ):
            require(getattr(self, name) >= 1, f"{name}: must be >= 1, not {getattr(self, name)}")
        at_least_0 = ("weight_decay", "max_grad_norm", "validate_every", "checkpoint_every", "profile_steps")
        for name in (*TERMS, *at_least_0, "checkpoint_minutes"):
            require(getattr(self, name) >= 0, f"{name}: must be >= 0, not {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "eps"):
            require(getattr(self, name) > 0, f"{name}: must be > 0, not {getattr(self, name)}")
        require(_is_temperature(self.temperature), f"temperature: must be {_RANGE}, not {self.temperature}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"max_steps: must be >= 1, not {self.max_steps}"
        )
        require(0 <= self.warmup_ratio < 1, f"warmup_ratio: must be in [0, 1), not {self.warmup_ratio}")
        require(
            min(self.betas) >= 0 and max(self.betas) < 1, f"betas: must be in [0, 1), not {list(self.betas)}"
        )
        require(self.cache_bytes >= 0, f"cache_bytes: must be >= 0, not {self.cache_bytes}")
        require(self.keep_checkpoints >= 1, f"keep_checkpoints: must be >= 1, not {self.keep_checkpoints}")
        require(
            any(getattr(self, name) > 0 for name in TERMS),
            f"{', '.join(TERMS)} are all zero: there is no loss",
        )
        require(
            min(self.relation_weights) >= 0 and max(self.relation_weights) > 0,
            f"relation_weights: must be >= 0 and not all 0, not {list(self.relation_weights)}",
        )
        require(
            self.teacher == "store" or self.soft_targets != "topk",
            "soft_targets: topk is what a store holds; a live teacher gives exact ones, set it to exact",
        )
        require(
            self.batch_size % self.micro_batch_size == 0,
            f"batch_size: {self.batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}",
        )

    def soft_target_kind(self, hidden_states: str) -> str | None:
        """The kind of soft target for a store with this ``hidden_states``; None if alpha_ce is 0."""
        if not self.alpha_ce:
            return None
        if self.soft_targets == "auto":
            return "exact" if hidden_states != "none" else "topk"
        return self.soft_targets


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of several students of a recipe."""

    student: Student
    train: Train


@dataclass(frozen=True, kw_only=True)
class Require:
    """What every student must reach, or the command ends with exit code 4. None: not required.

    Shares are fractions: ``retention: 0.97`` asks for at least 97 % of the teacher's macro score.
    """

    macro: float | None = speed(None)
    retention: float | None = speed(None)
    gap_closed: float | None = speed(None)
    gap_closed_best: float | None = speed(None)
    agreement: float | None = speed(None)
    """Least mean over tasks of the share of examples on which student and teacher give the same answer."""
    int8_loss: float | None = speed(None)
    """Most points of score that a task may lose in int8."""
    calibration_error: float | None = speed(None)
    """Largest expected calibration error of a task, a fraction."""
    p50_ms: float | None = speed(None)
    """Largest median latency at batch size 1, milliseconds."""
    megabytes: float | None = speed(None)
    """Largest size of the weights."""
    beats: Literal["random", "start"] | None = speed(None)
    """A reference than which the macro score must be higher, by a paired test at 5 %."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The tasks on which teacher and students are fine-tuned and scored, and how."""

    tasks: tuple[str | TaskSettings, ...] = outcome(("CoLA", "SST-2", "MRPC", "STS-B", "RTE"))
    """Names of built-in tasks, task files, or their settings in place (docs/tasks.md)."""
    data: str | None = speed(None)
    """Directory of official task files; None: the hub's ``glue``, ``imdb``, ``squad``."""
    seeds: tuple[int, ...] = outcome((0,))
    epochs: float | tuple[float, ...] = outcome(3.0)
    """A list is a grid: all its values are tried, and dev chooses. So it is of the next two settings."""
    batch_size: int | tuple[int, ...] = outcome(32)
    learning_rate: float | tuple[float, ...] = outcome(3e-5)
    max_steps: int | None = outcome(None)
    """Largest number of steps of a fine-tuning run; for large tasks on few cores."""
    max_length: int = outcome(128)
    dtype: Literal["bfloat16", "float32"] = outcome("float32")
    references: tuple[Literal["random", "start"], ...] = outcome(("random",))
    """What students are compared with, beside the teacher. ``random``: the student's shape with random
    weights (row ``undistilled``). ``start``: the student before its training, of the teacher's layers."""
    models: dict[str, str] = speed(factory=dict)
    """Further rows: name -> directory, URL or hub name of any other model."""
    second_distillation: bool = outcome(False)
    """Also fine-tune each student on labels and on the outputs of a fine-tuned teacher, on every task. These
    are the rows "<student> (D)"."""
    distillation_temperature: float = outcome(2.0)
    """Temperature of the second distillation."""
    latency_sentences: int = speed(0)
    """Sentences of the latency pass; 0: all of STS-B dev."""
    latency_threads: int = speed(1)
    elmo_reference: bool = speed(True)
    """Also time a network of ELMo's size (random weights), the slowest row of the latency table."""
    price_per_hour: float | None = speed(None)
    """Price of an hour of the processor on which latency is measured, in any currency; the report then gives
    the money for a million sentences."""
    watts: float | None = speed(None)
    """Power that it draws; the report then gives the energy for a million sentences."""
    require: Require | None = speed(None)
    """What every student must reach."""
    workers: int = speed(1)
    """Number of parallel fine-tuning runs; more than one run as Ray tasks."""

    def __post_init__(self) -> None:
        self._check_rows()
        for name in ("price_per_hour", "watts"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: must be > 0, not {value}")
        require(len(self.tasks) > 0, "tasks: names no task")
        require(len(self.seeds) > 0, "seeds: names no seed")
        for name in ("epochs", "learning_rate", "batch_size"):
            require(getattr(self, name) != (), f"{name}: the list is empty")
            for value in in_a_grid(getattr(self, name)):
                require(
                    value > 0, f"{name}: must be {'>= 1' if name == 'batch_size' else '> 0'}, not {value}"
                )
        for name in ("latency_threads", "workers"):
            require(getattr(self, name) >= 1, f"{name}: must be >= 1, not {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"max_steps: must be >= 1, not {self.max_steps}"
        )
        require(self.latency_sentences >= 0, f"latency_sentences: must be >= 0, not {self.latency_sentences}")
        temperature = self.distillation_temperature
        require(temperature > 0, f"distillation_temperature: must be > 0, not {temperature}")
        require(8 <= self.max_length <= 512, f"max_length: must be 8 to 512, not {self.max_length}")

    def _check_rows(self) -> None:
        require(
            len(set(self.references)) == len(self.references),
            f"references: {', '.join(self.references)} names one twice",
        )
        for name in self.models:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None,
                f"models: a name is letters, digits, dots, dashes and underscores, not {name!r}",
            )
        asked = self.require.beats if self.require else None
        require(
            asked is None or asked in self.references,
            f"require: beats {asked} needs it among evaluation.references",
        )


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where runs are recorded."""

    enabled: bool = speed(True)
    uri: str | None = speed(None)
    """MLflow tracking URI; None: ``sqlite:///<output>/mlflow.db``."""
    experiment: str = speed("distillation")
    model_name: str | None = speed(None)
    """Name in the model registry; None: the recipe's name."""
    system_metrics: bool = speed(True)
