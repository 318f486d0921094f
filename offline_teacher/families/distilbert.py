"""DistilBERT: BERT without token types and pooler, under other names."""

from __future__ import annotations

from offline_teacher.families.family import Family, HeadPaths

LAYER_NORM_EPS = 1e-12
"""transformers' DistilBERT has no setting for it."""

DISTILBERT = Family(
    model_type="distilbert",
    classes="DistilBert",
    prefix="distilbert",
    layers="transformer.layer",
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    head=HeadPaths("vocab_transform", "vocab_layer_norm", "vocab_projector", activation="activation"),
    dropouts=("dropout", "attention_dropout"),
    renamed={
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
    },
)
