"""``python -m infra.demo.make_teacher DIRECTORY``: the demo's teacher, a BERT of half a million parameters.

It replaces ``bert-base-uncased``, which a demo without network cannot download. This program wrote
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
"""First and last of the special tokens' ids."""
WIDTH, LAYERS, POSITIONS = 96, 4, 64
TEXT_SEED, HELD_OUT_SEED, MASK_SEED = 11, 12, 0
DOCUMENTS, HELD_OUT = 50_000, 1_000
STEPS, BATCH, RATE = 6_000, 32, 1.5e-3
MASKED, SMOOTHING = 0.13, 0.7
"""Share of the tokens; rare ones are chosen more often, in proportion to count^-0.7 (arXiv 1910.01108)."""
INIT = 0.05
RECORD = "made.json"
"""What was measured when the teacher was made."""


def build_tokenizer() -> BertTokenizer:
    """A lower-casing BERT WordPiece tokenizer of the language's words."""
    ids = {piece: number for number, piece in enumerate(vocabulary())}
    return BertTokenizer(vocab=ids, model_max_length=POSITIONS)


def rows_of(seed: int, count: int) -> torch.Tensor:
    """A document a row, int64 [B, L], padded."""
    texts = list(itertools.islice(documents(seed, 0), count))
    return build_tokenizer()(texts, padding=True, return_tensors="pt")["input_ids"]


class Masking:
    """BERT's masking, where rare tokens of ``text`` [B, L] are chosen more often."""

    def __init__(self, text: torch.Tensor) -> None:
        self.generator = torch.Generator().manual_seed(MASK_SEED)
        self.weights = torch.bincount(text.flatten(), minlength=len(vocabulary())).clamp(min=1) ** -SMOOTHING
        self.weights[: MASK + 1] = 0

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, int64 [B, L]; a label is -100 where nothing is asked.

        80 % of what is chosen becomes [MASK], 10 % any token, 10 % stays (arXiv 1810.04805, 3.1).
        """
        chance, fate, pick = torch.rand((3, *rows.shape), generator=self.generator)
        weights = self.weights[rows]
        share = weights / weights.sum(1, keepdim=True) * MASKED * (rows > MASK).sum(1, keepdim=True)
        chosen = chance < share
        anything = MASK + 1 + (pick * (len(self.weights) - MASK - 1)).long()
        ids = rows.masked_fill(chosen & (fate < 0.8), MASK).where(~(chosen & (fate >= 0.9)), anything)
        return ids, rows.where(chosen, -100)


def cooccurrence_embeddings(rows: torch.Tensor) -> torch.Tensor:
    """[V, D] by factors of positive pointwise mutual information within documents (Levy and Goldberg, 2014).

    With random embeddings, a BERT needs thousands of additional steps to learn the classes of words.
    """
    found = torch.zeros(len(rows), len(vocabulary())).scatter_(1, rows, 1.0)
    found[:, : MASK + 1] = 0
    together = found.T @ found
    together.fill_diagonal_(0)
    single = together.sum(1)
    expected = torch.outer(single, single) / single.sum()
    values, vectors = torch.linalg.eigh((together / expected.clamp(min=1e-6)).clamp(min=1).log().double())
    factors = vectors[:, -WIDTH:] * values[-WIDTH:].clamp(min=0).sqrt()
    rotated = factors @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    return INIT * WIDTH**0.5 * torch.nn.functional.normalize(rotated, dim=1).float()


def new_model(rows: torch.Tensor) -> BertForMaskedLM:
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
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # the text has no second segment
    return model


def masked_lm_loss(model: BertForMaskedLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats at the masked positions."""
    hidden, at = model.bert(ids, attention_mask=(ids != PAD).long()).last_hidden_state, labels >= 0
    return torch.nn.functional.cross_entropy(model.cls(hidden[at]), labels[at])


def train(model: BertForMaskedLM, rows: torch.Tensor, steps: int) -> list[float]:
    """The first ``steps`` of a schedule of STEPS; the masked-LM loss of each."""
    model.eval()  # no dropout: so small a model of so much text does not overfit
    masking, order = Masking(rows), torch.Generator().manual_seed(MASK_SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    losses = []
    with progress(steps, "steps", "masked LM") as shown:
        for _ in range(steps):
            loss = masked_lm_loss(model, *masking(rows[torch.randint(len(rows), (BATCH,), generator=order)]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            shown.note(f"loss {loss:.3f}")
            shown.advance()
    return losses


@torch.no_grad()
def held_out_loss(model: BertForMaskedLM) -> float:
    """Masked-LM loss on text of another seed."""
    rows = rows_of(HELD_OUT_SEED, HELD_OUT)
    return masked_lm_loss(model, *Masking(rows)(rows)).item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.demo.make_teacher", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    torch.set_num_threads(1)  # their number decides the order of sums, and with it the last bits
    rows = rows_of(TEXT_SEED, DOCUMENTS)
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
