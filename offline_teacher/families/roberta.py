"""RoBERTa and the models that are laid out as it is: XLM-RoBERTa and CamemBERT."""

from __future__ import annotations

from offline_teacher.families.family import Family, HeadPaths


def _laid_out_as_roberta(model_type: str, classes: str) -> Family:
    return Family(
        model_type=model_type,
        classes=classes,
        prefix="roberta",
        layers="encoder.layer",
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        head=HeadPaths("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
        has_pooler=True,
    )


ROBERTA = _laid_out_as_roberta("roberta", "Roberta")
XLM_ROBERTA = _laid_out_as_roberta("xlm-roberta", "XLMRoberta")
CAMEMBERT = _laid_out_as_roberta("camembert", "Camembert")
