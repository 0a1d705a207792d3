"""Loss, accuracy and bits per byte of predicted tokens. Every reported value is a ratio of sums computed here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100  # a target that is not counted


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every token, -ln p(target): logits (B, T, vocab_size) and targets (B, T) -> (B, T) in float64.

    It is 0 where the target is -100, which is not counted. Every reported loss is a sum of these.
    """
    nats = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.double().view_as(targets)


def token_metrics(nats: Tensor, tokens: Tensor, correct: Tensor, num_bytes: Tensor) -> dict[str, Tensor]:
    """The metrics from sums over counted tokens; see `TokenMetrics`."""
    loss = nats / tokens
    metrics = {"loss": loss, "perplexity": loss.exp(), "accuracy": correct / tokens}
    if num_bytes > 0:
        metrics["bits_per_byte"] = nats / math.log(2) / num_bytes
    return metrics


class StepLoss:
    """The loss of an optimiser step: the mean over the counted tokens of all its accumulated batches.

    Lightning divides each batch's loss by `accumulate_grad_batches` and sums the gradients. That is the step's mean
    only if the step is full and all its batches count equally many tokens; `weighted` and `correction` make it the mean
    in every case. All processes must count equally many tokens. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self.samples = self.positions = 0  # of the batches so far, counted or not
        self._losses: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def weighted(self, loss: Tensor, targets: Tensor) -> Tensor:
        """The loss () to differentiate for a batch with targets (B, T), where `loss` is the mean over its tokens."""
        self.samples += len(targets)
        self.positions += targets.numel()
        self._losses.append(loss.detach())
        self._tokens.append((targets != IGNORED).sum())
        return loss if len(self._tokens) == 1 else loss * (self._tokens[-1] / self._tokens[0])

    def correction(self, accumulate: int) -> Tensor:
        """The factor () that turns the summed gradients into those of the mean: 1 for a full step of equal batches."""
        return self._tokens[0] * accumulate / torch.stack(self._tokens).sum()

    def mean(self) -> Tensor:
        """The loss () of the step."""
        if len(self._losses) == 1:
            return self._losses[0]
        tokens = torch.stack(self._tokens)
        return (torch.stack(self._losses) * tokens).sum() / tokens.sum()


class TokenMetrics(Metric):
    """Sums over counted tokens; the metrics of a validation do not depend on its batches or processes.

    `compute` gives `loss` (nats per token), `perplexity` (exp loss), `accuracy` (share of tokens predicted correctly)
    and, if bytes were counted, `bits_per_byte` (total nats / ln 2 / total bytes).
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
        return token_metrics(self.nats, self.tokens, self.correct, self.bytes)
