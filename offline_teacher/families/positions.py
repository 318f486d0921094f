"""The number of tokens that a model's positions allow, for the pass, students, evaluation and export."""

from __future__ import annotations

import sys
from typing import Any

from infra.errors import UserError

FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose first token has position ``pad_token_id + 1``, as fairseq counts."""
MPNET_PADDING = 1
"""What transformers' MPNet takes for ``pad_token_id`` here, whatever the configuration says."""


def usable_length(config: Any) -> int:
    """The most tokens, special ones included, that a row may have, by a model's configuration.

    That is ``max_position_embeddings``, less the rows below the first position where positions are counted
    from the padding's: a RoBERTa of 514 takes 512 tokens. ``sys.maxsize`` where the configuration sets no
    limit (XLNet, T5). UserError if positions are counted from the padding's and it has no ``pad_token_id``.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:
        return sys.maxsize
    if config.model_type not in FROM_PADDING:
        return int(positions)
    padding = MPNET_PADDING if config.model_type == "mpnet" else config.pad_token_id
    if padding is None:
        name = getattr(config, "name_or_path", "") or f"the {config.model_type}"
        raise UserError(f"the configuration of {name} has no pad_token_id; its positions are counted from it")
    return int(positions - (padding + 1))
