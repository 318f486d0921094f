"""Rate of the teacher pass relative to the bare forward, the bare encoder, and a simple script.

    python tests/benchmarks/bench_teacher.py [MODEL_DIRECTORY]

prints the rows; ``run()`` returns them, for BERT-base with random weights and for ../shared/teacher if it
exists. With a directory, only that teacher is measured.

The pass is measured in one worker: two threads call one ``TaskWorker``, as Ray does, so one task is written
while the other is computed. BERT-base makes 2 tasks of 64 samples; the small teacher makes 4 tasks of 256 if
the processor has bfloat16. A real pass has hundreds of tasks of 4,096 samples, so only its last task is
written without a task being computed. Bare forward and encoder get the batches of these tasks, in which every
sequence has full length. The script gets batches of 16 documents, cut at 128 tokens and padded; only non-pad
tokens count. One thread computes on each side, in bfloat16 or, on a processor without it, in float32. Rates
are from medians of interleaved repeats. Hidden states and encoder, which differ least, are repeated most
often.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.cpu.processor import computes_bfloat16
from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe
from offline_teacher.cluster.crews import WORKER_VARIABLES, teacher_crew
from offline_teacher.cluster.work_queue import Item
from offline_teacher.inputs.source import find_source
from offline_teacher.sequences.tokenizer import load_tokenizer
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.store import Store
from tests.benchmarks.results import Row, row
from tests.benchmarks.timing import interleave
from tests.offline_teacher.local_pool import LocalPool, make

SHARED = Path(__file__).resolve().parents[3] / "shared"
L, BATCH = 128, 16
DTYPE = "bfloat16" if computes_bfloat16() else "float32"
SCRIPT_BATCHES = 4
TOP_K = 64
SAMPLED = 5_000
"""Number of paragraphs, spread evenly over the corpus, that are used as documents."""


def run(model: str | None = None) -> list[Row]:
    if not WORKER_VARIABLES.items() <= os.environ.items():
        return _in_a_workers_environment([] if model is None else [model])
    torch.set_num_threads(1)
    shared = str(SHARED / "teacher")
    with tempfile.TemporaryDirectory() as scratch:
        if model is not None:
            return _measure(Path(scratch, "given"), model, "", BASE_SIZE)
        directory = _bert_base(Path(scratch, "model"))
        rows = _measure(Path(scratch, "base"), directory, "", BASE_SIZE)
        if Path(shared).is_dir():
            rows += _measure(Path(scratch, "shared"), shared, "_shared_teacher", SHARED_SIZE)
        return rows


def _in_a_workers_environment(arguments: list[str]) -> list[Row]:
    """Calls ``run`` in a new process with a worker's variables, which glibc reads only when a process
    starts."""
    command, variables = [sys.executable, __file__, *arguments], os.environ | WORKER_VARIABLES
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _bert_base(directory: Path) -> str:
    """Saves a BERT-base with random weights, in whose tokenizer every word w0, w1, ... is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(30_522 - len(names)))])}
    special = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True)
    )
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig()).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)
    return str(directory)


@dataclass(frozen=True)
class Size:
    """Tasks per repeat, batches per task, repeats, and repeats of hidden states and encoder."""

    tasks: int
    batches: int
    repeats: int
    pair_repeats: int

    @property
    def samples(self) -> int:
        return self.batches * BATCH


BASE_SIZE = Size(tasks=2, batches=4, repeats=3, pair_repeats=5)
SHARED_SIZE = replace(BASE_SIZE, repeats=5, pair_repeats=9)
if computes_bfloat16():  # a batch takes a small model little time, so a repeat has more of them
    SHARED_SIZE = replace(SHARED_SIZE, tasks=4, batches=16)


@dataclass(frozen=True)
class Material:
    """Documents for one teacher; ``lengths`` says where their lengths come from."""

    documents: list[str]
    lengths: str


def material(tokenizer: Any) -> Material:
    """Returns real paragraphs for a teacher with an English vocabulary, else random words of equal
    lengths."""
    paragraphs = list(_paragraphs())
    real = tokenizer.convert_tokens_to_ids("the") != tokenizer.unk_token_id
    if paragraphs and real:
        return Material(paragraphs, "paragraphs of novels")
    rng = np.random.default_rng(0)
    if paragraphs:
        lengths, counts = "as long as paragraphs of novels", [len(_words(text)) for text in paragraphs]
    else:
        lengths = "log-normal lengths, median 40 tokens, sigma 0.9"
        counts = [max(1, int(count)) for count in rng.lognormal(np.log(40), 0.9, SAMPLED)]
    words = [f"w{i}" for i in range(1_000, 30_000)]
    return Material([" ".join(rng.choice(words, count)) for count in counts], lengths)


def _paragraphs() -> Iterator[str]:
    """Yields about SAMPLED paragraphs at equal distances, so that all books contribute."""
    files = sorted((SHARED / "data" / "corpus" / "train").glob("*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    yield from lines[:: max(1, len(lines) // SAMPLED)]


def _words(text: str) -> list[str]:
    """Returns words and punctuation marks, about as many as WordPiece makes tokens."""
    return re.findall(r"\w+|[^\w\s]", text)


class TwoThreads(LocalPool):
    """A worker in this process that gets items from two threads, as from the real pool."""

    def run(self, items: Iterable[Item], done: Any, say: Any, quarantine: Any = None) -> list[Item]:
        items = list(items)
        with ThreadPoolExecutor(max_workers=2) as threads:  # the default of teacher.tasks_in_flight
            for item, result in zip(items, threads.map(self._do, items), strict=True):
                done(item, {**result, "place": "this process"})
        return []

    def _do(self, item: Item) -> Any:
        return getattr(self.worker, item.method)(*item.arguments)


def _measure(scratch: Path, directory: str, suffix: str, size: Size) -> list[Row]:
    from transformers import AutoModelForMaskedLM

    scratch.mkdir()
    tokenizer = load_tokenizer(directory)
    texts = material(tokenizer)
    recipes = {
        name: _recipe(scratch, directory, texts, name, k, size)
        for name, k in (("full", TOP_K), ("hidden", 0))
    }
    stores = {name: make(recipe) for name, recipe in recipes.items()}
    pools = {
        name: TwoThreads(teacher_crew(find_source(recipe)[1], stores[name].root))
        for name, recipe in recipes.items()
    }
    batches = _batches(stores["full"], size)
    encoder = pools["hidden"].worker._inference.teacher.lower
    bare = AutoModelForMaskedLM.from_pretrained(
        directory, dtype=getattr(torch, DTYPE), attn_implementation="sdpa"
    ).eval()
    plain = AutoModelForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    padded, real = _padded(tokenizer, texts.documents, SCRIPT_BATCHES)

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            bare(input_ids=batch).logits  # noqa: B018

    @torch.inference_mode()
    def encode() -> None:
        for batch in batches:
            encoder(batch)

    @torch.inference_mode()
    def script() -> None:
        kept = []
        for inputs in padded:
            out = plain(**inputs, output_hidden_states=True)
            kept.append((*out.logits.topk(TOP_K), out.hidden_states[-1]))
        torch.save(kept, scratch / "kept.pt")

    sides: dict[str, Callable[[], object]] = {
        "capture": lambda: _infer(pools["full"], stores["full"], size.tasks),
        "forward": forward,
        "script": script,
    }
    pair: dict[str, Callable[[], object]] = {
        "hidden_only": lambda: _infer(pools["hidden"], stores["hidden"], size.tasks),
        "encoder": encode,
    }
    seconds = interleave(sides, size.repeats, f"teacher{suffix}")
    seconds |= interleave(pair, size.pair_repeats, f"teacher{suffix}")
    tokens = dict.fromkeys(seconds, size.tasks * size.samples * L) | {"script": real}
    rate = {name: tokens[name] / seconds[name] for name in seconds}
    rates = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items())
    model = f"{plain.config.num_hidden_layers} x {plain.config.hidden_size} teacher"
    where = f"{model}, {size.tasks} tasks of {size.samples} x {L}, batches of {BATCH}, {DTYPE}, 1 thread, "
    where += f"medians of {size.repeats} and {size.pair_repeats} interleaved, tokens/s: {rates}"
    documents = f"; the script: float32, {texts.lengths}, padded by 16, real tokens"
    return [
        row(f"teacher.{name}{suffix}", rate[ours] / rate[theirs], "ratio", goal, where + more)
        for name, ours, theirs, goal, more in (
            ("capture_over_bare_forward", "capture", "forward", ">= 0.9", ""),
            ("hidden_only_over_encoder", "hidden_only", "encoder", ">= 0.95", ""),
            ("over_plain_script", "capture", "script", ">= 4", documents),
        )
    ]


def _recipe(scratch: Path, directory: str, texts: Material, name: str, top_k: int, size: Size) -> Recipe:
    """Writes a recipe, and text that fills the tasks of one repeat."""
    tokenizer, lines, tokens = load_tokenizer(directory), [], 0
    for document in texts.documents:
        lines.append(document)
        tokens += len(tokenizer(document, add_special_tokens=False).input_ids)
        if tokens >= size.tasks * size.samples * L:
            break
    (scratch / "text.txt").write_text("\n".join(lines) + "\n")
    sections = {
        "name": name,
        "output": str(scratch / "runs"),
        "corpus": {"path": str(scratch / "text.txt")},
        "sequences": {"length": L},
        "teacher": {"model": directory, "batch_size": BATCH, "dtype": DTYPE},
        "store": {"top_k": top_k, "task_sequences": size.samples},
    }
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return load_recipe(str(path))


def _infer(pool: LocalPool, store: Store, tasks: int) -> None:
    """Computes and publishes the first ``tasks`` tasks of the store again."""
    plan = store.splits["train"].plan
    items = [Item(str(n), "infer", ("train", plan.task(n))) for n in range(tasks)]
    pool.run(items, lambda item, answer: None, None)


def _batches(store: Store, size: Size) -> list[torch.Tensor]:
    """Returns the masked input ids of the tasks in batches [B, L]."""
    plan, reader = store.splits["train"].plan, BlockReader(store, "train", ["token_count", "input_ids"])
    blocks = [block for n in range(size.tasks) for block in plan.blocks(plan.task(n))]
    columns = [reader.rows(0, block) for block in blocks]
    assert all((c["token_count"] == L).all() for c in columns), "a task has short sequences"
    ids = np.concatenate([c["input_ids"] for c in columns]).astype(np.int64)
    assert len(ids) == size.tasks * size.samples
    return list(torch.from_numpy(ids).split(BATCH))


def _padded(tokenizer: Any, documents: list[str], count: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Returns ``count`` padded batches of random documents, and the number of their non-pad tokens."""
    chosen = np.random.default_rng(1).permutation(len(documents))[: count * BATCH]
    batches = [
        tokenizer(
            [documents[i] for i in part], padding=True, truncation=True, max_length=L, return_tensors="pt"
        )
        for part in np.split(chosen, count)
    ]
    kept = [{name: inputs[name] for name in ("input_ids", "attention_mask")} for inputs in batches]
    return kept, sum(int(inputs["attention_mask"].sum()) for inputs in kept)


if __name__ == "__main__":
    for measured in run(*sys.argv[1:2]):
        print(json.dumps(measured))
