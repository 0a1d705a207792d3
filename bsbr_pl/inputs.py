"""Checks of what a language model is given: token ids and decode states."""

from typing import Any

import torch
from torch import Tensor


def check_ids(input_ids: Tensor, step: bool = False) -> None:
    """Raise a ValueError unless these are token ids (B, T), or (B,) of one `step`, at least one."""
    wanted = "(batch,) in int64, at least 1" if step else "(batch, length) in int64, both at least 1"
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be {wanted}, got a {type(input_ids).__name__}: make it a torch.tensor")
    dims = 1 if step else 2
    if input_ids.dim() != dims or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
        found = f"shape {tuple(input_ids.shape)} in {str(input_ids.dtype).removeprefix('torch.')}"
        raise ValueError(f"input_ids must be {wanted}, got {found}")


def check_states(states: list[Any], wanted: int, batch_size: int) -> None:
    """Raise a ValueError unless these are `wanted` decode states, the first a Position, after `batch_size` texts."""
    if not isinstance(states, list) or len(states) != wanted:
        found = f"{len(states)} elements" if isinstance(states, list) else f"a {type(states).__name__}"
        raise ValueError(f"states must be a list of {wanted}, a Position and the state of each attention, got {found}")
    for part in (part for state in states[1:] for part in state if isinstance(part, Tensor)):
        if part.dim() and len(part) != batch_size:
            raise ValueError(f"input_ids must continue the {len(part)} texts of states, got {batch_size}")
