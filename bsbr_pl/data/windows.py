"""Windows of tokens of prepared text."""

import numpy as np
import torch

from .base import IGNORED, Batch, cut
from .corpus import Corpus


class Windows:
    """Windows of `context_length` tokens of one split. A sample's id is the offset of its first token.

    Raises:
        ValueError: the split holds no text, or a training split is shorter than a window.
    """

    def __init__(self, corpus: Corpus, split: str, context_length: int, seed: int) -> None:
        self.corpus, self.split, self.context_length, self.seed = corpus, split, context_length, seed
        self.length = len(corpus.tokens(split))
        if self.length < 2:
            without = "; or train without validation, with --trainer.limit_val_batches=0" if split == "val" else ""
            raise ValueError(
                f"the {split} split of source={corpus.meta['name']!r} is empty: give a larger {split}_fraction or more "
                f"documents, or name its {split}_split{without}"
            )

    def __getitem__(self, ids: np.ndarray) -> Batch:
        """input_ids, targets (B, T); num_bytes, index (B,). Positions behind the end of the stream are not counted."""
        tokens, size = self.corpus.tokens(self.split), self.corpus.tokenizer.token_bytes
        rows = np.full((len(ids), self.context_length + 1), IGNORED, np.int64)
        for row, start in zip(rows, ids, strict=True):
            piece = tokens[start : start + self.context_length + 1]
            row[: len(piece)] = piece
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        counted = targets != IGNORED
        inputs[inputs == IGNORED] = self.corpus.tokenizer.eos_id
        return {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "num_bytes": torch.from_numpy(np.where(counted, size[targets * counted], 0).sum(1)),
            "index": torch.from_numpy(ids.astype(np.int64)),
        }

    def train_batches(self, batch_size: int, epoch: int) -> np.ndarray:
        """(steps, batch_size) offsets of windows that do not overlap, in random order.

        Each epoch starts at another token. The number of steps is the same in every epoch.

        Raises:
            ValueError: the split has fewer windows than one batch.
        """
        count = max(self.length // self.context_length - 1, int(self.length > self.context_length))
        if count < batch_size:
            raise ValueError(
                f"context_length={self.context_length} leaves {count} windows of the {self.length} training tokens, "
                f"fewer than one batch of {batch_size} (batch_size times processes): lower either, or use more text"
            )
        random = np.random.default_rng([self.seed, epoch])
        shift = random.integers(min(self.context_length, self.length - count * self.context_length))
        offsets = shift + self.context_length * random.permutation(count)
        return offsets[: count // batch_size * batch_size].reshape(-1, batch_size)

    def eval_batches(self, batch_size: int) -> list[np.ndarray]:
        """Offsets of windows side by side, in order: every token but the first EOS is the target of one window."""
        return cut(np.arange(0, self.length - 1, self.context_length), batch_size)
