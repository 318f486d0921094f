"""A WordPiece tokenizer and a small BERT masked LM, both trained on the demo language, in about a minute.

It stands in for ``bert-base-uncased``, which a demo without network cannot have. Plain PyTorch on purpose:
what is worth showing comes after it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from infra.console import progress
from infra.demo.wordpiece import wordpiece_vocabulary
from infra.processor import computes_bfloat16

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
VOCABULARY = 2_000
LENGTH = 64
BATCH = 32
MASKED = 0.3
INIT = 0.05
THREADS = 2  # fixed: their number decides the order of the sums, and with it the last bits of every weight


def train_tokenizer(texts: list[str]) -> BertTokenizer:
    """A lower-casing BERT WordPiece tokenizer with ``VOCABULARY`` entries."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = wordpiece_vocabulary(words, VOCABULARY, SPECIAL)
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return BertTokenizer(tokenizer_object=tokenizer, do_lower_case=True, model_max_length=128)


def pack(tokenizer: BertTokenizer, texts: list[str]) -> torch.Tensor:
    """All documents as one stream cut into [CLS] ... [SEP] rows; [B, L] int64."""
    stream: list[int] = []
    for encoding in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [*encoding, SEP]
    body = LENGTH - 2
    rows = torch.tensor(stream[: len(stream) // body * body]).view(-1, body)  # [B, L - 2]
    ends = torch.full((len(rows), 1), CLS), torch.full((len(rows), 1), SEP)
    return torch.cat([ends[0], rows, ends[1]], dim=1)


def masked(input_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking (arXiv 1810.04805, 3.1), 80/10/10; labels are -100 elsewhere.

    30 % of the tokens, not 15 %: a short pre-training learns faster so (arXiv 2202.08005).
    """
    draw = torch.rand(input_ids.shape, generator=generator)
    chosen = (draw < MASKED) & (input_ids > MASK)
    labels = input_ids.where(chosen, -100)
    fate = torch.rand(input_ids.shape, generator=generator)
    random_ids = torch.randint(MASK + 1, VOCABULARY, input_ids.shape, generator=generator)
    corrupted = input_ids.masked_fill(chosen & (fate < 0.8), MASK)
    return corrupted.where(~(chosen & (fate >= 0.9)), random_ids), labels


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Position embeddings to start from, [positions, width] (arXiv 1706.03762, 3.5), at the words' scale.

    From them a head learns "the word before" in a few hundred steps; from random ones it takes thousands.
    """
    angle = torch.arange(positions)[:, None] / 10_000 ** (
        torch.arange(0, width, 2) / width
    )  # [positions, width / 2]
    return INIT * torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1) * 2**0.5


def train_teacher(texts: list[str], directory: Path, steps: int, seed: int = 0) -> None:
    """Pre-train and save model and tokenizer into ``directory`` (created; must not be a final name).

    The same bytes every time on one kind of machine, whatever OMP_NUM_THREADS says.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    rows = pack(tokenizer, texts)  # [B, L]
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=128,
            initializer_range=INIT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(
            sinusoids(*model.bert.embeddings.position_embeddings.weight.shape)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    with progress(steps, "step", "teacher pre-training") as bar:
        for step in range(steps):
            if step % (len(rows) // BATCH) == 0:
                order = torch.randperm(len(rows), generator=generator)
            at = step % (len(rows) // BATCH) * BATCH
            input_ids, labels = masked(rows[order[at : at + BATCH]], generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16()):
                hidden = model.bert(input_ids).last_hidden_state[labels >= 0]  # [M, D]
                logits = model.cls(hidden)  # [M, V]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[labels >= 0])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(1)
            if step % 50 == 0:
                bar.note(f"loss {loss.item():.3f}")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"teacher: masked-LM loss {loss.item():.3f} after {steps} steps")
