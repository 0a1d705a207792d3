"""A causal language model around any attention: embedding, pre-norm residual layers, head, generation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention.base import Attention
from .attention.parts import check_choice, check_number, check_positive
from .bottleneck import Bottleneck
from .branches import NORMS, AttentionFactory, Residual, one_per_layer
from .feed_forward import ACTIVATIONS, FeedForward, default_ff_dim
from .generation import explain_not_finite, sample
from .inputs import check_ids, check_states

#: Standard deviation s of the logits at the start: the first loss is about ln(vocab_size) + s^2 / 2.
LOGIT_STD = 0.3


class Position(NamedTuple):
    tokens: int  # read so far


class LanguageModel(nn.Module):
    """Predicts the next token: ids (B, T) -> logits (B, T, vocab_size), for any T.

    A layer is an attention and a feed-forward network, or two attentions if the architecture
    `replaces_feed_forward` (GAU). Each attention encodes positions itself; `positions` adds learned embeddings.

    Args:
        attention: builds the attention of every layer, or a list with one builder per layer; a list shorter than
            `num_layers` is repeated, and must divide it.
        vocab_size: number of token ids.
        hidden_dim: width D.
        num_layers: number of layers.
        num_heads: heads of each attention.
        ff_dim: width of the feed-forward networks; 4 * hidden_dim if None (`swiglu`: 8/3 * hidden_dim), 0 for none.
        dropout: share of the outputs of each residual branch and of the embedding that training sets to 0.
        positions: number of learned positions, which is then the longest sequence; 0 for none.
        ff_activation: of the feed-forward networks, `relu2`, `gelu` or `swiglu`, which has three matrices.
        ff_bias: give the feed-forward networks' linear maps a bias.
        out_init: initial size c of the branches: the last map of each starts at N(0, c^2 / (fan_in D number of
            branches)). All branches together then add about c^2 times the variance of the embedding.
        norm: of the branches and before the head, `layer` (LayerNorm) or `rms` (RMSNorm).
        tie_embeddings: predict with the weights of the embedding; false for a head of its own.
        bottleneck: the last id is a mark, and what follows it is decoded from the mark's activation alone; see
            `Bottleneck`.

    Raises:
        ValueError: names the argument, its value and what it must be.
    """

    branches: Sequence[Residual]

    def __init__(
        self,
        attention: AttentionFactory | Sequence[AttentionFactory],
        vocab_size: int,
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        positions: int = 0,
        ff_activation: str = "relu2",
        ff_bias: bool = False,
        out_init: float = 0.5,
        norm: str = "layer",
        tie_embeddings: bool = True,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, hidden_dim=hidden_dim, num_layers=num_layers)
        check_choice(ACTIVATIONS, ff_activation=ff_activation)
        check_choice(NORMS, norm=norm)
        ff_dim = default_ff_dim(hidden_dim, ff_activation) if ff_dim is None else ff_dim
        check_number("0 (no feed-forward networks) or more", lambda width: width >= 0, whole=True, ff_dim=ff_dim)
        check_number("at least 0 and below 1", lambda share: 0 <= share < 1, dropout=dropout)
        check_number("0 (none) or more", lambda number: number >= 0, whole=True, positions=positions)
        check_number("0 (silent branches) or more", lambda size: size >= 0, out_init=out_init)
        factories = one_per_layer(attention, num_layers)
        self.vocab_size = vocab_size
        self.max_length = positions or None  # tokens that can be read
        self.embedding = nn.Embedding(vocab_size, hidden_dim)
        self.positions = nn.Embedding(positions, hidden_dim) if positions else None
        self.dropout = nn.Dropout(dropout)
        inners: list[Attention | FeedForward] = []
        for factory in factories:
            inners.append(factory(hidden_dim, num_heads))
            if not isinstance(inners[-1], Attention):
                name = type(inners[-1]).__name__
                raise TypeError(f"attention must build an Attention, not a {name}: AttentionSpec({name}) makes it one")
            if inners[-1].replaces_feed_forward:
                inners.append(factory(hidden_dim, num_heads))
            elif ff_dim:
                inners.append(FeedForward(hidden_dim, ff_dim, ff_activation, ff_bias))
        branches = [Residual(inner, NORMS[norm](hidden_dim), dropout) for inner in inners]
        self.branches = nn.ModuleList(branches)  # type: ignore[assignment]
        self.norm = NORMS[norm](hidden_dim)
        self.bottleneck = Bottleneck(hidden_dim, vocab_size - 1, NORMS[norm]) if bottleneck else None
        self.unembedding = None if tie_embeddings else nn.Linear(hidden_dim, vocab_size, bias=False)
        self._init_weights(out_init)

    @torch.no_grad()
    def _init_weights(self, out_init: float) -> None:
        """The start: a guess among all tokens, because every logit is about N(0, LOGIT_STD^2).

        Linear maps start at N(0, 1 / fan_in), for `out` see `out_init`. Embeddings start at N(0, 1 / D), so each has
        about length 1, and so do the weights of a head of its own. A head that is tied to the embeddings, with equal
        weights in the last norm, would predict every token by itself, with a logit of sqrt(D) times that weight. So the
        weights alternate between LOGIT_STD and -LOGIT_STD.
        """
        width = self.norm.weight.numel()
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.constant_(self.norm.weight, LOGIT_STD)
        self.norm.weight[1::2] *= -1
        if self.unembedding is not None:
            nn.init.normal_(self.unembedding.weight, std=width**-0.5)
        if self.positions is not None:
            nn.init.zeros_(self.positions.weight)
        for branch in self.branches:
            branch.init_weights(out_init, width * len(self.branches))

    @property
    def attentions(self) -> list[Attention]:
        """The attentions, in order of depth."""
        return [branch.inner for branch in self.branches if isinstance(branch.inner, Attention)]

    def check_length(self, num_tokens: int) -> None:
        """Raise a ValueError if there are more tokens than learned positions."""
        if self.max_length and num_tokens > self.max_length:
            raise ValueError(f"a text must have at most {self.max_length} tokens (positions), got {num_tokens}")

    def embed(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """ids (B, T) at positions start, start + 1, ... -> (B, T, D)."""
        try:
            x = self.embedding(input_ids)
        except IndexError:
            low, high = int(input_ids.min()), int(input_ids.max())
            raise ValueError(
                f"input_ids must lie in 0 ... {self.vocab_size - 1} (vocab_size), got {low} ... {high}"
            ) from None
        if self.positions is not None:
            end = start + input_ids.shape[1]
            self.check_length(end)
            x = x + self.positions.weight[start:end]
        return self.dropout(x)

    def hidden(self, input_ids: Tensor, run: Callable[[Residual, Tensor], Tensor] | None = None) -> Tensor:
        """ids (B, T) -> the last layer's normed activations (B, T, D), the input of `head`; `run` applies a branch."""
        check_ids(input_ids)
        x = self.embed(input_ids)
        for branch in self.branches:
            x = run(branch, x) if run else branch(x)
        if self.bottleneck is not None:
            x, _ = self.bottleneck(x, input_ids)
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """(..., D) -> logits (..., vocab_size)."""
        return F.linear(x, (self.unembedding or self.embedding).weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, vocab_size)."""
        return self.head(self.hidden(input_ids))

    # Decoding. The state is a list: a Position, the decode state of every attention, and that of the bottleneck.

    def init_state(self, batch_size: int) -> list[Any]:
        """The decode state before the first token."""
        states = [Position(0), *(attention.init_state(batch_size) for attention in self.attentions)]
        if self.bottleneck is not None:
            states.append(self.bottleneck.init_state(self.norm.weight.new_zeros(batch_size, self.norm.weight.numel())))
        return states

    def prefill(self, input_ids: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """ids (B, T), which continue those of `states` -> logits of the next token (B, vocab_size), and the states."""
        x, states = self.decode(input_ids, states)
        return self.head(x[:, -1]), states

    def step(self, input_ids: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token per sequence: ids (B,) -> logits of the next token (B, vocab_size), and the states."""
        check_ids(input_ids, step=True)
        check_states(states, self._num_states, len(input_ids))
        x, states = self._decode(input_ids[:, None], states, step=True)
        return self.head(x[:, 0]), states

    def decode(self, input_ids: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """`hidden` of ids (B, T), which continue those of `states`: (B, T, D), and the states after them."""
        check_ids(input_ids)
        if states is None:
            return self._decode(input_ids, [Position(0), *[None] * (self._num_states - 1)])
        check_states(states, self._num_states, len(input_ids))
        return self._decode(input_ids, states)

    @property
    def _num_states(self) -> int:
        return 1 + len(self.attentions) + (self.bottleneck is not None)

    def _decode(self, input_ids: Tensor, states: list[Any], step: bool = False) -> tuple[Tensor, list[Any]]:
        """`decode` without its checks; `step`: T is 1, and each attention continues by its `step`."""
        position, *before = states
        remaining, after = iter(before), []
        x = self.embed(input_ids, start=position.tokens)
        for branch in self.branches:
            if not isinstance(branch.inner, Attention):
                x = branch(x)
                continue
            if step:
                y, state = branch.inner.step(branch.norm(x[:, 0]), next(remaining))
                y = y[:, None]
            else:
                y, state = branch.inner.prefill(branch.norm(x), next(remaining))
            after.append(state)
            x = x + branch.dropout(y)
        if self.bottleneck is not None:
            x, state = self.bottleneck(x, input_ids, next(remaining))
            after.append(state)
        return self.norm(x), [Position(position.tokens + input_ids.shape[1]), *after]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        until: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        """Continue ids (B, T >= 1) by `max_new_tokens`: (B, T + max_new_tokens). The same seed gives the same text.

        Args:
            input_ids: the prompts.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits before sampling; 0 takes the most likely token.
            top_k: sample among this many most likely tokens; None for all.
            seed: of the sampling.
            until: gets the ids after each new token, (B, T + new tokens); True ends the generation.

        Raises:
            ValueError: on an empty prompt, an argument out of range, more tokens than there are positions, or logits
                that are not finite; names the first layer and token whose output is not finite.
        """
        check_ids(input_ids)
        check_number("0 or more", lambda value: value >= 0, temperature=temperature)
        check_number("an integer of 0 or more", lambda n: n >= 0, whole=True, max_new_tokens=max_new_tokens)
        check_number("an integer from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64, whole=True, seed=seed)
        if top_k is not None:
            check_positive(top_k=top_k)
        generator = torch.Generator(input_ids.device).manual_seed(seed)
        training = self.training
        self.eval()
        try:
            ids = [input_ids]
            logits, states = self.prefill(input_ids)
            self.check_length(input_ids.shape[1] + max_new_tokens - 1)  # the last token is not read
            for i in range(max_new_tokens):
                if not logits.isfinite().all():
                    x = self.embed(torch.cat(ids, 1))
                    raise ValueError(explain_not_finite(x, self.branches, self.norm, self.head))
                ids.append(sample(logits, temperature, top_k, generator)[:, None])
                if until is not None and until(torch.cat(ids, 1)):
                    break
                if i + 1 < max_new_tokens:
                    logits, states = self.step(ids[-1][:, 0], states)
        finally:
            self.train(training)
        return torch.cat(ids, 1)

    @torch.no_grad()
    def get_attention_weights(self, input_ids: Tensor) -> Tensor:
        """The exact attention map of every attention: ids (B, T) -> (layers, B, H, T, T), 0 where t cannot see j.

        Raises:
            ValueError: if an attention has no map (BSBR with state compression) or the numbers of heads differ.
        """
        check_ids(input_ids)
        maps, x = [], self.embed(input_ids)
        for branch in self.branches:
            if isinstance(branch.inner, Attention):
                maps.append(branch.inner.attention_map(branch.norm(x)))
            x = branch(x)
        if len({map_.shape for map_ in maps}) > 1:
            raise ValueError("the attentions have different numbers of heads: call attention_map of each")
        return torch.stack(maps)

    # Costs, in closed form.

    def state_size(self, num_tokens: int) -> int:
        """How many numbers the decode state of one sequence holds after `num_tokens` tokens."""
        marked = self.bottleneck.state_size if self.bottleneck is not None else 0
        return marked + sum(attention.state_size(num_tokens) for attention in self.attentions)

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of `forward` on one sequence; a multiply-add is 2; see `Attention.flops`."""
        head = 2 * num_tokens * self.embedding.weight.numel()
        decoder = self.bottleneck.flops(num_tokens) if self.bottleneck is not None else 0
        return head + decoder + sum(branch.inner.flops(num_tokens) for branch in self.branches)
