"""Sampling a token from logits, and the reason why logits cannot be sampled."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .branches import Residual


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token of each row: logits (B, vocab_size) -> ids (B,). See `LanguageModel.generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k)  # by index: logits in bf16 are often equal, and exactly top_k must stay
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    below_best = logits.double() - logits.amax(-1, keepdim=True)  # the best stays 0 at any temperature
    return torch.multinomial((below_best / temperature).softmax(-1).float(), 1, generator=generator)[:, 0]


def explain_not_finite(
    x: Tensor, branches: Sequence[Residual], norm: nn.Module, head: Callable[[Tensor], Tensor]
) -> str:
    """Names the first layer whose output for embeddings x (B, T, D) is not finite, and the first such token."""
    layers: dict[str, Callable[[Tensor], Tensor]] = {"embedding": nn.Identity()}
    layers |= {f"branches.{i} ({type(branch.inner).__name__})": branch for i, branch in enumerate(branches)}
    for name, layer in (layers | {"norm": norm, "head": head}).items():
        x = layer(x)
        failed = ~x.isfinite().all(-1)  # (B, T)
        if failed.any():
            text, token = failed.nonzero()[0].tolist()
            where = f"the output of {name} is not finite at token {token} of text {text}"
            return f"cannot sample: {where}; load other weights, or use a higher precision"
    return "cannot sample: `step` of an attention gives numbers that are not finite, and `forward` does not"
