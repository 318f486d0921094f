"""The code that MLflow runs to serve a student: it computes one embedding per text.

MLflow copies this file into the registered model, so it imports no other module of this project.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from transformers import AutoModel, AutoTokenizer

BATCH = 32
LONGEST = 512
"""Largest number of tokens of a text; fewer if the model has fewer positions."""


class StudentModel(PythonModel):
    """Embeds a text as the mean of the encoder's last hidden states over the text's tokens."""

    def load_context(self, context: Any) -> None:
        directory = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(
            directory, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        ).eval()
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # RoBERTa's positions begin after this index
        positions = self.model.config.max_position_embeddings - (0 if padding is None else padding + 1)
        self.length = min(LONGEST, positions)

    @torch.inference_mode()
    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Returns a table with a column ``vector``, one row per text. ``model_input``: a table with a column
        ``text``, or a list of texts. Its annotation is one that MLflow accepts without a warning."""
        column = model_input["text"] if hasattr(model_input, "columns") else model_input
        texts = [str(text) for text in column]
        vectors: list[np.ndarray] = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=self.length,
                return_token_type_ids=False, return_tensors="pt",
            )  # fmt: skip
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            vectors.extend(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return pandas.DataFrame({"vector": [vector.tolist() for vector in vectors]})


set_model(StudentModel())
