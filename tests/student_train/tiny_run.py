"""A tiny teacher, its store and a recipe, made in a second: what the trainer's tests train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from offline_teacher.store.head import MlmHead
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from infra import storage
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.schema import Layout, ShardPlan, SpecialIds
from offline_teacher.store.writer import begin_store, finish_store, write_head, write_shard

V, D, L, M, K = 96, 16, 12, 2, 8
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
PAD, CLS, SEP, MASK, FIRST_WORD = 0, 2, 3, 4, 5


def make_teacher(directory: Path, seed: int = 0, vocab_size: int = V) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=L,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    teacher = BertForMaskedLM(config).eval()
    directory.mkdir(parents=True, exist_ok=True)
    teacher.save_pretrained(directory)
    words = [*SPECIAL, *(f"w{i}" for i in range(vocab_size - len(SPECIAL)))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    return teacher


def make_store(
    directory: Path,
    teacher: BertForMaskedLM,
    teacher_dir: Path,
    *,
    sequences: int = 50,
    replicas: int = 2,
    samples_per_shard: int = 8,
    top_k: int = K,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    hidden_states: str = "float16",
    positions: str = "all",
    seed: int = 0,
    finish: bool = True,
) -> None:
    V = teacher.config.vocab_size  # noqa: N806
    layout = Layout(
        length=L,
        masked=M,
        vocab_size=V,
        top_k=top_k,
        temperatures=temperatures,
        hidden_size=D,
        hidden_states=hidden_states,
        positions=positions,
    )
    plan = ShardPlan(sequences, replicas, samples_per_shard)
    special = SpecialIds(pad=PAD, mask=MASK, cls=CLS, sep=SEP)
    fingerprint = {"recipe": {}, "teacher": f"t{seed}", "tokenizer": "tok", "corpus": "c", "format": 1}
    declaration = Declaration(layout, plan, special, fingerprint)
    root = str(directory)
    begin_store(root, declaration)
    write_head(root, _head(teacher))
    storage.publish_bytes(
        storage.join(root, "teacher", "config.json"), (teacher_dir / "config.json").read_bytes()
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        storage.publish_bytes(storage.join(root, "tokenizer", name), (teacher_dir / name).read_bytes())
    for replica, index in plan.shard_ids():
        columns = _columns(teacher, layout, np.arange(*_bounds(plan, index)), replica, seed)
        write_shard(root, declaration, replica, index, columns)
    if finish:
        finish_store(root)


def _bounds(plan: ShardPlan, index: int) -> tuple[int, int]:
    ids = plan.sequence_range(index)
    return ids.start, ids.stop


def _head(teacher: BertForMaskedLM) -> MlmHead:
    predictions = teacher.cls.predictions
    arrays = {
        "dense_weight": predictions.transform.dense.weight,
        "dense_bias": predictions.transform.dense.bias,
        "layer_norm_weight": predictions.transform.LayerNorm.weight,
        "layer_norm_bias": predictions.transform.LayerNorm.bias,
        "decoder_weight": predictions.decoder.weight,
        "decoder_bias": predictions.decoder.bias,
    }
    return MlmHead(
        **{name: tensor.detach().float().numpy() for name, tensor in arrays.items()},
        hidden_act=teacher.config.hidden_act,
        layer_norm_eps=teacher.config.layer_norm_eps,
    )


def _columns(
    teacher: BertForMaskedLM, layout: Layout, ids: np.ndarray, replica: int, seed: int
) -> dict[str, np.ndarray]:
    n, V = len(ids), layout.vocab_size  # noqa: N806
    input_ids = np.zeros((n, L), layout.id_dtype)
    token_count = np.zeros(n, np.uint16)
    positions = np.full((n, M), -1, np.int16)
    labels = np.zeros((n, M), layout.id_dtype)
    for row, sequence in enumerate(ids.tolist()):
        text = np.random.default_rng([seed, sequence])
        count = int(text.integers(6, L + 1)) if sequence % 5 == 0 else L
        input_ids[row, :count] = [CLS, *text.integers(FIRST_WORD, V, count - 2), SEP]
        token_count[row] = count
        masks = np.sort(
            np.random.default_rng([seed, sequence, replica]).choice(np.arange(1, count - 1), M, False)
        )
        positions[row], labels[row] = masks, input_ids[row, masks]
        input_ids[row, masks] = MASK
    ids_tensor = torch.tensor(input_ids.astype(np.int64))
    mask = (torch.arange(L) < torch.tensor(token_count.astype(np.int64))[:, None]).long()
    with torch.no_grad():
        hidden = teacher.bert(ids_tensor, attention_mask=mask).last_hidden_state  # [n, L, D]
        logits = teacher.cls(hidden)  # [n, L, V]
    if layout.positions == "masked":
        at = torch.tensor(positions.astype(np.int64))[..., None]
        hidden, logits = hidden.take_along_dim(at, 1), logits.take_along_dim(at, 1)
        real = torch.ones(hidden.shape[:2], dtype=torch.bool)
    else:
        real = mask.bool()
    columns = {
        "sequence_id": ids.astype(np.int64),
        "token_count": token_count,
        "input_ids": input_ids,
        "masked_positions": positions,
        "masked_labels": labels,
    }
    if layout.top_k:
        values, best = logits.half().topk(layout.top_k, dim=2)
        sums = [torch.logsumexp(logits / t, 2) for t in layout.temperatures]
        columns["topk_ids"] = (best * real[..., None]).numpy().astype(layout.id_dtype)
        columns["topk_logits"] = (values * real[..., None]).numpy()
        columns["logsumexp"] = (torch.stack(sums, 2) * real[..., None]).numpy().astype(np.float32)
    if layout.hidden_states == "float16":
        columns["hidden_states"] = (hidden * real[..., None]).half().numpy()
    if layout.hidden_states == "int8":
        scale = hidden.abs().amax(2) / 127 * real
        quantised = (hidden / scale.clamp_min(1e-12)[..., None]).round().clamp(-127, 127) * real[..., None]
        columns["hidden_states"] = quantised.to(torch.int8).numpy()
        columns["hidden_scale"] = scale.numpy().astype(np.float32)
    return columns


def make_run(root: Path, *, validation: bool = True, recipe: dict | None = None, **store: object) -> Path:
    """Teacher, store(s) and recipe below ``root``; the path of the recipe. Output: ``root/runs/tiny``."""
    teacher_dir = root / "teacher"
    teacher = make_teacher(teacher_dir)
    make_store(root / "runs" / "tiny" / "store", teacher, teacher_dir, **store)
    if validation:
        held_out = {
            key: value for key, value in store.items() if key not in ("sequences", "replicas", "finish")
        }
        path = root / "runs" / "tiny" / "validation_store"
        make_store(path, teacher, teacher_dir, sequences=9, replicas=1, **held_out)
    sections: dict = {
        "name": "tiny",
        "output": str(root / "runs"),
        "corpus": {"path": ["unused"]},
        "sequences": {"length": L},
        "teacher": {"model": str(teacher_dir)},
        "student": {"layers": [0]},
        "train": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 2,
            "dtype": "float32",
            "compile": False,
            "log_every": 1,
            "checkpoint_every": 4,
            "learning_rate": 1e-3,
            "window_shards": 2,
        },
        "tracking": {"enabled": False},
    }
    for name, values in (recipe or {}).items():
        sections[name] = {**sections.get(name, {}), **values}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
