"""A number format that the processor emulates is named once, and never chosen for the user."""

from __future__ import annotations

import pytest

from infra.cpu.processor import computes_bfloat16, warn_if_slow
from infra.demo.__main__ import RECIPE, precision_overrides
from infra.settings.recipe_file import load_recipe


@pytest.mark.parametrize(
    ("capability", "fast"), [("AVX2", False), ("AVX512", True), ("SVE256", True), ("DEFAULT", False)]
)
def test_emulated_bfloat16_is_told(
    capability: str, fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert computes_bfloat16() is fast
    warn_if_slow("teacher.dtype", "float32")
    assert capsys.readouterr().err == ""
    warn_if_slow("teacher.dtype", "bfloat16")
    told = capsys.readouterr().err
    assert told == "" if fast else "teacher.dtype=float32" in told


def test_demo_is_float32_throughout_where_bfloat16_is_slow() -> None:
    assert precision_overrides(has_bfloat16=True) == []
    recipe = load_recipe(str(RECIPE), precision_overrides(has_bfloat16=False))
    assert recipe.teacher is not None
    assert (recipe.teacher.dtype, recipe.train.dtype) == ("float32", "float32")
