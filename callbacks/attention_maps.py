"""AttentionMaps: the exact attention map of every layer and head on one fixed sequence, as pictures and numbers."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bsbr_pl.attention import Attention
from bsbr_pl.attention.parts import check_positive, to_chunks
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.visualization import attention_inputs, map_statistics, maps_image

from .step_windows import log


class AttentionMaps(Callback):
    """Logs the maps of the first validation sequence every `every_n_steps` optimiser steps, and at the end.

        attention/maps        picture: a row per layer, a column per head (TensorBoard only)
        attention/chunk_map   picture: the largest weight that a token of each chunk gives each earlier chunk, if the
                              architecture routes chunks
        attention/NAME/layerI   with NAME as in `bsbr_pl.utils.visualization.map_statistics`; `outside_share` is the
                                weight on tokens that a query does not see exactly (`Attention.sees_exactly`), absent
                                if the architecture has no `reach`

    An architecture without a map (BSBR with compressed states) is named once and skipped. Only the first process logs.
    On a CPU, equal `every_n_steps` and `val_check_interval` keep its work out of `step/data_seconds`.

    Args:
        every_n_steps: optimiser steps between two logs.
        max_length: tokens of the sequence, from its start; up to 32 are written beside the maps.

    Raises:
        ValueError: if either is below 1.
    """

    def __init__(self, every_n_steps: int = 300, max_length: int = 512) -> None:
        check_positive(every_n_steps=every_n_steps, max_length=max_length)
        self.every_n_steps = every_n_steps
        self.max_length = max_length
        self._probe: Tensor | None = None
        self._tokens: list[str] | None = None
        self._skipped: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked = trainer.global_step
        if trainer.is_global_zero:
            self._probe = _first_validation_sequence(trainer, self.max_length)
            if self._probe is None:
                rank_zero_info("AttentionMaps logs nothing: there is no validation set")
            else:
                tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
                ids = self._probe[0].tolist()
                self._tokens = [tokenizer.decode([i]) for i in ids] if tokenizer else [str(i) for i in ids]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._looked and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._looked:
            self._look(trainer, pl_module)

    @torch.no_grad()
    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked = trainer.global_step
        assert isinstance(pl_module, LanguageModule)
        model = pl_module.whole_model()
        if self._probe is None:
            return
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            self._show(trainer, attention_inputs(model, self._probe.to(pl_module.device)))
        finally:
            for module, training in modes:
                module.training = training

    def _show(self, trainer: Trainer, layers: list[tuple[Attention, Tensor]]) -> None:
        assert self._probe is not None
        maps, chunk_maps, metrics = {}, {}, {}
        for i, (attention, x) in enumerate(layers):
            if attention.routes_chunks and x.shape[1] > attention.period:
                chunk_maps[i] = to_chunks(attention.chunk_map(x)[0], attention.period, dim=1).amax(2)
            if not attention.has_map:
                name = type(attention).__name__
                if name not in self._skipped:
                    rank_zero_info(f"AttentionMaps skips {name}: with these options it has no attention map")
                self._skipped.add(name)
                continue
            maps[i] = attention.attention_map(x)[0]
            exact = None if attention.reach is None else attention.sees_exactly(x.shape[1])
            for name, value in map_statistics(maps[i], self._probe[0], exact).items():
                metrics[f"attention/{name}/layer{i}"] = value
        if metrics:
            log(trainer, metrics)
        pictures = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for tag, drawn, name in (("maps", maps, "token"), ("chunk_map", chunk_maps, "chunk")):
            if drawn and pictures:
                image = maps_image(drawn, self._tokens if tag == "maps" else None, name)
                for logger in pictures:
                    step = trainer.global_step - 1
                    logger.experiment.add_image(f"attention/{tag}", image, step, dataformats="HWC")


def _first_validation_sequence(trainer: Trainer, max_length: int) -> Tensor | None:
    """Ids (1, T) of the first validation sequence. No loader in use advances, and no random number is drawn."""
    data = getattr(trainer, "datamodule", None)
    loader = data.val_dataloader() if data is not None else trainer.val_dataloaders
    if isinstance(loader, list | tuple):
        loader = loader[0] if loader else None
    if loader is None:
        return None
    with torch.random.fork_rng(devices=[]):  # a plain DataLoader draws a seed whenever it is iterated
        batch = next(iter(loader))
    return batch["input_ids"][:1, :max_length].clone()
