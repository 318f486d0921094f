"""A student as MLflow serves it: texts in, one vector for each text out.

MLflow copies this file into the registered model and runs it there, so it imports nothing of this project.
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
"""Tokens of a text, if the model has positions for them."""


class StudentModel(PythonModel):
    """The mean of the encoder's last hidden states over a text's tokens."""

    def load_context(self, context: Any) -> None:
        directory = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(
            directory, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        ).eval()
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # RoBERTa counts positions from it
        positions = self.model.config.max_position_embeddings - (0 if padding is None else padding + 1)
        self.length = min(LONGEST, positions)

    @torch.inference_mode()
    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """model_input: a table with a column ``text``, or a list of texts.

        MLflow accepts these annotations without a warning.
        """
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
