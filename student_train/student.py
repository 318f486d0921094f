"""The student: its architecture, and where its weights start.

BERT teachers get a ``DistilBertForMaskedLM`` (no token types, no pooler), RoBERTa teachers a shallower
model of their own class. Both are plain transformers classes, so what is saved loads everywhere.

Axes: B batch, L length, N positions, V vocabulary, D student's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    logging,
)

from infra import sections
from infra.cpu_dropout import use_cheap_dropout
from infra.errors import UserError

DISTILBERT_LAYERS = (0, 2, 4, 7, 9, 11)
"""DistilBERT's authors' of BERT-base (transformers-research-projects, distillation/scripts/extract.py)."""

ROBERTA_FAMILY = ("roberta", "xlm-roberta", "camembert")
"""Model types whose masked LM is laid out as RoBERTa's."""

DECODER_BIAS = (
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "lm_head.bias",
    "lm_head.decoder.bias",
)
"""Where masked LMs keep it: in one place, or in two that are alike. In neither it is zero."""

DISTILBERT_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""Modules of a BERT layer and their names in a DistilBERT layer."""


class StudentModel(nn.Module):
    """The masked LM in the pieces that the loss needs, plus the projection that is trained but not saved."""

    def __init__(self, model: PreTrainedModel, teacher_width: int) -> None:
        super().__init__()
        self.model = model
        width = model.config.hidden_size
        self.projection = None if width == teacher_width else nn.Linear(width, teacher_width, bias=False)

    def body(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, L, D] of int64 ids [B, L]; the mask is 1 at real tokens, 0 at padding."""
        hidden: Tensor = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden

    def head_transform(self, hidden: Tensor) -> Tensor:
        """The MLM head up to the decoder: [N, D] -> [N, D]."""
        if isinstance(self.model, DistilBertForMaskedLM):
            model = self.model
            z: Tensor = model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        else:
            head = self.model.lm_head
            z = head.layer_norm(nn.functional.gelu(head.dense(hidden)))
        return z

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] in the teacher's width, for the cosine; ``hidden`` itself where the widths agree."""
        return hidden if self.projection is None else self.projection(hidden)

    @property
    def decoder_weight(self) -> nn.Parameter:
        """[V, D], the word embeddings wherever the teacher ties them."""
        weight: nn.Parameter = self.model.get_output_embeddings().weight
        return weight

    @property
    def decoder_bias(self) -> nn.Parameter:
        """[V]"""
        bias: nn.Parameter = self.model.get_output_embeddings().bias
        return bias

    def save(self, directory: str) -> None:
        """Weights (safetensors) and config in save_pretrained layout; the projection stays out."""
        head = getattr(self.model, "lm_head", None)
        if head is not None:  # of an untied RoBERTa: the bias lies in two places, and readers differ
            head.bias.data.copy_(head.decoder.bias.data)
        self.model.save_pretrained(directory)


def build_student(
    student: sections.Student,
    teacher_config: Mapping[str, Any],
    teacher_model: str | None,
    *,
    revision: str | None = None,
    seed: int = 0,
) -> StudentModel:
    """A float32 student on the CPU, in training mode.

    Args:
        teacher_config: the store's teacher/config.json.
        teacher_model: directory or hub name of the teacher's weights; may be None where init is random.
        seed: of the random initialisation (and of the projection).

    Raises:
        UserError: the family is unsupported; a layer or a width does not fit; the teacher's weights are
            missing, incomplete or of another model than the store's.
    """
    layers = choose_layers(student.layers, teacher_config["num_hidden_layers"])
    config = _student_config(student, teacher_config, len(layers))
    teacher = None
    if student.init == "teacher":
        if teacher_model is None:
            raise UserError("student.init: teacher needs the teacher's weights; set teacher.model")
        teacher = _load_teacher(teacher_model, revision, teacher_config)
        config.tie_word_embeddings = _is_tied(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = StudentModel(AutoModelForMaskedLM.from_config(config), teacher_config["hidden_size"])
    if teacher is not None:
        rename = _bert_as_distilbert if teacher_config["model_type"] == "bert" else _fewer_layers
        built.model.load_state_dict(rename(teacher.state_dict(), layers))
    if student.dropout:
        use_cheap_dropout(built.model)
    return built.train()


def choose_layers(layers: str | Sequence[int], teacher_layers: int) -> tuple[int, ...]:
    """Teacher layers, counted from 0, in ascending order.

    ``every_second`` is 0, 2, 4, ... (6 layers: 0, 2, 4), except that of 12 layers it is what DistilBERT's
    authors took, ``DISTILBERT_LAYERS``. ``last:N`` is the N nearest the output.
    """
    if layers == "every_second":
        return DISTILBERT_LAYERS if teacher_layers == 12 else tuple(range(0, teacher_layers, 2))
    if isinstance(layers, str):
        count = int(layers.removeprefix("last:"))
        if count > teacher_layers:
            raise UserError(
                f"student.layers: {layers} is deeper than the teacher, which has {teacher_layers} layers"
            )
        return tuple(range(teacher_layers - count, teacher_layers))
    if max(layers) >= teacher_layers:
        raise UserError(
            f"student.layers: there is no layer {max(layers)}; the teacher has 0 to {teacher_layers - 1}"
        )
    return tuple(layers)


def _student_config(student: sections.Student, teacher: Mapping[str, Any], depth: int) -> PretrainedConfig:
    width = student.hidden_size or teacher["hidden_size"]
    heads = teacher["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"student.hidden_size: {width} is not a multiple of the teacher's {heads} attention heads"
        )
    feed_forward = teacher["intermediate_size"] * width // teacher["hidden_size"]
    if teacher["model_type"] == "bert":
        return DistilBertConfig(
            vocab_size=teacher["vocab_size"],
            max_position_embeddings=teacher["max_position_embeddings"],
            n_layers=depth,
            n_heads=heads,
            dim=width,
            hidden_dim=feed_forward,
            dropout=student.dropout,
            attention_dropout=student.dropout,
            activation=teacher["hidden_act"],
            initializer_range=teacher["initializer_range"],
            pad_token_id=teacher["pad_token_id"],
            tie_word_embeddings=teacher.get("tie_word_embeddings", True),
        )
    if teacher["model_type"] in ROBERTA_FAMILY:
        changed = {
            "num_hidden_layers": depth,
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "hidden_dropout_prob": student.dropout,
            "attention_probs_dropout_prob": student.dropout,
        }
        return AutoConfig.for_model(**{**teacher, **changed, "dtype": "float32"})
    raise UserError(
        f"the store's teacher is a {teacher['model_type']}; "
        f"students are built of bert, {', '.join(ROBERTA_FAMILY)}"
    )


def _load_teacher(source: str, revision: str | None, expected: Mapping[str, Any]) -> PreTrainedModel:
    """The teacher in float32, from safetensors. Its decoder is tied where the weights say so."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of keys: what matters of it is said below
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            tie_word_embeddings=True,  # transformers compares the weights then, and ties equal ones alone
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"teacher.model: cannot read the weights of {source}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted(set(loading["missing_keys"]).difference(DECODER_BIAS))
    if lost:
        missing = ", ".join(lost[:3])
        raise UserError(f"teacher.model: {source} is not a whole masked LM; it lacks {missing}")
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        found = getattr(model.config, name)
        if found != expected[name]:
            raise UserError(
                f"teacher.model: {source} has {name} {found}, the store's teacher {expected[name]}"
            )
    return model


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the decoder is the word embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _bert_as_distilbert(bert: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """BertForMaskedLM tensors under DistilBertForMaskedLM's names.

    BERT adds the embedding of token type 0 to every token. DistilBERT has no token types, so it is folded
    into the position embeddings, of which every token also gets exactly one: the sum is unchanged. The word
    embeddings would not do, because the decoder is tied to them.
    """
    embeddings, head = "bert.embeddings", "cls.predictions"
    token_type = bert[f"{embeddings}.token_type_embeddings.weight"][0]  # [D]
    position = bert[f"{embeddings}.position_embeddings.weight"]
    own = {"distilbert.embeddings.position_embeddings.weight": position + token_type}
    modules = {
        f"{embeddings}.LayerNorm": "distilbert.embeddings.LayerNorm",
        f"{head}.transform.dense": "vocab_transform",
        f"{head}.transform.LayerNorm": "vocab_layer_norm",
        f"{head}.decoder": "vocab_projector",
    }
    for new, old in enumerate(layers):
        for theirs, ours in DISTILBERT_NAMES.items():
            modules[f"bert.encoder.layer.{old}.{theirs}"] = f"distilbert.transformer.layer.{new}.{ours}"
    for theirs, ours in modules.items():
        own |= {f"{ours}.{kind}": bert[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    own["distilbert.embeddings.word_embeddings.weight"] = bert[f"{embeddings}.word_embeddings.weight"]
    return own


def _fewer_layers(roberta: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """The same names, with only ``layers`` of the encoder, renumbered."""
    prefix = "roberta.encoder.layer."
    own = {name: tensor for name, tensor in roberta.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        layer = f"{prefix}{old}."
        own |= {
            f"{prefix}{new}.{name.removeprefix(layer)}": tensor
            for name, tensor in roberta.items()
            if name.startswith(layer)
        }
    return own
