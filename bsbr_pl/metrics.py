"""Loss, accuracy and bits per byte of predicted tokens: every reported figure is a ratio of the sums made here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100  # a target that is not counted


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every token, -ln p(target): logits (B, T, vocab_size) and targets (B, T) -> (B, T) in float64.

    0 where the target is -100, which is not counted. Sums of these are what every reported loss is made of.
    """
    nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.double().view_as(targets)


def token_figures(nats: Tensor, tokens: Tensor, correct: Tensor, num_bytes: Tensor) -> dict[str, Tensor]:
    """What sums over counted tokens come to; see `TokenMetrics`."""
    loss = nats / tokens
    figures = {"loss": loss, "perplexity": loss.exp(), "accuracy": correct / tokens}
    if num_bytes > 0:
        figures["bits_per_byte"] = nats / math.log(2) / num_bytes
    return figures


class StepLoss:
    """The loss of an optimiser step: the mean over the counted tokens of all its accumulated batches.

    Lightning divides each batch's loss by `accumulate_grad_batches` and adds the gradients up. That is the step's mean
    only for full steps of batches that count equally many tokens; `weighted` and `correction` make it so for any.
    Every process must count as many tokens as the others. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self.samples = self.positions = 0  # of the batches so far, counted or not
        self._losses: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def weighted(self, loss: Tensor, targets: Tensor) -> Tensor:
        """What to differentiate for a batch with targets (B, T), of whose counted tokens `loss` is the mean."""
        self.samples += len(targets)
        self.positions += targets.numel()
        self._losses.append(loss.detach())
        self._tokens.append((targets != IGNORED).sum())
        return loss if len(self._tokens) == 1 else loss * (self._tokens[-1] / self._tokens[0])

    def correction(self, accumulate: int) -> Tensor:
        """The number () that makes the summed gradients those of the mean: 1 for a full step of equal batches."""
        return self._tokens[0] * accumulate / torch.stack(self._tokens).sum()

    def mean(self) -> Tensor:
        """The loss () of the step."""
        if len(self._losses) == 1:
            return self._losses[0]
        tokens = torch.stack(self._tokens)
        return (torch.stack(self._losses) * tokens).sum() / tokens.sum()


class TokenMetrics(Metric):
    """Sums over counted tokens, from which every validation figure follows; exact whatever the batches or processes.

    `compute` gives `loss` (nats a token), `perplexity` (exp loss), `accuracy` (share of tokens whose likeliest guess is
    right) and, where bytes were counted, `bits_per_byte` (nats in all / ln 2 / bytes in all).
    """

    full_state_update = False
    nats: Tensor
    correct: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "correct", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, num_bytes: Tensor | None = None) -> None:
        """logits (B, T, vocab_size), targets (B, T) with -100 where not counted, num_bytes (B,) of text they cover."""
        self.nats += token_nats(logits, targets).sum()
        self.correct += (logits.argmax(-1) == targets).sum()
        self.tokens += (targets != IGNORED).sum()
        if num_bytes is not None:
            self.bytes += num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        return token_figures(self.nats, self.tokens, self.correct, self.bytes)
