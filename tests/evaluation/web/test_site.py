"""The folder of the page: who writes it, and what is refused. No browser is needed."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.candidates.models import copy_files
from evaluation.main import main
from evaluation.web import page_bundle
from evaluation.web.golden import SENTENCES
from evaluation.web.site import OFFLINE, RUNTIMES, SITE, SiteModel, add_to_site
from infra.errors import UserError
from tests.evaluation.families import family_recipe, save_store
from tests.evaluation.test_export import fine_tuned


def test_a_recipe_brings_all_its_fine_tuned_models(
    encoder_of_pieces: str, page: Path, toy_data: str, tmp_path: Path
) -> None:
    recipe, scores = tmp_path / "recipe.yaml", tmp_path / "runs" / "small" / "evaluation" / "scores"
    recipe.write_text(
        json.dumps(
            {
                "name": "small",
                "output": str(tmp_path / "runs"),
                "store": {"path": str(tmp_path / "store")},
                "evaluation": {"tasks": ["SST-2"], "data": toy_data, "max_length": 40},
            }
        )
    )
    command = [
        "export",
        "--web",
        "--recipe",
        str(recipe),
        "--output",
        str(tmp_path / "out"),
        "--compared",
        "2",
    ]
    with pytest.raises(UserError, match="no fine-tuned models for the page yet"):
        main(command)
    for role in ("student", "teacher"):
        fine_tuned(encoder_of_pieces, "SST-2", scores / role / "SST-2" / "model")
    assert main(command) == 0
    (task,) = json.loads((tmp_path / "out" / SITE).read_text())["tasks"]
    assert [(model["role"], model["length"], model["texts"]) for model in task["models"]] == [
        ("student", 40, 1),
        ("teacher", 40, 1),
    ]
    golden = (tmp_path / "out" / task["models"][0]["golden"]["path"]).read_bytes()
    assert len(json.loads(gzip.decompress(golden))["examples"]) == len(SENTENCES) + 2


def test_an_evaluation_brings_its_page(
    encoder_of_pieces: str, page: Path, toy_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """First without Node, then with it."""
    recipe = family_recipe(
        tmp_path, save_store(tmp_path / "store", encoder_of_pieces), data=toy_data, references=(),
        max_steps=1, export_web=True,
    )  # fmt: skip
    path, directory = tmp_path / "recipe.yaml", Path(recipe.evaluation_dir)
    path.write_text(recipe.to_yaml())
    for name in ("half", "tiny"):
        shutil.copytree(encoder_of_pieces, Path(recipe.run(name).directory) / "model")
    with monkeypatch.context() as without:
        without.setattr(page_bundle, "user_cache", lambda: tmp_path)
        without.setattr(page_bundle, "shutil", SimpleNamespace(which=lambda name: None))
        assert main(["--recipe", str(path)]) == 0
    assert "note: no page for browsers: export --web: Node is not installed" in capsys.readouterr().out
    assert "web/index.html" not in (directory / "report.html").read_text()
    (directory / "report.json").unlink()
    assert main(["--recipe", str(path)]) == 0
    assert 'href="web/index.html"' in (directory / "report.html").read_text()
    (task,) = json.loads((directory / "web" / SITE).read_text())["tasks"]
    assert [model["role"] for model in task["models"]] == ["half", "tiny", "teacher"]


def test_node_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, encoder_of_pieces: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(page_bundle, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(page_bundle.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="Node is not installed"):
        main(["export", "--web", "--model", encoder_of_pieces, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / SITE).exists()


@pytest.mark.services
def test_a_model_may_lie_in_an_object_store(encoder_of_pieces: str, tmp_path: Path, bucket: str) -> None:
    """The page itself is not needed for this."""
    page = tmp_path / "page"
    page.mkdir()
    for name in (*RUNTIMES.values(), OFFLINE, "index.html"):
        (page / name).write_bytes(name.encode())
    local = fine_tuned(encoder_of_pieces, "SST-2", tmp_path / "model")
    copy_files(local, f"{bucket}/model")
    sites = [
        add_to_site(str(tmp_path / name), page, [SiteModel(model, "student", "SST-2", 40)])
        for name, model in (("here", local), ("there", f"{bucket}/model"))
    ]
    assert sites[0] == sites[1]


def test_a_tokenizer_that_the_page_lacks_is_refused(page: Path, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BertNormalizer"):
        main(["export", "--web", "--model", encoder, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / SITE).exists()


def test_the_lock_file_names_packages_by_their_content_and_no_registry() -> None:
    packages = json.loads((page_bundle.SOURCES / "package-lock.json").read_text())["packages"]
    assert len(packages) > 10
    for name, package in packages.items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-"), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "x", "--labels", "a,b"], "--labels: needs --web"),
        (["--model", "x", "--recipe", "y"], "either --model DIR or"),
        (["--web", "--model", "x", "--vocabulary", "9"], "--vocabulary: needs --task and --data"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(["export", *arguments, "--output", "out"])
