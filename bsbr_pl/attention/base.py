"""The contract that every attention architecture keeps.

Shape legend, used in every file of this folder:

    B  batch        T  tokens            D  hidden width (`hidden_dim`)
    H  heads        K  key width of a head    V  value width of a head
    C  tokens in a chunk (or window)     N  chunks

A formula is that of one head. q_t, k_t and v_t are linear maps of the input x_t, and the last linear map (`out`) turns
the o_t of all heads into the output. The vectors of a token are rows: q_t S is a row times a matrix, and k_t^T v_t is
an outer product (K x V). In formulas of a chunk, Q, K, V and U are matrices with one row for each token, and exp(g) Q
multiplies row t of Q by exp(g_t): by the number, or by element if g_t is a row. Signs: q . k is a dot product, A * B a
product by element, tril(A, -1) the part of A below its diagonal.
"""

from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from .parts import ShortConvolution, check_positive, window_mask

State = TypeVar("State", bound=tuple[Any, ...])


class Attention(nn.Module, Generic[State]):
    """A causal sequence mixer (B, T, D) -> (B, T, D): output t depends only on inputs up to t.

    An architecture computes its output in four ways. One test checks that they give the same outputs and gradients,
    for every n:

        emit(attention_map(x) @ values(x), x)               the definition, as plain as it can be written
        forward(x)                                          the fast form, used in training
        prefill(x[:, :n]), then prefill(x[:, n:], state)    the fast form, in parts
        step, step, step, ...                               one token at a time

    Args:
        hidden_dim: width D of the input and the output.
        num_heads: number of heads H.
        head_dim: width K of a head; D / H if None, and then H must divide D.

    Raises:
        ValueError: if one of them is not positive, or if H must divide D and does not.
    """

    #: True if the layer includes the work of a feed-forward network (GAU).
    replaces_feed_forward: ClassVar[bool] = False
    #: True if the architecture chooses among earlier chunks; the weights of its choice are `chunk_map`.
    routes_chunks: ClassVar[bool] = False
    #: True if LanguageModel leaves the initial values as the constructor set them; `out` is not needed then.
    initializes_itself: ClassVar[bool] = False
    #: The last linear map, back to the hidden width. LanguageModel sets the initial values of all linear maps.
    out: nn.Linear

    def __init__(self, hidden_dim: int, num_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        check_positive(hidden_dim=hidden_dim, num_heads=num_heads)
        if head_dim is None:
            if hidden_dim % num_heads:
                raise ValueError(f"hidden_dim must be a multiple of num_heads, got {hidden_dim} and {num_heads}")
            head_dim = hidden_dim // num_heads
        check_positive(head_dim=head_dim)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = head_dim

    # Facts about the architecture.

    @property
    def reach(self) -> int | None:
        """How many of the last tokens, itself included, a query sees exactly, at most; sinks are not counted.

        None means no bound: distance changes nothing in how a token is seen, be it exactly (softmax attention) or
        through a state of fixed size (linear attention).
        """
        return None

    @property
    def period(self) -> int:
        """After how many tokens the computation starts a new chunk, where the decode state may change form; 1 without
        chunks."""
        return 1

    @property
    def has_map(self) -> bool:
        """Whether `attention_map` exists."""
        return type(self).attention_map is not Attention.attention_map

    @property
    def has_decode(self) -> bool:
        """Whether `init_state`, `step` and `prefill` from a state exist."""
        return type(self).step is not Attention.step

    @property
    def has_kernel(self) -> bool:
        """Whether `kernels.py` has a form of this layer for CUDA in low precision."""
        return False

    def sees_exactly(self, num_tokens: int) -> Tensor:
        """Bool (T, T), on the device of the parameters: True at [t, j] if query t sees token j exactly."""
        return window_mask(num_tokens, self.reach, self._device)

    # The definition.

    def attention_map(self, x: Tensor) -> Tensor:
        """The definition: x (B, T, D) -> the exact matrix A (B, H, T, T), where A @ values(x) are the mixed values.

        An entry is exactly 0 where t cannot see j. Entries may be negative if the architecture is not a softmax.
        """
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """The values that the map mixes: x (B, T, D) -> (B, H, T, V)."""
        raise NotImplementedError

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output (B, T, D) from mixed values (B, H, T, V) and, for a gate, x (B, T, D)."""
        raise NotImplementedError

    def chunk_map(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> weights (B, H, T, N) of each token over the chunks before its own, where `routes_chunks`."""
        raise NotImplementedError

    # The fast form, and decoding.

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The fast form: x (B, T, D) -> output (B, T, D) and the state after its last token.

        With a `state`, x continues the tokens that the state was made of. T may be 0.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The output of the fast form: (B, T, D) -> (B, T, D)."""
        return self.prefill(x)[0]

    def init_state(self, batch_size: int) -> State:
        """The decode state before the first token, on the device and in the dtype of the parameters.

        The first axis of its tensors is B. No call changes a state that it is given: a state may be continued twice.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x (B, D) and the state before it -> output (B, D) and the state after it."""
        raise NotImplementedError

    # Costs.

    def state_size(self, num_tokens: int) -> int:
        """How many numbers the decode state of one sequence holds after `num_tokens` tokens (T)."""
        raise NotImplementedError

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of `forward` on one sequence of `num_tokens` tokens (T).

        A multiply-add is 2. Matrix products, convolutions and triangular solves are counted as executed, including
        the padding of the last chunk. A causal `scaled_dot_product_attention` counts its lower triangle, because its
        kernels skip the rest. Elementwise work and softmax are not counted.
        """
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _zeros(self, *shape: int) -> Tensor:
        """Zeros on the device and in the dtype of the parameters."""
        return next(self.parameters()).new_zeros(shape)


def num_weights(*maps: nn.Linear | ShortConvolution | None) -> int:
    """How many weights the maps have, biases not counted: their multiply-adds for one token. None stands for no map."""
    return sum(part.weight.numel() for part in maps if part is not None)
