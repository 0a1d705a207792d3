"""Recall on real text: which tokens could have been copied from earlier in the same context (Arora et al. 2023)."""

import torch
from torch import Tensor

from .loader import IGNORED


def associative_recall_hits(input_ids: Tensor, targets: Tensor) -> Tensor:
    """How far back the same bigram (input_ids[t], targets[t]) was last seen in the same row; 0 where it was not.

    A token is a hit if its bigram with the token before it has already occurred in the context: what follows is then
    there to be looked up. Ignored targets (-100) are no hits and make none.

    Args:
        input_ids, targets: (B, T) int64, targets[t] being the token after input_ids[t]

    Returns:
        distance (B, T) int64: t minus the position of the latest earlier occurrence, or 0
    """
    position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    bigram = input_ids * (targets.max().clamp(min=0) + 1) + targets
    # Positions that are ignored get a code of their own each, below all bigrams.
    bigram = torch.where(targets == IGNORED, -1 - position, bigram)
    # Equal bigrams become neighbours, in the order of their positions.
    ordered, order = bigram.sort(dim=1, stable=True)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    distance = torch.zeros_like(input_ids)
    return distance.scatter(1, order[:, 1:], (order[:, 1:] - order[:, :-1]) * repeated)
