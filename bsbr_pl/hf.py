"""Trained models in Hugging Face's format. After `import bsbr_pl.hf`, transformers knows the model type `bsbr_pl`.

    import bsbr_pl.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = AutoTokenizer.from_pretrained("exported")
    model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=20)

An exported folder has no code: config.json names architectures by their key in ARCHITECTURES, with their options, and
the weights are read from model.safetensors alone. Needs the extra `[hf]`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from bsbr_pl.utils.files import write_whole

from .attention import ARCHITECTURES
from .attention.parts import check_choice
from .limits import check_weights
from .model import LanguageModel
from .models import SIZES, model_class
from .spec import AttentionSpec, layers_of

if TYPE_CHECKING:
    from .data.tokenizer import Tokenizer  # imports Lightning

CARD = """---
library_name: transformers
tags: [bsbr_pl]
---
A language model of the package `bsbr-pl`, with the attention {attention}. It was exported with `bsbr export`.

```python
import bsbr_pl.hf  # pip install 'bsbr-pl[hf]'
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR NAME")
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR NAME")
```
"""
#: Values of a config.json besides our own that transformers sets when it loads one; others are dropped.
KEPT = ("name_or_path", "torch_dtype")


class BsbrPlConfig(PreTrainedConfig):
    """The arguments of a `LanguageModel`.

    Args:
        attention: `{"name": key of ARCHITECTURES, "options": {...}}` of every layer; a shorter list is repeated.
        vocab_size, hidden_dim, ..., bottleneck: as in `LanguageModel`.
        bos_token_id, eos_token_id: the end of text, which is also what the first token of a text follows.
        use_cache: return the decode state.
    """

    model_type = "bsbr_pl"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    attention: list[dict[str, Any]] | None = None
    vocab_size: int = 257
    hidden_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ff_dim: int | None = None
    dropout: float = 0.0
    positions: int = 0
    ff_activation: str = "relu2"
    ff_bias: bool = False
    out_init: float = 0.5
    norm: str = "layer"
    tie_embeddings: bool = True
    bottleneck: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **others: Any) -> None:
        super().__post_init__(**{name: others[name] for name in KEPT if name in others})

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of `LanguageModel` besides the attention."""
        return {size.name: getattr(self, size.name) for size in SIZES}

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """The attention of each layer.

        Raises:
            ValueError: an entry is no registered architecture.
            TypeError: an option that the architecture does not have.
        """
        if not isinstance(self.attention, list) or not self.attention:
            raise ValueError(f"attention must be a list of names with options, got {self.attention!r}")
        return tuple(map(_spec, self.attention))


def _spec(entry: Any) -> AttentionSpec:
    if not isinstance(entry, dict) or entry.keys() != {"name", "options"} or not isinstance(entry["options"], dict):
        raise ValueError(f"attention must list {{'name': ..., 'options': {{...}}}}, got {entry!r}")
    check_choice(ARCHITECTURES, attention=entry["name"])
    return model_class(entry["name"]).factory(**entry["options"])


class DecodeState:
    """The decode states of a model after some tokens, in place of transformers' `Cache`. Each call makes a new one."""

    is_compileable = is_croppable = False
    is_linear = (False,)

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        return self.states[0].tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue the texts with these numbers (B,), for beam search."""
        position, *states = self.states
        self.states = [position, *(type(s)(*(_rows(part, beam_idx) for part in s)) for s in states)]


def _rows(part: Any, index: Tensor) -> Any:
    return part.index_select(0, index.to(part.device)) if isinstance(part, Tensor) and part.dim() else part


@dataclass
class BsbrPlOutput(ModelOutput):
    """loss: of `labels`; logits (B, T, vocab_size); cache: the decode state after the last token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None


class BsbrPlForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel`, which is its attribute `model`, with the methods of transformers.

    Raises:
        ValueError: the configuration has a value that `LanguageModel` does not accept; names it.
    """

    config_class = BsbrPlConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # a decode state cannot be cut

    def __init__(self, config: BsbrPlConfig) -> None:
        super().__init__(config)
        specs = config.specs
        check_weights(specs, config.sizes)
        self.model = LanguageModel(specs, **config.sizes)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, from safetensors alone.

        Raises:
            ValueError: the weights are not those of the configuration.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs | {"use_safetensors": True})
        for name, tensors in loaded[1].items():
            if tensors:
                raise ValueError(f"the weights are not those of config.json: {name.replace('_', ' ')} {tensors}")
        return loaded if output_loading_info else loaded[0]

    def _init_weights(self, module: nn.Module) -> None:
        """`LanguageModel` does."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embedding, self.model.vocab_size = value, value.num_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The weights of the head; None if it is the embedding."""
        return self.model.unembedding

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.unembedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DecodeState | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> BsbrPlOutput:
        """ids (B, T) -> logits of the last `logits_to_keep` tokens (0: of all), by the fast form or from a state.

        Args:
            input_ids: the tokens that follow those of `cache`.
            attention_mask: (B, any length), 0 only at the end of a text: there is no padding before a token.
            cache: what an earlier call returned.
            use_cache: return the state; as in the configuration by default, and never in training.
            labels: (B, T), ids to predict, -100 where none is counted; token t + 1 is the target of token t.
            logits_to_keep: how many.

        Raises:
            ValueError: padding before a token, or a cache that is not of this model.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask pads before a token: pad on the right, or give prompts of one length")
        if cache is not None and not isinstance(cache, DecodeState):
            raise ValueError(f"cache must be what an earlier call returned, got a {type(cache).__name__}")
        states = cache.states if cache else None
        if states and input_ids.shape[1] == 1:
            logits, states = self.model.step(input_ids[:, 0], states)
            logits = logits[:, None]
        else:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            if states or use_cache:
                hidden, states = self.model.decode(input_ids, states)
            else:
                hidden = self.model.hidden(input_ids)
            logits = self.model.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return BsbrPlOutput(loss, logits, DecodeState(states) if states else None)


AutoConfig.register(BsbrPlConfig.model_type, BsbrPlConfig)
AutoModelForCausalLM.register(BsbrPlConfig, BsbrPlForCausalLM)


def from_language_model(
    model: LanguageModel, arguments: Mapping[str, Any], eos_id: int | None = None
) -> BsbrPlForCausalLM:
    """A copy of a trained model.

    Args:
        model: with its weights.
        arguments: of `LanguageModel`; others are ignored, so `hparams` of a LanguageModule will do.
        eos_id: the end of text.

    Raises:
        ValueError: an attention that is not in ARCHITECTURES.
    """
    layers = layers_of(arguments["attention"])
    if unknown := [spec.key for spec in layers if spec.key not in ARCHITECTURES]:
        raise ValueError(f"{unknown[0]} cannot be exported: a folder names architectures by their key in ARCHITECTURES")
    sizes = {size.name: arguments.get(size.name, size.default) for size in SIZES}
    attention = [{"name": spec.key, "options": dict(spec.options)} for spec in layers]
    exported = BsbrPlForCausalLM(BsbrPlConfig(attention=attention, bos_token_id=eos_id, eos_token_id=eos_id, **sizes))
    exported.model.load_state_dict(model.state_dict())
    exported.generation_config = GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id)
    return exported.eval()


def hugging_face_tokenizer(tokenizer: "Tokenizer") -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that gives the same ids for every text."""
    backend = Backend.from_str(tokenizer.to_json())
    end = backend.id_to_token(tokenizer.eos_id)
    special = {"bos_token": end, "eos_token": end, "pad_token": end, "split_special_tokens": True}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def export(
    model: LanguageModel, arguments: Mapping[str, Any], tokenizer: "Tokenizer | None", folder: str | Path
) -> BsbrPlForCausalLM:
    """Write model.safetensors, config.json, generation_config.json, README.md, and the tokenizer's files if it has one.

    Args:
        model: with its weights.
        arguments: of `LanguageModel`, such as `hparams` of a LanguageModule.
        tokenizer: of the text that the model was trained on; None if it was trained on no text.
        folder: made if it is missing.

    Returns:
        The exported model.
    """
    exported = from_language_model(model, arguments, tokenizer.eos_id if tokenizer else None)
    exported.save_pretrained(folder)
    if tokenizer:
        hugging_face_tokenizer(tokenizer).save_pretrained(folder)
    names = ", ".join(dict.fromkeys(map(str, exported.config.specs)))
    write_whole(Path(folder) / "README.md", CARD.format(attention=names).encode())
    return exported
