"""``python -m infra.demo.make_teacher DIRECTORY``: trains the demo's teacher, a BERT with 0.5 M parameters.

This teacher replaces ``bert-base-uncased``, which a demo without network cannot download. This program wrote
``infra/demo/teacher`` in some minutes on one core; ``make demo`` only copies that directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from infra.console import command, progress
from infra.demo.language import documents, vocabulary

PAD, MASK = 0, 4
"""Ids of the first and the last special token."""
WIDTH, LAYERS, POSITIONS = 96, 4, 64
TEXT_SEED, HELD_OUT_SEED, MASK_SEED = 11, 12, 0
DOCUMENTS, HELD_OUT = 50_000, 1_000
STEPS, BATCH, RATE = 6_000, 32, 1.5e-3
MASKED, SMOOTHING = 0.13, 0.7
"""Share of masked tokens, and the exponent s with which rare tokens are masked more often: the probability is
proportional to count^-s (arXiv 1910.01108)."""
INIT = 0.05
"""Standard deviation of the initial weights."""
RECORD = "made.json"
"""Name of the file with the losses measured when the teacher was trained."""


def build_tokenizer() -> BertTokenizer:
    """Returns a lower-casing BERT WordPiece tokenizer with the words of the demo's language."""
    ids = {piece: number for number, piece in enumerate(vocabulary())}
    return BertTokenizer(vocab=ids, model_max_length=POSITIONS)


def tokenized_documents(seed: int, count: int) -> torch.Tensor:
    """Returns ``count`` documents as token ids, one per row: int64 [B, L], padded."""
    texts = list(itertools.islice(documents(seed, 0), count))
    return build_tokenizer()(texts, padding=True, return_tensors="pt")["input_ids"]


class Masking:
    """BERT's masking, except that tokens which are rare in ``text`` [B, L] are masked more often."""

    def __init__(self, text: torch.Tensor) -> None:
        self.generator = torch.Generator().manual_seed(MASK_SEED)
        self.weights = torch.bincount(text.flatten(), minlength=len(vocabulary())).clamp(min=1) ** -SMOOTHING
        self.weights[: MASK + 1] = 0

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns input ids and labels, int64 [B, L]; a label is -100 at positions without prediction. Of the
        chosen tokens 80 % become [MASK], 10 % a random token, 10 % are kept (arXiv 1810.04805, 3.1)."""
        choice, replacement, token = torch.rand((3, *rows.shape), generator=self.generator)
        weights = self.weights[rows]
        probability = weights / weights.sum(1, keepdim=True) * MASKED * (rows > MASK).sum(1, keepdim=True)
        chosen = choice < probability
        random_ids = MASK + 1 + (token * (len(self.weights) - MASK - 1)).long()
        masked = rows.masked_fill(chosen & (replacement < 0.8), MASK)
        return masked.where(~(chosen & (replacement >= 0.9)), random_ids), rows.where(chosen, -100)


def cooccurrence_embeddings(rows: torch.Tensor) -> torch.Tensor:
    """Returns word embeddings [V, D] that factorise the positive pointwise mutual information of the words
    within documents (Levy and Goldberg, 2014).

    With random embeddings, a BERT needs thousands of additional steps to learn the classes of words.
    """
    occurs = torch.zeros(len(rows), len(vocabulary())).scatter_(1, rows, 1.0)
    occurs[:, : MASK + 1] = 0
    counts = occurs.T @ occurs
    counts.fill_diagonal_(0)
    totals = counts.sum(1)
    expected = torch.outer(totals, totals) / totals.sum()
    values, vectors = torch.linalg.eigh((counts / expected.clamp(min=1e-6)).clamp(min=1).log().double())
    factors = vectors[:, -WIDTH:] * values[-WIDTH:].clamp(min=0).sqrt()
    rotated = factors @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    return INIT * WIDTH**0.5 * torch.nn.functional.normalize(rotated, dim=1).float()


def new_model(rows: torch.Tensor) -> BertForMaskedLM:
    """Returns an untrained BERT whose word embeddings come from the documents ``rows`` [B, L]."""
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(vocabulary()), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS, initializer_range=INIT,
        )
    )  # fmt: skip
    with torch.no_grad():
        words = cooccurrence_embeddings(rows)
        model.bert.embeddings.word_embeddings.weight[words.any(1)] = words[words.any(1)]
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # the text has no second segments
    return model


def masked_lm_loss(model: BertForMaskedLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy in nats at the masked positions."""
    hidden = model.bert(ids, attention_mask=(ids != PAD).long()).last_hidden_state
    masked = labels >= 0
    return torch.nn.functional.cross_entropy(model.cls(hidden[masked]), labels[masked])


def train(model: BertForMaskedLM, rows: torch.Tensor, steps: int) -> list[float]:
    """Trains for the first ``steps`` of a schedule of STEPS, and returns the masked-LM loss of each step."""
    model.eval()  # no dropout: this model is too small to overfit this text
    masking, order = Masking(rows), torch.Generator().manual_seed(MASK_SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    losses = []
    with progress(steps, "steps", "masked LM") as bar:
        for _ in range(steps):
            loss = masked_lm_loss(model, *masking(rows[torch.randint(len(rows), (BATCH,), generator=order)]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.note(f"loss {loss:.3f}")
            bar.advance()
    return losses


@torch.no_grad()
def held_out_loss(model: BertForMaskedLM) -> float:
    """Returns the masked-LM loss on text with another random seed."""
    rows = tokenized_documents(HELD_OUT_SEED, HELD_OUT)
    return masked_lm_loss(model, *Masking(rows)(rows)).item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.demo.make_teacher", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    torch.set_num_threads(1)  # the number of threads changes the order of sums, and so the last bits
    rows = tokenized_documents(TEXT_SEED, DOCUMENTS)
    model = new_model(rows)
    losses = train(model, rows, STEPS)
    model.half().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    stored = BertForMaskedLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    record = {"first_losses": losses[:20], "held_out_loss": held_out_loss(stored)}
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{directory}: masked-LM loss {record['held_out_loss']:.4f} on held-out text")


if __name__ == "__main__":
    command(main)
