"""Teacher families: where a model's layers, head and positions are, and how its students are built.

Each family has one file, which describes as data how its models differ from others. What is done with a model
of any family is in ``offline_teacher.models``. Importing this package imports neither torch nor transformers.

A new family is one file here, an entry in ``FAMILIES`` and one in the tests' ``tiny_models.py``. ``mpnet.py``
is an example, which overrides one method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import UserError
from offline_teacher.families.bert import BERT
from offline_teacher.families.distilbert import DISTILBERT
from offline_teacher.families.family import Family
from offline_teacher.families.modernbert import MODERNBERT
from offline_teacher.families.mpnet import MPNET
from offline_teacher.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, MODERNBERT, MPNET)
}
"""By ``model_type``, as in config.json."""


def family_of(config: Mapping[str, Any] | Any) -> Family:
    """The family of a configuration. Raises UserError, with the names of all families, if there is none."""
    name = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{name!r} is not a supported family of models; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
