"""BERT: post-norm, learned positions, token types. Its students are DistilBERT, which has fewer parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from offline_teacher.families.distilbert import DISTILBERT, LAYER_NORM_EPS
from offline_teacher.families.family import Family, HeadPaths

if TYPE_CHECKING:
    from torch import Tensor

LAYER_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""Modules of a BERT layer and their names in a DistilBERT layer."""

OTHER_NAMES = {
    "bert.embeddings.word_embeddings": "distilbert.embeddings.word_embeddings",
    "bert.embeddings.LayerNorm": "distilbert.embeddings.LayerNorm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions": "vocab_projector",  # BERT keeps the decoder's bias here as well
    "cls.predictions.decoder": "vocab_projector",
}
"""Modules outside the layers. DistilBERT lacks all others."""


class Bert(Family):
    """Students are DistilBERT, except of a teacher whose layer norms have another epsilon: they stay BERT."""

    def student_family(self, config: Any) -> Family:
        return DISTILBERT if config.layer_norm_eps == LAYER_NORM_EPS else self

    def student_fields(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        if self.student_family(config) is self:
            return super().student_fields(config, layers)
        same = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")
        fields = {name: getattr(config, name) for name in (*same, "tie_word_embeddings")}
        return {**fields, "activation": config.hidden_act}

    def student_tensors(
        self, config: Any, weights: Mapping[str, Tensor], layers: Sequence[int]
    ) -> dict[str, Tensor]:
        chosen = super().student_tensors(config, weights, layers)
        return chosen if self.student_family(config) is self else _as_distilbert(chosen)


def _as_distilbert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's tensors under DistilBERT's names.

    BERT adds the embedding of token type 0 to every token. DistilBERT has no token types, so it is added to
    the position embeddings, of which every token also gets exactly one: the sum is unchanged. The word
    embeddings are not used for this, because the decoder may be tied to them.
    """
    position = weights["bert.embeddings.position_embeddings.weight"]  # [positions, D]
    token_type = weights["bert.embeddings.token_type_embeddings.weight"][0]  # [D]
    own = {"distilbert.embeddings.position_embeddings.weight": position + token_type}
    for name, tensor in sorted(weights.items()):  # cls.predictions.bias before that of its decoder
        module, _, kind = name.rpartition(".")
        if module.startswith("bert.encoder.layer."):
            number, _, part = module.removeprefix("bert.encoder.layer.").partition(".")
            own[f"distilbert.transformer.layer.{number}.{LAYER_NAMES[part]}.{kind}"] = tensor
        elif module in OTHER_NAMES:
            own[f"{OTHER_NAMES[module]}.{kind}"] = tensor
    return own


BERT = Bert(
    model_type="bert",
    classes="Bert",
    prefix="bert",
    layers="encoder.layer",
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    head=HeadPaths(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        activation="hidden_act",
    ),
    has_pooler=True,
)
