"""Trained weights for another architecture: from a checkpoint, or from a folder with Hugging Face's GPT-2.

BSBR's gain starts at 0, so a converted BSBR begins as softmax attention over its last `chunk_size` tokens. Training
then learns to retrieve earlier tokens.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bsbr_pl.values import one_line

from .attention import StandardAttention
from .feed_forward import default_ff_dim
from .module import LanguageModule
from .spec import AttentionArgument, AttentionSpec

#: Two models must have these in common, for the weights of one to fit the other.
SHARED = (
    *("vocab_size", "hidden_dim", "num_layers", "num_heads", "ff_dim", "positions", "ff_activation", "ff_bias"),
    *("norm", "tie_embeddings", "bottleneck"),
)
#: Options without weights in which two attentions with positions must agree, and their values where there is no option.
POSITIONS = {"rope": True, "rope_base": 10_000.0, "rope_fraction": 1.0}


def start_from(module: LanguageModule, path: str | Path) -> list[str]:
    """Copy the weights of a trained module, which may be of another architecture.

    Args:
        module: gets the weights; its tensors that the trained one lacks do not change.
        path: a checkpoint, or a folder with a GPT-2 as `load_gpt2` reads it.

    Returns:
        The names of the tensors that did not change.

    Raises:
        ValueError: naming the file, and the arguments or tensors in which the models differ.
    """
    trained = load_gpt2(path) if Path(path).is_dir() else LanguageModule.load(path)
    other = [name for name in SHARED if _size(trained, name) != _size(module, name)]
    if other:
        other = [f"{name}={_size(trained, name)!r}" for name in other]
        raise ValueError(f"the weights of {path} do not fit this model, but one with {', '.join(other)}")
    for before, after in zip(trained.model.attentions, module.model.attentions, strict=False):
        if not (hasattr(before, "rope") and hasattr(after, "rope")):
            continue
        for name, usual in POSITIONS.items():
            value = getattr(before, name, usual)
            if getattr(after, name, usual) != value:
                raise ValueError(
                    f"the weights of {path} do not fit this model's attention, but one with {name}={value}"
                )
    weights, own = trained.state_dict(), module.state_dict()
    surplus = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    if surplus:
        shown = ", ".join(surplus[:3]) + (f" and {len(surplus) - 3} others" if len(surplus) > 3 else "")
        raise ValueError(f"the weights of {path} do not fit this model's attention: it has no place for {shown}")
    module.initial_weights = name_and_digest(path)
    return module.load_state_dict(weights, strict=False).missing_keys


def name_and_digest(path: str | Path) -> str:
    """The name of a checkpoint or of a GPT-2's folder, with a digest of the bytes: `start.ckpt (1a2b3c4d)`."""
    path = Path(path).absolute()
    found = hashlib.sha256()
    for file in [path / name for name in GPT2_FILES] if path.is_dir() else [path]:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{path.name} ({found.hexdigest()[:8]})"


def _size(module: LanguageModule, name: str) -> Any:
    value = module.hparams[name]
    if name == "ff_dim" and value is None:
        return default_ff_dim(module.hparams["hidden_dim"], module.hparams["ff_activation"])
    return value


GPT2_FILES = ("config.json", "model.safetensors")
#: Values of config.json, if it has these keys, with which the equations are those of GPT-2.
GPT2 = {
    "activation_function": "gelu_new",
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
OUTSIDE = {
    "wte.weight": "embedding.weight",
    "wpe.weight": "positions.weight",
    "ln_f.weight": "norm.weight",
    "ln_f.bias": "norm.bias",
}
INSIDE = (  # a layer: name in GPT-2, 0 for the attention's branch or 1 for the feed-forward network's, name here
    ("ln_1", 0, "norm"),
    ("attn.c_attn", 0, "inner.qkv"),
    ("attn.c_proj", 0, "inner.out"),
    ("ln_2", 1, "norm"),
    ("mlp.c_fc", 1, "inner.into"),
    ("mlp.c_proj", 1, "inner.out"),
)
NOT_WEIGHTS = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # a copy of the embedding, and masks


def load_gpt2(folder: str | Path, attention: AttentionArgument = StandardAttention, **arguments: Any) -> LanguageModule:
    """The GPT-2 in a local folder as Hugging Face writes it: config.json and model.safetensors.

    Args:
        folder: with both files.
        attention: replaces its attention, with `rope=False` and `bias=True`: StandardAttention, which gives GPT-2
            itself, SlidingWindowAttention or BSBRAttention, or a `functools.partial` of one.
        arguments: the other arguments of LanguageModule: `learning_rate`, `dropout`, ...

    Raises:
        ValueError: naming the folder, if it holds anything else or is damaged.
    """
    given = AttentionSpec.of(attention)
    spec = AttentionSpec(given.cls, {**given.options, "rope": False, "bias": True})
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        sizes = _sizes(config)
        weights = _renamed(load_file(Path(folder) / "model.safetensors"), sizes["num_layers"])
        with torch.device("meta"):  # a wrong size is refused before memory is taken for it
            expected = LanguageModule(spec, **sizes, **arguments).model.state_dict()
        for name, tensor in weights.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(f"config.json makes {name} {tuple(expected[name].shape)}, not {tuple(tensor.shape)}")
    except Exception as error:  # damage can fail anywhere
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{folder} holds no GPT-2 of Hugging Face's that can be read: {reason}") from error
    module = LanguageModule(spec, **sizes, **arguments)
    module.model.load_state_dict(weights, strict=False)
    module.initial_weights = name_and_digest(folder)
    return module


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """config.json -> the sizes of a LanguageModule."""
    if config["model_type"] != "gpt2":
        raise ValueError(f"model_type is {config['model_type']!r}, not 'gpt2'")
    for name, value in GPT2.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {config[name]!r}")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["n_embd"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "ff_dim": config.get("n_inner"),
        "positions": config["n_positions"],
        "ff_activation": "gelu",
        "ff_bias": True,
    }


def _renamed(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """GPT-2's tensors under the names of `LanguageModel`, in the layout of nn.Linear: (out, in)."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if num_layers > len(tensors):
        raise ValueError(f"n_layer is {num_layers}, but there are {len(tensors)} tensors")
    names = dict(OUTSIDE)
    for i in range(num_layers):
        for theirs, branch, ours in INSIDE:
            for part in ("weight", "bias"):
                names[f"h.{i}.{theirs}.{part}"] = f"branches.{2 * i + branch}.{ours}.{part}"
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and not name.endswith(NOT_WEIGHTS)]
    if missing or unknown:
        raise ValueError(f"model.safetensors lacks {missing[0]}" if missing else f"what is {unknown[0]}?")
    return {ours: tensors[name].t() if ".c_" in name else tensors[name] for name, ours in names.items()}
