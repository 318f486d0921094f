"""What ``plan`` recommends follows from its figures."""

from __future__ import annotations

from pathlib import Path

from infra.settings.recipe_file import load_recipe
from offline_teacher.planning.recommendation import recommend
from offline_teacher.planning.soft_targets import exact_name


def test_advice_follows_the_figures(planned: tuple[Path, dict, str]) -> None:
    _, report, recipe_file = planned
    recipe = load_recipe(recipe_file)
    errors = report["gradient_error"]
    for good, expected in (("int8", "int8 hidden states"), ("float16", "float16 hidden states")):
        made = dict.fromkeys(errors["at_initialisation"], 0.5) | {exact_name(good): 0.01}
        altered = {
            **report,
            "gradient_error": {**errors, "at_initialisation": made, "close_to_teacher": made},
        }
        assert recommend(altered, recipe)[0].startswith(f"Store {expected} ")
    made = dict.fromkeys(errors["at_initialisation"], 0.01)
    altered = {**report, "gradient_error": {**errors, "at_initialisation": made, "close_to_teacher": made}}
    without_cosine = load_recipe(recipe_file, ["train.alpha_cos=0"])
    assert recommend(altered, without_cosine)[0].startswith("Store top-5 alone ")
    assert recommend(altered, recipe)[0].startswith("Store int8 hidden states ")


def test_advice_says_where_the_teachers_dtype_is_too_much(planned: tuple[Path, dict, str]) -> None:
    _, report, recipe_file = planned
    recipe = load_recipe(recipe_file)

    def advice(int8: float, float16: float) -> list[str]:
        made = dict.fromkeys(report["gradient_error"]["at_initialisation"], 0.5)
        made |= {exact_name("int8"): int8, exact_name("float16"): float16}
        errors = {**report["gradient_error"], "at_initialisation": made, "close_to_teacher": made}
        return recommend({**report, "gradient_error": errors}, recipe)

    crossed = advice(int8=0.062, float16=0.041)
    assert crossed[0].startswith("Store float16 hidden states ")
    assert "Its error is 0.041 " in crossed[0]
    assert not [sentence for sentence in crossed if "bfloat16" in sentence]
    whatever = advice(int8=0.064, float16=0.059)
    assert whatever[0].startswith("Store float16 hidden states ")
    assert "though none keeps" in whatever[0]
    (dtype,) = (sentence for sentence in whatever if "bfloat16" in sentence)
    assert "0.059" in dtype
    assert "set teacher.dtype=float32 to reduce this error" in dtype


def test_replayed_layers_are_recommended_where_they_pay(planned: tuple[Path, dict, str]) -> None:
    _, report, file = planned

    def advice(*overrides: str) -> str:
        return " ".join(recommend(report, load_recipe(file, list(overrides))))

    assert "Leave store.replay_layers=0" in advice()
    narrow = advice("student.hidden_size=16", "student.init=random")
    assert "Set store.replay_layers=1: it takes the same bytes" in narrow
    assert "narrow students learn best" in narrow
    relations = advice("store.replay_layers=1", "train.alpha_relation=1")
    assert "store.replay_layers=1 pays here" in relations
    assert "The error of the relations' gradient is then" in relations
