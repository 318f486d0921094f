"""A network of ELMo's size with random weights: a reference for latency that has no scores.

It is the encoder of Peters et al. 2018 (arXiv 1802.05365) in the sizes that its authors published as
"Original" (93.6 M parameters). Each word's characters (262 embeddings of 16 numbers) pass through 2,048
convolution filters of widths 1 to 7, two highway layers and a projection to 512. Two biLSTM layers follow,
with 4,096 cells projected to 512 per direction; the second has a residual connection. DistilBERT's table
names 180 M parameters, because it includes the GLUE baseline's two 1,500-wide biLSTM layers on top.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.devices.latency import Inputs, Runner

LABEL = "ELMo-size (random weights)"
FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
"""(Width in characters, number of filters) of each convolution."""
CHARACTERS, CHARACTER_SIZE, WORD_LENGTH = 262, 16, 50
"""Number of character ids, size of a character's embedding, characters per word."""
CELLS, SIZE, HIGHWAYS, LAYERS = 4096, 512, 2, 2
"""LSTM cells and their projected size per direction, number of highway layers and of LSTM layers."""
PAD, BEGIN, END = 260, 258, 259
"""Ids of padding and of the begin and end of a word, in ELMo's numbering; ids 0 to 255 are bytes."""


class Elmo(nn.Module):
    """Character ids int64 [B, W, 50] -> contextual embeddings float32 [B, W, 1024] of W words."""

    def __init__(self) -> None:
        super().__init__()
        width = sum(count for _, count in FILTERS)
        self.characters = nn.Embedding(CHARACTERS, CHARACTER_SIZE)
        self.convolutions = nn.ModuleList(nn.Conv1d(CHARACTER_SIZE, count, size) for size, count in FILTERS)
        self.highways = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(HIGHWAYS))
        self.projection = nn.Linear(width, SIZE)
        self.directions = nn.ModuleList(
            nn.ModuleList(nn.LSTM(SIZE, CELLS, proj_size=SIZE, batch_first=True) for _ in range(LAYERS))
            for _ in range(2)
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        words = self.words(input_ids)
        forward = self._run(self.directions[0], words)
        backward = self._run(self.directions[1], words.flip(1))
        return torch.cat([forward, backward.flip(1)], dim=-1)

    def words(self, characters: torch.Tensor) -> torch.Tensor:
        """Character ids int64 [B, W, 50] -> embeddings of words without context, float32 [B, W, 512]."""
        batch, count, length = characters.shape
        embedded = self.characters(characters.view(-1, length)).transpose(1, 2)  # [B W, 16, 50]
        states = torch.cat([torch.relu(conv(embedded).amax(-1)) for conv in self.convolutions], dim=-1)
        for highway in self.highways:
            transformed, gate = highway(states).chunk(2, dim=-1)
            gate = torch.sigmoid(gate)
            states = gate * states + (1 - gate) * torch.relu(transformed)
        return self.projection(states).view(batch, count, -1)

    @staticmethod
    def _run(layers: Any, states: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            states = layer(states)[0] + (states if number else 0)
        return states


def build(seed: int = 0) -> Elmo:
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    torch.manual_seed(seed)
    return Elmo().eval()


def parameters(model: nn.Module) -> int:
    """Returns the number of parameters, without the second, redundant bias that torch has in every LSTM."""
    return sum(tensor.numel() for name, tensor in model.named_parameters() if "bias_hh" not in name)


def runner(model: Elmo) -> Runner:
    """Returns a function that runs one forward pass, for ``latency.measure``."""
    return lambda inputs: model(torch.from_numpy(inputs["input_ids"]))


def batches(texts: Sequence[tuple[str, ...]], batch_size: int, max_words: int) -> list[Inputs]:
    """Returns batches of ``input_ids``, character ids int64 [B, W, 50].

    A row holds the first ``max_words`` words of an example's texts, joined in one sequence.
    """
    made = []
    for start in range(0, len(texts), batch_size):
        rows = [" ".join(row).split()[:max_words] for row in texts[start : start + batch_size]]
        ids = np.full((len(rows), max(1, *map(len, rows)), WORD_LENGTH), PAD, np.int64)
        for slot, words in enumerate(rows):
            for number, word in enumerate(words):
                characters = [BEGIN, *word.encode()[: WORD_LENGTH - 2], END]
                ids[slot, number, : len(characters)] = characters
        made.append({"input_ids": ids})
    return made
