"""LanguageModule: the LightningModule around any attention, and the only loader of its checkpoints."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import steps
from .attention.base import Attention
from .checkpoint import load_checkpoint
from .compiled import CompiledHidden, Hidden, check_compiler
from .limits import check_training, check_weights
from .metrics import IGNORED, StepLoss, TokenMetrics
from .model import LanguageModel
from .models import all_sizes
from .optimizer import adamw, check_optimization, set_arguments, share_of_learning_rate
from .resume import ResumableModule
from .spec import plain_specs, specs_of
from .values import plain


class _FSDP2(ModelParallelStrategy):
    """Checks a checkpoint before the strategy loads it with its own reader."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        load_checkpoint(checkpoint_path)
        return super().load_checkpoint(checkpoint_path, weights_only)


# `--trainer.strategy=fsdp2` saves a checkpoint as one file, like every other strategy, not as a folder with a part of
# each process.
StrategyRegistry.register("fsdp2", _FSDP2, override=True, save_distributed_checkpoint=False)


class LanguageModule(ResumableModule):
    """Trains a `LanguageModel`: cross entropy, AdamW, warm-up and cosine by step.

    Args:
        attention: the architecture, as an Attention class, a `functools.partial` of one, a registry key, or a list with
            one a layer; in YAML `class_path` and `init_args`.
        vocab_size: number of token ids; the command line takes it from the data.
        learning_rate: of AdamW, at its highest.
        min_learning_rate: share of `learning_rate` that is left at the last step.
        warmup_steps: optimiser steps over which the learning rate rises from 0.
        weight_decay: of the matrices of linear maps; embeddings, gains, filters and biases are not decayed.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        compile: train through `torch.compile`, which takes up to a minute to start, after its gradients were compared
            with the model's own on the first batch. `auto` compiles on CUDA and trains without it where that fails.
            Evaluation, decoding and counting use the model as it is.
        sizes: the other arguments of `LanguageModel`: hidden_dim, num_layers, ...

    Raises:
        TypeError: a size that LanguageModel does not have; lists those it has.
        ValueError: names the argument, its value and what would do.
    """

    metrics: dict[str, TokenMetrics]  # by stage
    loop: steps.StepLoop  # of the Trainer that fits the module
    slices: dict[str, TokenMetrics]  # by stage and number of the slice: names may hold what a module's may not

    def __init__(
        self,
        attention: tuple[Callable[[int, int], Attention], ...] | Callable[[int, int], Attention],
        vocab_size: int,
        *,
        learning_rate: float = 3e-3,
        min_learning_rate: float = 0.0,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        compile: bool | Literal["auto"] = "auto",
        **sizes: Any,
    ) -> None:
        own = {name: plain(value) for name, value in locals().items() if name in OWN_ARGUMENTS}
        super().__init__()
        check_optimization(learning_rate, min_learning_rate, warmup_steps, weight_decay, beta1, beta2)
        if not (isinstance(compile, bool) or compile == "auto"):
            raise ValueError(f"compile must be true, false or auto, got {compile!r}")
        model_arguments = all_sizes(type(self).__name__, vocab_size=vocab_size, **sizes)
        self.save_hyperparameters({"attention": plain_specs(attention), **model_arguments, **own})
        check_weights(attention, model_arguments)
        self.model = LanguageModel(specs_of(attention), vocab_size, **sizes)
        self.metrics = torch.nn.ModuleDict({"val": TokenMetrics(), "test": TokenMetrics()})  # type: ignore[assignment]
        self.slices = torch.nn.ModuleDict()  # type: ignore[assignment]
        self.compiled: CompiledHidden | None = None  # `model.hidden`, while it is trained
        self._step_loss = StepLoss()  # of the current step
        self._scheduler: LambdaLR | None = None  # a subclass may have other optimisers

    @classmethod
    def load(cls, path: str | Path) -> "LanguageModule":
        """The trained module of a checkpoint, in evaluation mode. Code in a checkpoint is never run.

        Raises:
            ValueError: naming the file, where it is missing, damaged or no checkpoint of this class.
        """
        return cls.open(path)[0]

    @classmethod
    def open(cls, path: str | Path) -> tuple["LanguageModule", dict[str, Any]]:
        """The module as `load` gives it, and the content of the checkpoint, on the CPU."""
        checkpoint = load_checkpoint(path)
        try:
            hyper_parameters, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
            if hyper_parameters["num_layers"] > len(weights):
                raise ValueError(f"{hyper_parameters['num_layers']} layers, but {len(weights)} tensors")
            with torch.device("meta"):  # weights of a wrong size are refused before memory is taken for them
                cls(**hyper_parameters).load_state_dict(weights, assign=True)
            module = cls(**hyper_parameters)
            module.load_state_dict(weights)
            module.initial_weights = checkpoint.get("initial_weights")
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint of {cls.__name__}: {error}") from error
        return module.eval(), checkpoint

    def configure_model(self) -> None:
        """With the strategy `fsdp2`, shard the weights over all processes: each layer by itself, then the rest."""
        if self.device_mesh is None or self.is_sharded:
            return
        mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
        for module in (*self.model.branches, self.model):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(self.model, "hidden")  # leaves the embedding whole for `head`, until the backward

    def whole_model(self) -> LanguageModel:
        """The model with all its weights: a copy if they are sharded, for which every process must call this."""
        if not self.is_sharded:
            return self.model
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            copy = type(self)(**self.hparams).model
        copy.load_state_dict(weights, assign=True)
        return copy

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, vocab_size)."""
        return self.model(input_ids)

    def on_fit_start(self) -> None:
        self.loop = steps.StepLoop(self.trainer)
        if self.device.type == "cpu" and not self.is_sharded:
            check_training(self.model)
        if self.dropout_seed is None:
            self.dropout_seed = torch.initial_seed()
        wanted = self.hparams["compile"]
        if wanted is True or (wanted == "auto" and self.device.type == "cuda" and not self.is_sharded):
            check_compiler(self.device)
            self.compiled = CompiledHidden(self.model)

    def on_fit_end(self) -> None:
        self.compiled = None
        self.loop.restore()

    def on_train_start(self) -> None:
        """The optimiser works with this run's arguments, not with those that its checkpoint was saved with."""
        self._step_loss = StepLoss()
        self.loop.start(self.validated)
        step = self.trainer.global_step
        for change in self.changes:
            if change["step"] == step:
                rank_zero_info("From step {step} on {argument} is {after} instead of {before}".format(**change))
        if self._scheduler is None:
            return
        optimizer = self._scheduler.optimizer
        before = optimizer.param_groups[0]["lr"]
        set_arguments(optimizer, self._scheduler, self.hparams, self._share_of_learning_rate(step))
        if step and (rate := optimizer.param_groups[0]["lr"]) != before:
            rank_zero_info(f"The learning rate goes from {before:.3g} to {rate:.3g}")
        if steps.planned_steps(self.trainer) is None:
            rank_zero_info("No number of steps is asked for: the learning rate stays constant after warm-up")

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Dropout follows from seed, process, step and batch, so that a resumed run needs no random state restored."""
        self.loop.validate_after_batch(False)
        key = (self.dropout_seed, self.global_rank, self.global_step, batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))  # type: ignore[arg-type]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.compiled and not self.compiled.checked:
            self._check_compiled(batch)
        loss = self._loss_through(self.compiled or self.model.hidden, batch)
        return self._step_loss.weighted(loss, batch["targets"])

    def _loss_through(self, hidden_of: Hidden, batch: dict[str, Tensor]) -> Tensor:
        """The training loss (), with `hidden_of` in place of `model.hidden`."""
        hidden, targets = hidden_of(batch["input_ids"]), batch["targets"]
        if "slice" in batch:  # a recall task has few targets: only they need logits
            hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
        return F.cross_entropy(self.model.head(hidden).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def _check_compiled(self, batch: dict[str, Tensor]) -> None:
        """Check the compiled form on the first batch. With `compile="auto"`, train without it if it fails.

        With dropout the gradients are random, and sharded weights have no whole gradients: then the compiled form only
        has to run.
        """
        assert self.compiled is not None
        low_precision = torch.is_autocast_enabled(self.device.type) or self.dtype in (torch.bfloat16, torch.float16)
        comparable = not (self.hparams["dropout"] or self.is_sharded)
        try:
            self.compiled.check(functools.partial(self._loss_through, batch=batch), comparable, low_precision)
        except Exception as error:
            if self.hparams["compile"] != "auto":
                raise
            self.compiled = None
            reason = " ".join(str(error).split())[:300]
            rank_zero_warn(f"training goes on without torch.compile, which failed: {reason}")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient that of the step's mean loss, log the loss, and say whether a validation follows.

        Lightning would log only after the hook where checkpoints are saved, which would then lack the loss.
        """
        trainer, step = self.trainer, self._step_loss
        self.check_restored(optimizer)
        if trainer.accumulate_grad_batches > 1:
            correction = step.correction(trainer.accumulate_grad_batches)
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(correction)
        self.seen["tokens"] += step.positions * trainer.world_size
        self.seen["samples"] += step.samples * trainer.world_size
        self._log_loss(step.mean())
        self._step_loss = StepLoss()
        self.loop.validate_after_step()

    def _log_loss(self, loss: Tensor) -> None:
        trainer = self.trainer
        self.log("train/loss", loss, prog_bar=True, logger=False)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            mean: Any = trainer.strategy.reduce(loss, reduce_op="mean")
            norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            metrics = {
                "train/loss": float(mean),
                "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "train/gradient_norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
                "train/tokens": self.seen["tokens"],
            }
            for logger in self.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.restoring = False
        self.loop.end_batch(within_step=self._step_loss.samples > 0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The likeliest next token at every position: (B, T)."""
        return self.model(batch["input_ids"]).argmax(-1)

    def _evaluation_step(self, stage: str, batch: dict[str, Tensor]) -> None:
        self.restoring = False
        logits = self.model(batch["input_ids"])
        self.metrics[stage].update(logits, batch["targets"], batch.get("num_bytes"))
        if "slice" in batch:
            for i in batch["slice"].unique().tolist():
                rows = batch["slice"] == i
                key = f"{stage}_{i}"
                if key not in self.slices:
                    self.slices[key] = TokenMetrics().to(logits.device)
                self.slices[key].update(logits[rows], batch["targets"][rows])

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated = self.global_step
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.metrics[stage].compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "bits_per_byte", "accuracy"))
        self.metrics[stage].reset()
        for i, name in enumerate(getattr(self.trainer.datamodule, "slice_names", ())):  # type: ignore[attr-defined]
            if (key := f"{stage}_{i}") in self.slices:
                self.log(f"{stage}/accuracy_{name}", self.slices[key].compute()["accuracy"])
                self.slices[key].reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        fused = (
            "mixed" not in self.trainer.precision
        )  # Lightning 2.6.6 does not clip for a fused one in mixed precision
        optimizer = adamw(self, self.hparams, fused)
        self._scheduler = LambdaLR(optimizer, self._share_of_learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _share_of_learning_rate(self, step: int) -> float:
        # In a run of epochs the number of steps is known once the data is loaded: `on_train_start` asks again.
        return share_of_learning_rate(step, steps.planned_steps(self.trainer), self.hparams)


#: The arguments of LanguageModule that are not of LanguageModel.
OWN_ARGUMENTS = [p.name for p in inspect.signature(LanguageModule).parameters.values() if p.kind is p.KEYWORD_ONLY]
