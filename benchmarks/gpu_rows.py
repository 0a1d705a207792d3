"""Which rows benchmarks/gpu.py measures, and the setting in which a row is measured."""

from dataclasses import dataclass

import torch

from bsbr_pl.attention import ARCHITECTURES

MODEL = {"vocab_size": 16_384, "hidden_dim": 768, "num_layers": 12, "num_heads": 12}
TOY_MODEL = {"vocab_size": 64, "hidden_dim": 32, "num_layers": 2, "num_heads": 2}
BATCHES = {4096: 8, 16_384: 2, 32_768: 1}  # tokens -> sequences of a training step
FLA = ("linear", "delta_net")  # last, because their tuning takes longer than all other rows
EFFICIENT = ("sliding_window", "bsbr", "linear", "gau", "delta_net", "gated_delta_net")
COMPILED = ("bsbr", "linear", "gau", "delta_net", "gated_delta_net")
SLOW_TO_COMPILE = ("log_linear",)  # more than a minute a layer
OTHERS = tuple(name for name in ARCHITECTURES if name not in (*EFFICIENT, "standard", "hopfield"))


@dataclass(frozen=True)
class Row:
    """One measurement. Its key names it in gpu.jsonl."""

    kind: str  # peak, law, operation, step, decode
    name: str
    tokens: int = 0
    heads: int = 0
    width: int = 0
    dtype: str = "bfloat16"
    form: str = "eager"

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name} {self.tokens} {self.heads}x{self.width} {self.dtype} {self.form}"


@dataclass(frozen=True)
class Setting:
    """Where rows are measured: on a CUDA card at full size, or on a CPU at toy size."""

    device: str
    toy: bool = False
    flops_peak: float | None = None  # floating-point operations per second of the best matrix product

    def tokens(self, row: Row) -> int:
        return min(row.tokens, 130) if self.toy else row.tokens

    def batch(self, row: Row) -> int:
        return 1 if self.toy else BATCHES[row.tokens]

    def dtype(self, row: Row) -> torch.dtype:
        return getattr(torch, row.dtype)

    def sizes(self) -> dict[str, int]:
        return TOY_MODEL if self.toy else MODEL


def rows() -> list[Row]:
    """All rows, the most important first."""
    forms = {"sdpa": "eager", "sliding_window": "eager"} | dict.fromkeys(COMPILED, "compiled")

    def operations(tokens: int, width: int = 64) -> list[Row]:
        return [Row("operation", name, tokens, 16, width, form=form) for name, form in forms.items()]

    def steps(tokens: int, names: tuple[str, ...], form: str = "compiled") -> list[Row]:
        return [Row("step", name, tokens, form="eager" if name in SLOW_TO_COMPILE else form) for name in names]

    def law(dtype: str, form: str, names: tuple[str, ...] = (*EFFICIENT, "standard", "hopfield")) -> list[Row]:
        return [Row("law", name, 300, 2, 64, dtype, form) for name in names]

    return [
        *(Row("peak", name) for name in ("matrix product", "copy")),
        *operations(16_384),
        *law("bfloat16", "eager"),
        *steps(4096, ("standard", *EFFICIENT)),
        *operations(65_536),
        *steps(16_384, ("standard", *EFFICIENT)),
        *steps(32_768, ("standard", *EFFICIENT)),
        *operations(4096),
        *(Row("decode", name, tokens) for tokens in (1024, 65_536) for name in ("standard", *EFFICIENT)),
        *(row for tokens in BATCHES for row in steps(tokens, OTHERS)),
        *law("bfloat16", "eager", OTHERS),
        *(Row("decode", name, tokens) for tokens in (1024, 65_536) for name in OTHERS),
        *law("bfloat16", "compiled"),
        *operations(16_384, 128),
        *law("float32", "eager"),
        *law("float32", "eager", OTHERS),
        *operations(1024),
        *steps(4096, ("standard",), "compiled whole"),
        *steps(4096, ("standard", "bsbr"), "eager"),
        *steps(4096, ("hopfield",)),
        *(Row("operation", name, 16_384, 16, 64, form="eager") for name in ("bsbr", "linear", "gau", "delta_net")),
        Row("operation", "bsbr top-k 8", 16_384, 16, 64, form="compiled"),
        *operations(4096, 128),
        *operations(65_536, 128),
        *(Row("operation", name, tokens, 16, 64, form="fla") for tokens in (16_384, 65_536) for name in FLA),
    ]
