"""How long a sequence may be for an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import UserError

FROM_THE_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Model types that count positions from ``pad_token_id + 1``."""
MPNET_PADDING = 1
"""transformers' MPNet counts from the position after this one, whatever ``pad_token_id`` is."""


def usable_length(config: Mapping[str, Any] | Any) -> int:
    """The longest sequence that has positions, of a configuration or the mapping of its config.json.

    Raises UserError where a model that counts positions from its padding token has none.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    positions: int = values["max_position_embeddings"]
    if values["model_type"] == "mpnet":
        return positions - MPNET_PADDING - 1
    if values["model_type"] not in FROM_THE_PADDING:
        return positions
    if values.get("pad_token_id") is None:
        raise UserError(f"the configuration of this {values['model_type']} model has no pad_token_id")
    return positions - values["pad_token_id"] - 1
