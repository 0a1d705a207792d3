"""LanguageModule: the LightningModule around any attention, and the only loader of its checkpoints."""

import functools
import inspect
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from . import steps
from .attention.base import Attention
from .attention.parts import check_number
from .checkpoint import load_checkpoint
from .compiled import check_gradients, compile_hidden
from .description import build_layers, describe_layers, plain
from .limits import check_training, check_weights
from .metrics import IGNORED, StepLoss, TokenMetrics
from .model import LanguageModel
from .run import Arguments, changed, check_resumable, describe_run, recorded, run_of

# `--trainer.strategy=fsdp2`: a checkpoint is one file, as everywhere else, not a folder with a part of each process.
StrategyRegistry.register("fsdp2", ModelParallelStrategy, override=True, save_distributed_checkpoint=False)


class LanguageModule(LightningModule):
    """Trains a `LanguageModel`: cross entropy, AdamW, warm-up and cosine by step.

    Args:
        attention: the architecture, as an Attention class, a `functools.partial` of one, or a list with one a layer;
            in YAML `class_path` and `init_args`.
        vocab_size: number of token ids; the command line takes it from the data.
        hidden_dim: width D of the model.
        num_layers: number of layers.
        num_heads: heads of each attention.
        ff_dim: width of the feed-forward networks; 4 * hidden_dim where None, 0 for none.
        dropout: share of activations set to 0 in training.
        learning_rate: of AdamW, at its highest.
        min_learning_rate: share of `learning_rate` that is left at the last step.
        warmup_steps: optimiser steps over which the learning rate rises from 0.
        weight_decay: of the matrices of linear maps; embeddings, gains, filters and biases are not decayed.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        positions: learn an embedding of each of this many positions, and read no longer text; 0 for none.
        ff_activation: of the feed-forward networks, `relu2` or `gelu`.
        ff_bias: give the feed-forward networks' linear maps a bias.
        compile: train through `torch.compile`, which takes up to a minute to start, after its gradients were compared
            with the model's own on the first batch. `auto` compiles on CUDA and trains without it where that fails.
            Evaluation, decoding and counting use the model as it is.

    Raises:
        ValueError: names the argument, its value and what would do.
    """

    metrics: dict[str, TokenMetrics]  # by stage
    slices: dict[str, TokenMetrics]  # by stage and number of the slice: names may hold what a module's may not

    def __init__(
        self,
        attention: tuple[Callable[[int, int], Attention], ...] | Callable[[int, int], Attention],
        vocab_size: int,
        hidden_dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        ff_dim: int | None = None,
        dropout: float = 0.0,
        learning_rate: float = 3e-3,
        min_learning_rate: float = 0.0,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        positions: int = 0,
        ff_activation: str = "relu2",
        ff_bias: bool = False,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        check_number("positive", lambda rate: rate > 0, learning_rate=learning_rate)
        check_number("a share from 0 to 1", lambda share: 0 <= share <= 1, min_learning_rate=min_learning_rate)
        check_number("0 or more", lambda steps: steps >= 0, whole=True, warmup_steps=warmup_steps)
        check_number("0 or more", lambda decay: decay >= 0, weight_decay=weight_decay)
        check_number("at least 0 and below 1", lambda beta: 0 <= beta < 1, beta1=beta1, beta2=beta2)
        if not (isinstance(compile, bool) or compile == "auto"):
            raise ValueError(f"compile must be true, false or auto, got {compile!r}")
        described = describe_layers(attention)
        arguments = {name: plain(value) for name, value in locals().items() if name in CONFIGURATION}
        self.save_hyperparameters({"attention": described, **arguments})
        check_weights(described, {name: v for name, v in arguments.items() if name in MODEL_ARGUMENTS})
        sizes = (vocab_size, hidden_dim, num_layers, num_heads, ff_dim, dropout, positions, ff_activation, ff_bias)
        self.model = LanguageModel(build_layers(described), *sizes)
        self.metrics = torch.nn.ModuleDict({"val": TokenMetrics(), "test": TokenMetrics()})  # type: ignore[assignment]
        self.slices = torch.nn.ModuleDict()  # type: ignore[assignment]
        self.initial_weights: str | None = None  # where they came from; `convert.start_from` says it
        self._dropout_seed: int | None = None
        self._seen = {"tokens": 0, "samples": 0}  # trained on, over all processes
        self._changes: list[dict[str, Any]] = []  # of arguments, by resumes
        self._validated: int | None = None  # the step after which it was done last
        self._step_loss = StepLoss()  # of the step under way
        self._schedule: Callable[[int], float] | None = None
        self._check_val_every_n_epoch: int | None = None
        self._stop_after_step = False
        self._compiled: Callable[[Tensor], Tensor] | None = None  # `model.hidden`, while it is trained
        self._trusted = False  # whether it was compared

    @classmethod
    def load(cls, path: str | Path, map_location: str = "cpu") -> "LanguageModule":
        """The trained module of a checkpoint, in evaluation mode. Code in a checkpoint is never run.

        Raises:
            ValueError: naming the file, where it is missing, damaged or no checkpoint of this class.
        """
        return cls.open(path, map_location)[0]

    @classmethod
    def open(cls, path: str | Path, map_location: str = "cpu") -> tuple["LanguageModule", dict[str, Any]]:
        """The module as `load` gives it, and all that the checkpoint holds."""
        checkpoint = load_checkpoint(path, map_location)
        try:
            hyper_parameters, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
            if hyper_parameters["num_layers"] > len(weights):
                raise ValueError(f"{hyper_parameters['num_layers']} layers, but {len(weights)} tensors")
            with torch.device("meta"):  # weights of a wrong size are refused before room is made for them
                cls(**hyper_parameters).load_state_dict(weights, assign=True)
            module = cls(**hyper_parameters)
            module.load_state_dict(weights)
            module.initial_weights = checkpoint.get("initial_weights")
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint of {cls.__name__}: {error}") from error
        return module.to(map_location).eval(), checkpoint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume a run: its dropout, what it has seen; refuse other arguments than its own where they are fixed.

        Raises:
            ValueError: naming the arguments that differ.
        """
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._resume(checkpoint)
        own = self.state_dict()
        weights = checkpoint.get("state_dict", own)  # fsdp2 has loaded them by itself
        if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
            saved = inspect.signature(type(self)).bind(**checkpoint["hyper_parameters"])
            saved.apply_defaults()  # an older one lacks what has been added since
            other = [f"{name}={v!r}" for name, v in saved.arguments.items() if self.hparams.get(name, v) != v]
            raise ValueError(f"the checkpoint's weights do not fit this model, but one with {', '.join(other)}")
        self._dropout_seed = checkpoint.get("dropout_seed")
        self.initial_weights = checkpoint.get("initial_weights")

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        before, now = recorded(checkpoint), self._arguments()
        check_resumable(before, now)
        run = run_of(checkpoint)
        self._seen = {name: run.get(name, 0) for name in self._seen}
        self._validated = run.get("validated")
        self._changes = [*run.get("changes", []), *changed(before, now, checkpoint["global_step"])]

    @property
    def run(self) -> dict[str, Any]:
        """What the run was asked to do and what it has done, as its checkpoints and its record.json hold it.

        `arguments` is the description of bsbr_pl.run; `changes` what was changed by a resume, with the step;
        `planned_steps` when the run ends, None where no number of steps or epochs says so; `step` and the `tokens` and
        `samples` trained on so far; `validated` the step of the last validation.
        """
        return {
            "arguments": self._arguments(),
            "changes": self._changes,
            "planned_steps": steps.planned_steps(self.trainer),
            "epoch_steps": steps.steps_per_epoch(self.trainer),
            "step": self.trainer.global_step,
            "validated": self._validated,
            **self._seen,
        }

    def _arguments(self) -> Arguments:
        data: Any = getattr(self.trainer, "datamodule", None)
        given = {} if data is None else dict(data.hparams)
        if "batch_size" in given:
            given["batch_size"] = data.batch_size  # which a BatchSizeFinder changes
        seed = os.environ.get("PL_GLOBAL_SEED")  # of seed_everything
        described = describe_run(
            dict(self.hparams),
            None if data is None else type(data).__name__,
            given,
            steps.arguments(self.trainer),
            int(seed) if seed else None,
            self.initial_weights,
        )
        return described | {"data.fingerprint": getattr(data, "fingerprint", None)}

    def configure_model(self) -> None:
        """With the strategy `fsdp2`, shard the weights over all processes: every layer by itself, then what is left."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
        for module in (*self.model.branches, self.model):
            fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(self.model, "hidden")  # leaves the embedding whole for `head`, until the backward

    def whole_model(self) -> LanguageModel:
        """The model with all its weights: a copy where they are sharded, and then every process must ask for it."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            copy = type(self)(**self.hparams).model
        copy.load_state_dict(weights, assign=True)
        return copy

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, vocab_size)."""
        return self.model(input_ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self._compiled and not self._trusted:
            self._compare_compiled(batch)
        loss = self._loss_through(self._compiled or self.model.hidden, batch)
        return self._step_loss.weighted(loss, batch["targets"])

    def _loss_through(self, form: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
        """The training loss, with `form` for `model.hidden`."""
        hidden, targets = form(batch["input_ids"]), batch["targets"]
        if "slice" in batch:  # a recall task asks at few positions: only they need logits
            hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
        return F.cross_entropy(self.model.head(hidden).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def _compare_compiled(self, batch: dict[str, Tensor]) -> None:
        """The gradients of the compiled model must be the model's own, on the first batch; with `auto` it is left else.

        With dropout, where each draws its own, and where weights are sharded, it only has to run.

        Raises:
            RuntimeError: naming the parameter whose gradient differs by more than rounding.
        """
        self._trusted = True
        own, compiled = (
            functools.partial(self._loss_through, form, batch)
            for form in (self.model.hidden, self._compiled or self.model.hidden)
        )
        low = torch.is_autocast_enabled(self.device.type) or self.dtype in (torch.bfloat16, torch.float16)
        comparable = not (self.hparams["dropout"] or isinstance(self.model, FSDPModule))
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                check_gradients(self.model, own if comparable else None, compiled, low)
        except Exception as error:
            if self.hparams["compile"] != "auto":
                raise
            self._compiled = None
            reason = " ".join(str(error).split())[:300]
            rank_zero_warn(f"training goes on without torch.compile, which failed: {reason}")

    def on_fit_start(self) -> None:
        trainer = self.trainer
        steps.check(trainer)
        # Validation is asked for by this module, in steps; Lightning would compare the interval with an epoch's length.
        self._check_val_every_n_epoch, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, None  # type: ignore[attr-defined]
        if self.device.type == "cpu" and not isinstance(self.model, FSDPModule):
            check_training(self.model)
        if self._dropout_seed is None:
            self._dropout_seed = torch.initial_seed()
        wanted = self.hparams["compile"]
        if wanted == "auto":
            wanted = self.device.type == "cuda" and not isinstance(self.model, FSDPModule)
        if wanted:
            compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
            if self.device.type == "cpu" and not any(map(shutil.which, compilers)):
                raise ValueError(f"compile needs a C++ compiler on a CPU, and there is no {' or '.join(compilers)}")
            self._compiled, self._trusted = compile_hidden(self.model), False

    def on_fit_end(self) -> None:
        self._compiled = None
        self.trainer.check_val_every_n_epoch = self._check_val_every_n_epoch  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """The optimiser works with this run's arguments, not with those that its checkpoint was saved with."""
        trainer, self._step_loss = self.trainer, StepLoss()
        self._validate_after_this_batch(self._validated == trainer.global_step)  # Lightning asks once more on resuming
        if not steps.has_epochs(trainer):
            trainer.fit_loop.min_epochs = 0  # Lightning's 1 where min_steps is given would never be reached
        if self._schedule is None:  # a subclass has other optimisers
            return
        (optimizer,), scheduler = trainer.optimizers, self.lr_schedulers()
        before, hp = optimizer.param_groups[0]["lr"], self.hparams
        rate = hp["learning_rate"] * self._schedule(trainer.global_step)
        scheduler.base_lrs = [hp["learning_rate"] for _ in optimizer.param_groups]  # type: ignore[union-attr]
        for group, decay in zip(optimizer.param_groups, (hp["weight_decay"], 0.0), strict=True):
            group |= {"initial_lr": hp["learning_rate"], "lr": rate, "weight_decay": decay}
            group["betas"] = (hp["beta1"], hp["beta2"])
        for change in self._changes:
            if change["step"] == trainer.global_step:
                rank_zero_info("From step {step} on {argument} is {after} instead of {before}".format(**change))
        if trainer.global_step and rate != before:
            rank_zero_info(f"The learning rate goes from {before:.3g} to {rate:.3g}")
        if steps.planned_steps(trainer) is None:
            rank_zero_info("No number of steps is asked for: the learning rate stays constant after warm-up")

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Dropout follows from seed, process, step and batch, so that a resumed run needs no random state restored."""
        self._validate_after_this_batch(False)
        key = (self._dropout_seed, self.global_rank, self.global_step, batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))  # type: ignore[arg-type]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient that of the step's mean loss, and log it; say whether a validation follows.

        Lightning would log only after the hook where checkpoints are saved, which then lack it.
        """
        trainer = self.trainer
        if trainer.accumulate_grad_batches > 1:
            correction = self._step_loss.correction(trainer.accumulate_grad_batches)
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(correction)
        self._seen["tokens"] += self._step_loss.positions * trainer.world_size
        self._seen["samples"] += self._step_loss.samples * trainer.world_size
        loss, self._step_loss = self._step_loss.mean(), StepLoss()
        self.log("train/loss", loss, prog_bar=True, logger=False)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")  # type: ignore[assignment]
            for logger in self.loggers:
                logger.log_metrics({"train/loss": float(loss)}, step=self.global_step)
        self._validate_after_this_batch(
            steps.validation_follows(trainer, self.global_step + 1, self._check_val_every_n_epoch)
        )

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Whoever stops training between the batches of a step, as max_time does, stops it after the step."""
        stop = self.trainer.should_stop or self._stop_after_step
        between = self._step_loss.samples > 0
        self.trainer.should_stop, self._stop_after_step = stop and not between, stop and between

    def _validate_after_this_batch(self, due: bool) -> None:
        if steps.validation_interval(self.trainer) is not None:
            self.trainer.val_check_batch = 1 if due else steps.NEVER
        elif due:  # where Lightning watches the clock, it validates when it is told to stop
            self.trainer.should_stop = True

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The likeliest next token at every position: (B, T)."""
        return self.model(batch["input_ids"]).argmax(-1)

    def _evaluation_step(self, stage: str, batch: dict[str, Tensor]) -> None:
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
            self._validated = self.global_step
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep seed of dropout and source of the weights, and name what the optimiser's state belongs to.

        Its numbers are places in the groups, but FSDP2 reads (and writes) them as places in the model.
        """
        checkpoint |= {"dropout_seed": self._dropout_seed, "initial_weights": self.initial_weights}
        if self._trainer is None:
            return
        checkpoint["run"] = self.run
        if isinstance(self.model, FSDPModule) or not checkpoint.get("optimizer_states"):
            return
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for optimizer, saved in zip(self.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            saved["state"] = {order[i]: state for i, state in saved["state"].items()}
            for group in saved["param_groups"]:
                group["params"] = [order[i] for i in group["params"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW; the learning rate rises linearly for `warmup_steps`, then falls along half a cosine, by step."""
        hp = self.hparams
        matrices = [module.weight for module in self.modules() if isinstance(module, torch.nn.Linear)]
        kept = {id(p) for p in matrices}
        groups = [
            {"params": matrices, "weight_decay": hp["weight_decay"]},
            {"params": [p for p in self.parameters() if id(p) not in kept], "weight_decay": 0.0},
        ]
        fused = "mixed" not in self.trainer.precision  # where Lightning 2.6.6 will not clip for a fused one
        optimizer = torch.optim.AdamW(groups, lr=hp["learning_rate"], betas=(hp["beta1"], hp["beta2"]), fused=fused)

        self._schedule = self._share_of_learning_rate
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _share_of_learning_rate(self, step: int) -> float:
        """Of `learning_rate`, for the step that follows `step` others: warm-up, then half a cosine to the run's end.

        Constant after warm-up where no number of steps is asked for. In a run of epochs the number is known once the
        data is loaded: `on_train_start` asks again.
        """
        total, lowest = steps.planned_steps(self.trainer) or math.inf, self.hparams["min_learning_rate"]
        warmup = min(self.hparams["warmup_steps"], total)
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


#: The arguments of LanguageModule that are plain numbers, as a checkpoint stores them.
CONFIGURATION = [name for name in LanguageModule.__init__.__annotations__ if name not in ("attention", "return")]
MODEL_ARGUMENTS = inspect.signature(LanguageModel).parameters
