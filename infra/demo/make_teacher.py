"""``python -m infra.demo.make_teacher DIRECTORY``: the demo's teacher, a BERT of half a million parameters.

It stands in for ``bert-base-uncased``, which a demo without network cannot have. ``infra/demo/teacher`` is
what this program has written, in some minutes on one core; ``make demo`` only copies it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, DataCollatorForLanguageModeling

from infra.console import command, progress
from infra.demo.language import SPECIAL, documents, vocabulary

TEXT_SEED, HELD_OUT_SEED, MASK_SEED = 11, 12, 0
HELD_OUT = 32
"""Batches of text that the teacher has not seen."""
STEPS, BATCH, RATE, MASKED, INIT = 7_000, 32, 1.5e-3, 0.15, 0.05
COUNTED, WIDTH = 20_000, 96
"""Documents whose words are counted for the first embeddings, and their width."""
RECORD = "made.json"
"""What was measured when the teacher was made."""


def build_tokenizer() -> BertTokenizer:
    """A lower-casing BERT WordPiece tokenizer of the language's words."""
    ids = {piece: number for number, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=SPECIAL[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing((SPECIAL[3], 3), (SPECIAL[2], 2))
    return BertTokenizer(tokenizer_object=tokenizer, do_lower_case=True, model_max_length=64)


def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Masked documents without end (arXiv 1810.04805, 3.1): ids, attention mask and labels, int64 [B, L]."""
    tokenizer, texts = build_tokenizer(), documents(seed, 0)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=MASK_SEED)
    while True:
        yield collate([tokenizer(text) for text in itertools.islice(texts, BATCH)])


def word_vectors() -> torch.Tensor:
    """[V, D] by factors of positive pointwise mutual information within documents (Levy and Goldberg, 2014).

    A BERT of random embeddings is still at chance on the tasks after twice the steps.
    """
    texts = build_tokenizer()(list(itertools.islice(documents(TEXT_SEED, 0), COUNTED)), padding=True)
    found = torch.zeros(COUNTED, len(vocabulary())).scatter_(1, torch.tensor(texts["input_ids"]), 1.0)
    found[:, : len(SPECIAL)] = 0
    together = (found.T @ found).fill_diagonal_(0)
    single = together.sum(1)
    expected = (torch.outer(single, single) / single.sum()).clamp(min=1e-6)
    values, vectors = torch.linalg.eigh((together / expected).clamp(min=1).log().double())
    factors = vectors[:, -WIDTH:] * values[-WIDTH:].clamp(min=0).sqrt()
    rotated = factors @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    return torch.nn.functional.normalize(rotated, dim=1).float() * WIDTH**0.5


def new_model() -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(vocabulary()), hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=4 * WIDTH, max_position_embeddings=64, initializer_range=INIT,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    vectors = INIT * word_vectors()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[vectors.any(1)] = vectors[vectors.any(1)]
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # the text has no second segment
    return model


def train(model: BertForMaskedLM, steps: int) -> list[float]:
    """The first ``steps`` of a schedule of STEPS; the masked-LM loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    losses = []
    with progress(steps, "steps", "masked LM") as shown:
        for batch in itertools.islice(batches(TEXT_SEED), steps):
            loss = model(**batch).loss
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
    """Mean masked-LM loss on text of another seed."""
    found = [
        model.eval()(**batch).loss.item() for batch in itertools.islice(batches(HELD_OUT_SEED), HELD_OUT)
    ]
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.demo.make_teacher", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    torch.set_num_threads(1)  # their number decides the order of sums, and with it the last bits
    model = new_model()
    losses = train(model, STEPS)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1  # for fine-tuning
    model.half().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    loss = held_out_loss(BertForMaskedLM.from_pretrained(directory, dtype=torch.float32))
    record = {"first_losses": losses[:20], "held_out_loss": loss}
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{directory}: masked-LM loss {loss:.4f} on held-out text")


if __name__ == "__main__":
    command(main)
