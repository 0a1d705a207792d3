"""The training step and a decoded token of a whole model."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import both_times, seconds
from gpu_rows import Row, Setting
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.compiled import CompiledHidden
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.timing import one_more_token


def step(row: Row, setting: Setting) -> dict[str, Any]:
    """Time, rate, share of the peak and peak memory of a training step."""
    model, call = training_step(row, setting)
    call()
    call()
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(call, setting, samples=5, least=0.15))
    tokens, batch = setting.tokens(row), setting.batch(row)
    found = {"ms": 1e3 * median, "batch": batch, "tokens_per_second": batch * tokens / median}
    if setting.flops_peak:
        found["share_of_peak"] = 3 * batch * model.flops(tokens) / median / setting.flops_peak
    if setting.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return found


def training_step(
    row: Row, setting: Setting, layers: int | None = None, with_head: bool = True
) -> tuple[LanguageModel, Callable[[], object]]:
    """A model, and its training step in bf16-mixed: AdamW, clipping.

    Args:
        row: what to build.
        setting: where.
        layers: number of layers, if not that of the setting.
        with_head: False leaves head and cross-entropy out, which compiles faster.
    """
    torch.manual_seed(0)
    sizes = setting.sizes() | ({"num_layers": layers} if layers and not setting.toy else {})
    with torch.device(setting.device):
        model = LanguageModel(ARCHITECTURES[row.name], **sizes)
    hidden = hidden_of(model, "eager" if setting.toy else row.form)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = random_ids(model, setting.batch(row), setting.tokens(row) + 1).to(setting.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def call() -> None:
        with torch.autocast(setting.device, torch.bfloat16):
            x = hidden(inputs)
            loss = F.cross_entropy(model.head(x).flatten(0, 1), targets) if with_head else x.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, call


def hidden_of(model: LanguageModel, form: str) -> Callable[[Tensor], Tensor]:
    """The model up to its head: eager, compiled layer by layer, or compiled whole."""
    if form == "eager":
        return model.hidden
    return torch.compile(model.hidden) if form == "compiled whole" else CompiledHidden(model)


def decode(row: Row, setting: Setting) -> dict[str, Any]:
    """Times of one token of one sequence after `row.tokens` tokens."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = LanguageModel(ARCHITECTURES[row.name], **setting.sizes())
    model.to(setting.dtype(row)).eval()
    ids = random_ids(model, 1, setting.tokens(row) + 1).to(setting.device)
    start = partial(one_more_token, model, ids)
    return both_times(start(), setting, start)


def random_ids(model: LanguageModel, batch: int, tokens: int) -> Tensor:
    """(B, T) on the CPU, the same on every device."""
    return torch.randint(model.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
