"""Results of the DistilBERT paper (arXiv 1910.01108), for reference."""

from __future__ import annotations

PAPER: dict[str, dict[str, float]] = {
    "ELMo": {
        "macro": 68.7, "CoLA": 44.1, "MNLI": 68.6, "MRPC": 76.6, "QNLI": 71.1, "QQP": 86.2, "RTE": 53.4,
        "SST-2": 91.5, "STS-B": 70.4, "WNLI": 56.3,
    },
    "BERT-base": {
        "macro": 79.5, "CoLA": 56.3, "MNLI": 86.7, "MRPC": 88.6, "QNLI": 91.8, "QQP": 89.6, "RTE": 69.3,
        "SST-2": 92.7, "STS-B": 89.0, "WNLI": 53.5, "IMDb": 93.46, "SQuAD EM": 81.2, "SQuAD F1": 88.5,
    },
    "DistilBERT": {
        "macro": 77.0, "CoLA": 51.3, "MNLI": 82.2, "MRPC": 87.5, "QNLI": 89.2, "QQP": 88.5, "RTE": 59.9,
        "SST-2": 91.3, "STS-B": 86.9, "WNLI": 56.3, "IMDb": 92.82, "SQuAD EM": 77.7, "SQuAD F1": 85.8,
    },
    "DistilBERT (D)": {"SQuAD EM": 79.1, "SQuAD F1": 86.9},
}  # fmt: skip
"""Scores in percent from tables 1 and 2: development sets, medians of 5 runs."""
PAPER_COST = {
    "ELMo": {"parameters": 180e6, "seconds": 895.0},
    "BERT-base": {"parameters": 110e6, "seconds": 668.0},
    "DistilBERT": {"parameters": 66e6, "seconds": 410.0},
    "DistilBERT (D)": {"parameters": 66e6},
}
"""Parameters, and seconds for all of the STS-B dev set on a CPU at batch size 1, from table 3."""
