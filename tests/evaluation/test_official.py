"""Official files with each quirk, small enough to be checked by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.sources.catalogue import GLUE, TASKS, find_task, find_tasks
from evaluation.sources.loading import has_part, load, location_of
from evaluation.tasks import official
from evaluation.tasks.task import Split
from infra.errors import UserError
from infra.settings.sections.task_settings import TaskSettings

PARSES = "binary1\tbinary2\tparse1\tparse2"
MNLI_TRAIN = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
    "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)
MNLI_DEV = MNLI_TRAIN.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
STS = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
STS_ROW = "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA dog.\tA cat.\t"


def write(data: Path, file: str, content: str | bytes) -> str:
    path = data / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(data)


# file, content, part, expected texts, expected labels
QUIRKS = [
    (
        "CoLA/train.tsv",
        'gj04\t1\t\tHe "left\ngj04\t0\t*\tLeft he.',
        "train",
        [('He "left',), ("Left he.",)],
        [1, 0],
    ),
    ("CoLA/dev.tsv", "\ufeffgj04\t1\t\tHe left.\r\n", "dev", [("He left.",)], [1]),
    ("CoLA/test.tsv", "index\tsentence\n7\tHe left.\n", "test", [("He left.",)], None),
    (
        "SST-2/train.tsv",
        "sentence\tlabel\nfine film \t1\nbad\t0\n",
        "train",
        [("fine film ",), ("bad",)],
        [1, 0],
    ),
    (
        "MRPC/dev.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\t"Yes, he said.\t"Yes," he said.\n',
        "dev",
        [('"Yes, he said.', '"Yes," he said.')],
        [1],
    ),
    (
        "STS-B/dev.tsv",
        f"{STS}\n{STS_ROW}2.500\n{STS_ROW}0",
        "dev",
        [("A dog.", "A cat."), ("A dog.", "A cat.")],
        [2.5, 0.0],
    ),
    (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tHow?\t0\n4\t5\ttorn\n6\t7\t8\tWho?\tWho is?\t1\n",
        "train",
        [("Why?", "How?"), ("Who?", "Who is?")],
        [0, 1],
    ),
    (
        "MNLI/train.tsv",
        f"{MNLI_TRAIN}\n0\t1\t1e\tfiction\t{PARSES}\tHe left.\tHe is gone.\tentailment\tentailment\n",
        "train",
        [("He left.", "He is gone.")],
        [0],
    ),
    (
        "MNLI/dev_mismatched.tsv",
        f"{MNLI_DEV}\n0\t1\t1n\tverbatim\t{PARSES}\tHe left.\tShe sang.\tn\tn\tn\tn\tn\tneutral\n",
        "dev_mismatched",
        [("He left.", "She sang.")],
        [1],
    ),
    (
        "MNLI/dev_matched.tsv",
        MNLI_DEV.replace("sentence1\t", "Sentence1\t")
        + f"\n0\t1\t1c\tfiction\t{PARSES}\tHe left.\tHe stayed.\tc\tc\tc\tc\tc\tcontradiction\n",
        "dev_matched",
        [("He left.", "He stayed.")],
        [2],
    ),
    (
        "QNLI/dev.tsv",
        "index\tquestion\tsentence\tlabel\n"
        '0\tWho "won?\tIt was "Ann.\tnot_entailment\n1\tWho?\tAnn.\tentailment\n',
        "dev",
        [('Who "won?', 'It was "Ann.'), ("Who?", "Ann.")],
        [1, 0],
    ),
    (
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tHe left.\tHe is gone.\tentailment",
        "train",
        [("He left.", "He is gone.")],
        [0],
    ),
    ("WNLI/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", "dev", [("A.", "B.")], [1]),
    (
        "SST-2/dev.tsv",
        "sentence\tlabel\nnext line\u2028and\x85one \x0b\t1\n",
        "dev",
        [("next line\u2028and\x85one \x0b",)],
        [1],
    ),
]


@pytest.mark.parametrize(
    ("file", "content", "part", "texts", "labels"), QUIRKS, ids=[quirk[0] for quirk in QUIRKS]
)
def test_quirk(
    tmp_path: Path,
    file: str,
    content: str,
    part: str,
    texts: list[tuple[str, ...]],
    labels: list[float] | None,
) -> None:
    split = load(find_task(file.partition("/")[0]), part, write(tmp_path, file, content))
    assert split.texts == texts
    assert (None if split.labels is None else split.labels.tolist()) == labels


def test_a_test_part_keeps_the_servers_index(tmp_path: Path) -> None:
    data = write(tmp_path, "CoLA/test.tsv", "index\tsentence\n7\tHe left.\n9\tHe ran.\n")
    assert load(find_task("CoLA"), "test", data).index == ["7", "9"]


TEST_HEADERS = {
    "CoLA/test": "index sentence", "SST-2/test": "index sentence", "QQP/test": "id question1 question2",
    "MRPC/test": "index #1_ID #2_ID #1_String #2_String", "QNLI/test": "index question sentence",
    "STS-B/test": "index genre filename year old_index source1 source2 sentence1 sentence2",
    "MNLI/test_matched": "index promptID pairID genre sentence1_parse sentence2_parse sentence1 sentence2",
    "MNLI/test_mismatched": "index promptID pairID genre sentence1_parse sentence2_parse sentence1 sentence2",
    "diagnostic/diagnostic": "index sentence1 sentence2", "RTE/test": "index sentence1 sentence2",
    "WNLI/test": "index sentence1 sentence2",
}  # fmt: skip
"""File of a test set -> its header, with spaces for tabs and underscores for the spaces in MRPC's names."""


@pytest.mark.parametrize("file", list(TEST_HEADERS))
def test_texts_of_every_test_set(file: str, tmp_path: Path) -> None:
    """Each cell of the row names its column."""
    names = [name.replace("_", " ") if "#" in name else name for name in TEST_HEADERS[file].split()]
    task, _, part = file.replace("diagnostic/", "MNLI/test_").partition("/")
    data = write(tmp_path, f"{file}.tsv", "\t".join(names) + "\n" + "\t".join(names).upper() + "\n")
    split = load(TASKS[task], part, data)
    texts = [
        name for name in names if "String" in name or name in ("question", "sentence") or name[-1] in "12"
    ]
    texts = [name for name in texts if not name.startswith("source")]
    assert split.texts == [tuple(name.upper() for name in texts)]
    assert (split.ids, split.labels) == ([names[0].upper()], None)
    assert has_part(TASKS[task], part, data)
    assert location_of(TASKS[task], part, data) == f"{data}/{file}.tsv"


@pytest.mark.parametrize(
    ("task", "file", "place"),
    [
        ("SST-2", "dev.tsv", "SST-2/dev.tsv"), ("SST-2", "dev.tsv", "glue/SST-2/dev.tsv"),
        ("SST-2", "dev.tsv", "GLUE/SST-2/dev.tsv"), ("IMDb", "aclImdb/test", "aclImdb/test/pos/0_9.txt"),
        ("IMDb", "aclImdb/test", "imdb/aclImdb/test/pos/0_9.txt"), ("SQuAD", "dev.json", "dev.json"),
        ("SQuAD", "dev.json", "squad/dev.json"), ("SQuAD", "dev.json", "SQuAD/dev.json"),
    ],
)  # fmt: skip
def test_places_of_official_files(task: str, file: str, place: str, tmp_path: Path) -> None:
    data = write(tmp_path, place, "x")
    assert official.find(task, file, data) == f"{data}/{place.partition(file)[0]}{file}"


@pytest.mark.parametrize("place", ["dev.tsv", "other/SST-2/dev.tsv", "SST-2/train.tsv", "glue/dev.tsv"])
def test_a_table_counts_only_in_the_folder_of_its_task(place: str, tmp_path: Path) -> None:
    data = write(tmp_path, place, "x")
    assert official.find("SST-2", "dev.tsv", data) is None
    with pytest.raises(UserError) as caught:
        official.require_file("SST-2", "dev.tsv", data)
    assert f"SST-2: {data} has no SST-2/dev.tsv; name the directory" in str(caught.value)


def test_the_hub_is_named_with_its_revision() -> None:
    (rte,) = find_tasks([TaskSettings(name="RTE", revision="v1")])
    assert location_of(rte, "dev", None) == "hf://datasets/nyu-mll/glue@v1"
    assert location_of(TASKS["RTE"], "dev", None) == "hf://datasets/nyu-mll/glue"
    assert has_part(TASKS["RTE"], "test", None)
    assert not has_part(TASKS["RTE"], "test", "/nowhere")


@pytest.mark.parametrize("rating", range(11))
@pytest.mark.parametrize("folder", ["neg", "pos"])
def test_a_review_of_four_stars_is_negative_and_of_seven_positive(
    folder: str, rating: int, tmp_path: Path
) -> None:
    path = f"{tmp_path}/{folder}/12_{rating}.txt"
    if rating in (range(7, 11) if folder == "neg" else range(1, 5)):
        with pytest.raises(
            UserError, match=f"the rating {rating} in its name contradicts its folder {folder}"
        ):
            official._require_rating(path, folder)
    else:
        official._require_rating(path, folder)


@pytest.mark.parametrize(
    ("votes", "good"), [("nnncc", True), ("nnccc", False), ("nncc-", True), ("ncccc", False), ("-----", True)]
)
def test_a_label_has_most_of_the_votes(votes: str, good: bool, tmp_path: Path) -> None:
    """n: neutral, which is the label; c: contradiction; -: no label."""
    names = {"n": "neutral", "c": "contradiction", "-": "-"}
    row = "\t".join(names[vote] for vote in votes)
    line = f"0\t1\t1n\tverbatim\t{PARSES}\tHe left.\tShe sang.\t{row}\tneutral"
    data = write(tmp_path, "MNLI/dev_matched.tsv", f"{MNLI_DEV}\n{line}\n")
    if good:
        assert load(TASKS["MNLI"], "dev_matched", data).labels.tolist() == [1]
    else:
        with pytest.raises(UserError, match="line 2: label 'neutral' contradicts"):
            load(TASKS["MNLI"], "dev_matched", data)


def test_torn_rows_and_row_counts_are_reported(tmp_path: Path) -> None:
    data = write(tmp_path, *QUIRKS[6][:2])
    assert load(find_task("QQP"), "train", data).notes == [
        "QQP train: 1 rows with too few columns left out",
        "QQP train: 2 rows, the official set has 363,846",
    ]


def test_imdb_reviews_in_name_order(tmp_path: Path) -> None:
    for file, text in {
        "neg/1_2.txt": "Dull.",
        "pos/0_9.txt": "Great.<br /><br />Fun.",
        "pos/.keep": "",
    }.items():
        write(tmp_path, f"imdb/aclImdb/train/{file}", text)
    split = load(find_task("imdb"), "train", str(tmp_path))
    assert split.texts == [("Dull.",), ("Great.  Fun.",)]
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1]


def test_collections_of_benchmarks_are_searched(tmp_path: Path) -> None:
    write(tmp_path, "glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n")
    assert len(load(find_task("SST-2"), "dev", str(tmp_path))) == 1


def test_names_whatever_the_case() -> None:
    assert [task.name for task in find_tasks(["sst-2", "cola", "SQUAD"])] == ["SST-2", "CoLA", "SQuAD"]


def test_digest_depends_on_texts_and_labels() -> None:
    splits = [
        Split([("a", "b")], np.asarray([1])),
        Split([("ab", "")], np.asarray([1])),
        Split([("a", "b")], np.asarray([0])),
        Split([("a",), ("b",)], np.asarray([1, 1])),
    ]
    assert len({split.digest() for split in splits}) == len(splits)


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    data = write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n \t0\n\t1\n")
    notes = load(find_task("SST-2"), "dev", data).notes
    assert notes[0] == "SST-2 dev: rows with an empty text: 2 (first: row 2)"


@pytest.mark.parametrize("name", ["CoLA", "SST-2", "MRPC", "STS-B", "WNLI"])
def test_shared_data_have_the_official_counts(shared_dir: Path, name: str) -> None:
    task = TASKS[name]
    for part in ("train", "dev"):
        assert load(task, part, str(shared_dir / "data")).notes == []


@pytest.mark.parametrize(
    ("name", "part", "rows"),
    [("MNLI", "train", 48), ("MNLI", "dev_matched", 48), ("QQP", "train", 32), ("QQP", "dev", 32),
     ("IMDb", "train", 2000), ("IMDb", "dev", 1000), ("SQuAD", "train", 839), ("SQuAD", "dev", 351),
     ("CoLA", "test", 1063), ("MRPC", "test", 1725), ("WNLI", "test", 146)],
)  # fmt: skip
def test_shared_samples_are_read(shared_dir: Path, name: str, part: str, rows: int) -> None:
    assert len(load(TASKS[name], part, str(shared_dir / "data"))) == rows


def test_only_the_benchmarks_own_tasks_make_its_macro_score() -> None:
    assert sorted(GLUE) == sorted(["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"])
    assert all(TASKS[name].test_parts for name in GLUE)
