"""Where two nested mappings differ, in words."""

from __future__ import annotations

from typing import Any

from infra.trees import difference


def test_differences_are_named_leaf_by_leaf() -> None:
    old: dict[str, Any] = {"masking": {"seed": 0, "replicas": 1}, "teacher": "a", "gone": 1}
    new: dict[str, Any] = {"masking": {"seed": 1, "replicas": 1}, "teacher": "a", "store": {"top_k": 8}}
    assert difference(old, new) == ["gone: 1 -> absent", "masking.seed: 0 -> 1", "store.top_k: absent -> 8"]
    assert difference(old, old) == []
    assert difference({"t": (1.0, 2.0)}, {"t": [1.0, 2.0]}) == []


def test_settings_of_the_recipe_have_the_names_a_user_gives_them() -> None:
    old: dict[str, Any] = {"recipe": {"teacher": {"dtype": "float32"}}, "teacher": "xxh3-128:aa"}
    new: dict[str, Any] = {"recipe": {"teacher": {"dtype": "bfloat16"}}, "teacher": "xxh3-128:bb"}
    assert difference(old, new) == [
        "teacher: 'xxh3-128:aa' -> 'xxh3-128:bb'",
        "teacher.dtype: 'float32' -> 'bfloat16'",
    ]


def test_a_mapping_instead_of_a_value_is_a_difference() -> None:
    assert difference({"corpus": {"path": ()}}, {"corpus": {}}) == [
        "corpus: absent -> {}",
        "corpus.path: [] -> absent",
    ]
