"""What differs between families of encoders, as data and a few methods that a family may override.

Paths are attribute paths as ``torch.nn.Module.get_submodule`` takes them. Names of tensors are those of the
family's masked LM, also where a model is the encoder alone. Only methods import torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class HeadPaths:
    """Where a masked LM keeps its head: logits = decoder(norm(activation(dense(hidden))))."""

    dense: str
    norm: str
    decoder: str
    activation: str | None = None
    """The configuration's field that names the activation. None: gelu, whatever the configuration says."""


@dataclass(frozen=True)
class Family:
    """A family of encoders, for one ``model_type``."""

    model_type: str
    """As in config.json."""
    classes: str
    """Start of the transformers classes' names: ``Bert`` has BertConfig, BertModel, BertForMaskedLM."""
    prefix: str
    """The encoder's attribute in the masked LM, with which the names of its tensors begin."""
    layers: str
    """Path in the encoder of the list of layers."""
    projections: tuple[str, ...]
    """Paths in a layer of the query, key and value projections; one path where a single matrix holds all."""
    head: HeadPaths
    words: str = "embeddings.word_embeddings"
    """Path in the encoder of the word embeddings."""
    rotary: bool = False
    """Whether queries and keys are rotated by their positions, dimension i of a head with i + d / 2."""
    attention_norm: str | None = None
    """Path in a layer of the norm before the projections, in pre-norm families."""
    final_norm: str | None = None
    """Path in the encoder of the norm after the last layer, in pre-norm families."""
    has_pooler: bool = False
    """Whether the encoder's class makes a pooler by default."""
    attention: str = "sdpa"
    """The fastest attention that transformers has for this family on every device."""
    dropouts: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """The configuration's fields for dropout inside the encoder."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The configuration's own names of ``hidden_size``, ``intermediate_size`` ..., where they differ."""

    def own_name(self, name: str) -> str:
        """The configuration's own name of ``hidden_size``, ``intermediate_size`` and so on."""
        return self.renamed.get(name, name)

    def config(self, config: Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
        """A copy of a configuration of this family, with the family's attention."""
        import transformers

        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        made: PretrainedConfig = getattr(transformers, f"{self.classes}Config").from_dict(values)
        made._attn_implementation = self.attention
        return made

    def model_class(self, head: bool) -> Any:
        """The transformers class of the masked LM, or of the encoder alone."""
        import transformers

        return getattr(transformers, f"{self.classes}{'ForMaskedLM' if head else 'Model'}")

    def class_arguments(self, head: bool) -> dict[str, Any]:
        """Arguments of the class besides the configuration; the model never gets a pooler."""
        return {"add_pooling_layer": False} if self.has_pooler and not head else {}

    def new_model(self, config: Any, head: bool) -> Any:
        """A masked LM, or the encoder alone, with random weights."""
        return self.model_class(head)(self.config(config), **self.class_arguments(head))

    def prepare(self, model: Any) -> None:
        """Corrects what transformers sets up wrongly in a model of this family; called once for each."""

    def attention_mask(
        self, config: Any, visible: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """What the encoder takes as ``attention_mask`` so that only positions j with visible[:, j] are seen.

        ``visible`` is bool [B, L], or None where nothing is padded. The result has four axes, which
        transformers takes as it is; a mask of two axes is first read on the host.
        """
        return None if visible is None else visible[:, None, None, :].expand(-1, 1, length, -1)

    # Students

    def student_family(self, config: Any) -> Family:
        """The family of this family's students."""
        return self

    def check_student(self, layers: Sequence[int], width: int, heads: int) -> None:
        """Raises UserError if this family allows no student with these teacher layers and sizes."""
        if width % heads:
            what = f"{width} is not a multiple of the student's {heads} attention heads"
            raise UserError(f"student.hidden_size: {what}")

    def student_fields(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        """The student's configuration but for its sizes and dropout."""
        return {**config.to_dict(), "architectures": None, "dtype": "float32"}

    def student_tensors(
        self, config: Any, weights: Mapping[str, Tensor], layers: Sequence[int]
    ) -> dict[str, Tensor]:
        """The student's tensors out of its teacher's: layer ``layers[i]`` becomes layer i, the rest stays."""
        start = f"{self.prefix}.{self.layers}."
        number = {str(old): new for new, old in enumerate(layers)}
        own = {}
        for name, tensor in weights.items():
            old, _, rest = name.removeprefix(start).partition(".")
            if not name.startswith(start):
                own[name] = tensor
            elif old in number:
                own[f"{start}{number[old]}.{rest}"] = tensor
        return own


def no_head(what: str) -> UserError:
    """The error for all computations over the vocabulary of a model without a masked-LM head."""
    return UserError(
        f"{what} has no masked-LM head, so nothing over the vocabulary can be computed: set store.top_k,"
        " masking.probability, train.alpha_ce and train.alpha_mlm to 0, or take a teacher with a head"
    )
