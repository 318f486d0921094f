"""Official files that are damaged, and tasks that do not exist: one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.sources.catalogue import find_task, find_tasks
from evaluation.sources.loading import load
from infra.errors import UserError
from tests.evaluation.test_official import MNLI_DEV, PARSES, STS, STS_ROW, write

SST, RTE = "sentence\tlabel\n", "index\tsentence1\tsentence2\tlabel\n"


SQUAD_START = (
    '{"data": [{"paragraphs": [{"context": "It is red.", "qas": [{"id": "1", "question": "What?", "answers": '
)


# task, part, file (None: nothing is written), content, what the one line must say
BAD = [
    ("SST-2", "train", None, "", "has no SST-2/train.tsv"),
    ("SST-2", "dev", "SST-2/train.tsv", SST + "fine\t1\n", "has no SST-2/dev.tsv"),
    ("SST-2", "train", "SST-2/train.tsv", "", "is empty"),
    ("SST-2", "train", "SST-2/train.tsv", SST, "has no rows"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\nbad\n", "line 3: 1 columns instead of 2"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\nso\tso\t1\n", "line 3: 3 columns instead of 2"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\n\nbad\t0\n", "line 3: 1 columns instead of 2"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        SST + "fine\t2\n",
        "line 2: label '2' is out of range; it must be 0 or 1",
    ),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\tgood\n", "line 2: label 'good' is out of range"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        "text\tlabel\nfine\t1\n",
        "no column 'sentence'; known are text, label",
    ),
    ("SST-2", "train", "SST-2/train.tsv", b"sentence\tlabel\nfine\t1\nf\xff\t1\n", "line 3: not valid UTF-8"),
    ("SST-2", "train", "SST-2/train.tsv", "sentence,label\nfine,1\n", "no column 'sentence'"),
    ("CoLA", "train", "CoLA/train.tsv", "gj04\t1\tHe left.\n", "line 1: 3 columns instead of 4"),
    (
        "CoLA",
        "train",
        "CoLA/train.tsv",
        "gj04\t1\t\tHe.\nsource\tlabel\tm\ts\n",
        "line 2: label 'label' is out of range",
    ),
    ("RTE", "dev", "RTE/dev.tsv", RTE + "0\tA.\tB.\tneutral\n", "it must be entailment or not_entailment"),
    ("MNLI", "dev_matched", "MNLI/dev.tsv", "x", "has no MNLI/dev_matched.tsv"),
    (
        "STS-B",
        "dev",
        "STS-B/dev.tsv",
        f"{STS}\n{STS_ROW}5.1\n",
        "line 2: score 5.1 is out of range; it must be 0 to 5",
    ),
    ("STS-B", "dev", "STS-B/dev.tsv", f"{STS}\n{STS_ROW}nan\n", "line 2: score nan is out of range"),
    ("STS-B", "dev", "STS-B/dev.tsv", f"{STS}\n{STS_ROW}high\n", "line 2: score 'high' is not a number"),
    (
        "QQP",
        "train",
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\n",
        "has no rows",
    ),
    ("IMDb", "train", "aclImdb/train/pos/0_9.txt", "Great.", "neg has no .txt files"),
    ("IMDb", "train", None, "", "has no aclImdb/train"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": [', "is not JSON"),
    ("SQuAD", "dev", "dev-v1.1.json", '[{"question": "What?"}]', "no list 'data'"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": []}', "has no rows"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": [{"title": "x"}]}', "data[0]: no field 'paragraphs'"),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + "[]}]}]}]}", "qas[0]: no answers"),
    (
        "SQuAD",
        "dev",
        "dev-v1.1.json",
        SQUAD_START + '[{"text": "blue", "answer_start": 6}]}]}]}]}',
        "dev-v1.1.json: no answer occurs in its context (first: question 1)",
    ),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + '[{"text": " ", "answer_start": 2}]}]}]}]}', "no answer"),
    (
        "CoLA",
        "train",
        "CoLA/train.tsv",
        "gj04\t1\t\tHe left.\ngj04\t1\t*\tLeft he.\n",
        "CoLA/train.tsv: line 2: label 1 contradicts the mark '*' of the same row",
    ),
    (
        "MNLI",
        "dev_matched",
        "MNLI/dev_matched.tsv",
        f"{MNLI_DEV}\n0\t1\t1c\tfiction\t{PARSES}\tHe left.\tHe stayed."
        + "\tneutral" * 2
        + "\tcontradiction" * 3
        + "\tneutral\n",
        "line 2: label 'neutral' contradicts neutral, neutral, contradiction, contradiction, contradiction",
    ),
    (
        "IMDb",
        "train",
        "aclImdb/train/neg/7_9.txt",
        "Great.",
        "neg/7_9.txt: the rating 9 in its name contradicts its folder neg",
    ),
    ("SST-2", "train", "SST-2/train.tsv", SST + " \t1\n\t0\n", "every row has an empty text"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        (SST + "fine\t1\n").encode("utf-16-le"),
        "is UTF-16, not UTF-8 text",
    ),
    ("SST-2", "train", "SST-2/train.tsv", b"PAR1\x15" + bytes(99), "is Parquet, not UTF-8 text"),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + '[{"text": "red"}]}]}]}]}', "no field 'answer_start'"),
]


@pytest.mark.parametrize(("task", "part", "file", "content", "says"), BAD)
def test_bad_file(
    tmp_path: Path, task: str, part: str, file: str | None, content: str | bytes, says: str
) -> None:
    if file is not None:
        write(tmp_path, file, content)
    with pytest.raises(UserError) as caught:
        load(find_task(task), part, str(tmp_path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["SST2"], "did you mean SST-2?"),
        (["STSB"], "did you mean STS-B?"),
        (["zzzz"], "known are CoLA"),
        (["RTE", "rte"], "RTE is named twice"),
    ],
)
def test_bad_task(names: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        find_tasks(names)
