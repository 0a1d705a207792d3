"""How a certificate runs a model: what goes in, what comes out, and how it decodes."""

import inspect
from typing import Any

import torch
from torch import Generator, Tensor, nn

from bsbr_pl.attention import Attention
from bsbr_pl.foreign import output_of
from bsbr_pl.model import LanguageModel

CACHES = ("cache", "past_key_values", "cache_params", "state")  # names that transformers has given to decode states


class Vectors:
    """A module x (B, T, D) -> (B, T, D). An `Attention` also tells its edges, and decodes."""

    max_length: int | None = None
    vocab_size: int | None = None

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module, self.width = module, width
        self.attentions = [module] if isinstance(module, Attention) else []

    @property
    def edges(self) -> set[int]:
        """The lengths of windows and chunks of its attentions; empty if they have none."""
        reaches = {one.reach for one in self.attentions if one.reach is not None}
        return reaches | {one.period for one in self.attentions if one.period > 1}

    @property
    def can_decode(self) -> bool:
        return bool(self.attentions) and all(one.has_decode for one in self.attentions)

    @property
    def can_continue(self) -> bool:
        """Whether it can read many tokens after others; not all of transformers' caches can."""
        return bool(self.attentions) and self.can_decode

    def draw(self, random: Generator, batch: int, length: int) -> Tensor:
        """Random inputs (B, T, ...)."""
        first = next(self.module.parameters(), torch.zeros(0, dtype=torch.float64))
        return torch.randn(batch, length, self.width, generator=random, dtype=torch.float64).to(first)

    def text(self, random: Generator, batch: int, length: int) -> Tensor:
        """Random inputs (B, T, ...); every second one repeats the one before it."""
        return self.draw(random, batch, -(-length // 2)).repeat_interleave(2, 1)[:, :length]

    def change(self, random: Generator, x: Tensor) -> Tensor:
        """Inputs of the same shape that differ from x at every token."""
        return self.draw(random, *x.shape[:2])

    def __call__(self, x: Tensor) -> Tensor:
        return output_of(self.module, x)

    def from_leaf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A vector (1, T, D) for each token, which needs a gradient, and the output that follows from them."""
        leaf = x.clone().requires_grad_()
        return leaf, self(leaf)

    def start(self) -> Any:
        """The decode state of one text, before its first token."""
        return self.attentions[0].init_state(1)

    def resume(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The output of x (1, T, ...) after the tokens of `state` (None: no tokens), and the state after them."""
        return self.attentions[0].prefill(x, state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The output (1, F) of one token (1, ...) after `state`, and the state after it."""
        return self.attentions[0].step(x, state)


class Tokens(Vectors):
    """A language model ids (B, T) -> logits (B, T, V), or a Hugging Face output with them, which decodes with a cache.

    Args:
        module: with an `nn.Embedding` for its `vocab_size` ids.
        vocab_size: number of token ids V; None: as its configuration says.

    Raises:
        ValueError: the vocabulary is unknown, or there is no embedding of its size.
    """

    def __init__(self, module: nn.Module, vocab_size: int | None = None) -> None:
        config = getattr(module, "config", None)
        self.vocab_size = vocab_size or getattr(config, "vocab_size", None) or getattr(module, "vocab_size", None)
        if self.vocab_size is None:
            name = type(module).__name__
            raise ValueError(f"give hidden_dim if {name} maps (B, T, D) to (B, T, D), or vocab_size if it reads ids")
        self.max_length = getattr(config, "max_position_embeddings", None)
        embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        found = next((part for part in embeddings if part.num_embeddings >= self.vocab_size), None)
        if found is None:
            raise ValueError(f"{type(module).__name__} has no nn.Embedding for vocab_size={self.vocab_size} ids")
        self.embedding = found
        super().__init__(module, found.embedding_dim)

    @property
    def can_decode(self) -> bool:
        return super().can_decode or "use_cache" in inspect.signature(self.module.forward).parameters

    def draw(self, random: Generator, batch: int, length: int) -> Tensor:
        ids = torch.randint(self.vocab_size or 1, (batch, length), generator=random)
        return ids.to(self.embedding.weight.device)

    def text(self, random: Generator, batch: int, length: int) -> Tensor:
        """Random ids, each twice in a row; otherwise no id occurs again before all others have."""
        V, count = self.vocab_size or 1, -(-length // 2)
        rows = [torch.cat([torch.randperm(V, generator=random) for _ in range(0, count, V)]) for _ in range(batch)]
        ids = torch.stack(rows)[:, :count].repeat_interleave(2, 1)[:, :length]
        return ids.to(self.embedding.weight.device)

    def change(self, random: Generator, x: Tensor) -> Tensor:
        V = self.vocab_size or 1
        others = torch.randint(max(1, V - 1), x.shape, generator=random).to(x.device)
        return (x + 1 + others) % V  # never the same id

    def from_leaf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedded: list[Tensor] = []

        def detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = self.embedding.register_forward_hook(detach)
        try:
            output = self(x)
        finally:
            hook.remove()
        return embedded[0], output

    def start(self) -> Any:
        return None

    def resume(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = self.module(x, use_cache=True, **(state or {}))  # changes the cache in place
        return output.logits, {name: output[name] for name in output if name in CACHES}

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.resume(x[:, None], state)
        return logits[:, -1], state


class OwnModel(Tokens):
    """A `LanguageModel`."""

    module: LanguageModel

    def __init__(self, module: LanguageModel) -> None:
        super().__init__(module)
        self.max_length, self.attentions = module.max_length, module.attentions

    def start(self) -> Any:
        return self.module.init_state(1)

    def resume(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self.module.decode(x, state)
        return self.module.head(hidden), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module.step(x, state)


def probe(module: nn.Module, hidden_dim: int | None = None, vocab_size: int | None = None) -> Vectors:
    """The way to run a module: on token ids if `vocab_size` is given or `hidden_dim` is not, else on vectors."""
    if isinstance(module, LanguageModel):
        return OwnModel(module)
    if hidden_dim is None or vocab_size is not None:
        return Tokens(module, vocab_size)
    return Vectors(module, hidden_dim)
