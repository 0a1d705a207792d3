"""LanguageModule: the LightningModule around any attention, and the only loader of its checkpoints."""

import functools
import inspect
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from .attention.base import Attention, check_number
from .checkpoint import load_checkpoint
from .description import build_layers, describe_layers, plain
from .limits import check_training, check_weights
from .metrics import IGNORED, TokenMetrics
from .model import LanguageModel

# `--trainer.strategy=fsdp2`: a checkpoint is one file, as everywhere else, not a folder with a part of each process.
StrategyRegistry.register("fsdp2", ModelParallelStrategy, override=True, save_distributed_checkpoint=False)


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


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
        compile: train through `torch.compile`, which takes a minute or so to start, after its gradients were compared
            with the model's own; evaluation, decoding and counting use the model as it is.

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
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_number("positive", lambda rate: rate > 0, learning_rate=learning_rate)
        check_number("a share from 0 to 1", lambda share: 0 <= share <= 1, min_learning_rate=min_learning_rate)
        check_number("0 or more", lambda steps: steps >= 0, whole=True, warmup_steps=warmup_steps)
        check_number("0 or more", lambda decay: decay >= 0, weight_decay=weight_decay)
        check_number("at least 0 and below 1", lambda beta: 0 <= beta < 1, beta1=beta1, beta2=beta2)
        if not isinstance(compile, bool):
            raise ValueError(f"compile must be true or false, got {compile!r}")
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
        """Go on with the run's dropout; say of what model the checkpoint is, where its weights do not fit this one.

        Raises:
            ValueError: naming the arguments that differ.
        """
        own = self.state_dict()
        weights = checkpoint.get("state_dict", own)  # fsdp2 has loaded them by itself
        if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
            saved = inspect.signature(type(self)).bind(**checkpoint["hyper_parameters"])
            saved.apply_defaults()  # an older one lacks what has been added since
            other = [f"{name}={v!r}" for name, v in saved.arguments.items() if self.hparams.get(name, v) != v]
            raise ValueError(f"the checkpoint's weights do not fit this model, but one with {', '.join(other)}")
        self._dropout_seed = checkpoint.get("dropout_seed")
        self.initial_weights = checkpoint.get("initial_weights")

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
        self.log("train/loss", loss, prog_bar=True, logger=False)
        self._loss = loss.detach()
        return loss

    def _loss_through(self, form: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
        """The training loss, with `form` for `model.hidden`."""
        hidden, targets = form(batch["input_ids"]), batch["targets"]
        if "slice" in batch:  # a recall task asks at few positions: only they need logits
            hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
        return F.cross_entropy(self.model.head(hidden).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def _compare_compiled(self, batch: dict[str, Tensor]) -> None:
        """The gradients of the compiled model must be the model's own, on the first batch.

        Not with dropout, where each draws its own, nor where weights are sharded.

        Raises:
            RuntimeError: naming the parameter whose gradient differs by more than rounding.
        """
        self._trusted = True
        if self.hparams["dropout"] or isinstance(self.model, FSDPModule):
            return
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        found = []
        for form in (self.model.hidden, self._compiled or self.model.hidden):
            gradients = torch.autograd.grad(self._loss_through(form, batch), parameters, allow_unused=True)
            found.append([p.new_zeros(()) if g is None else g for p, g in zip(parameters, gradients, strict=True)])
        low = torch.is_autocast_enabled(self.device.type) or self.dtype in (torch.bfloat16, torch.float16)
        tolerance, floor = (0.1, 1e-2) if low else (1e-2, 1e-3)
        largest = max(_root_mean_square(gradient) for gradient in found[0])
        for name, own, compiled in zip(names, *found, strict=True):
            error = _root_mean_square(compiled - own) / max(_root_mean_square(own), floor * largest, 1e-30)
            if not error <= tolerance:
                raise RuntimeError(
                    f"compile=True gives {name} another gradient than the model has (relative difference {error:.2g} "
                    f"on the first batch), with torch {torch.__version__} on {self.device}: train without it"
                )

    def on_fit_start(self) -> None:
        if self.device.type == "cpu" and not isinstance(self.model, FSDPModule):
            check_training(self.model)
        if self._dropout_seed is None:
            self._dropout_seed = torch.initial_seed()
        if self.hparams["compile"]:
            compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
            if self.device.type == "cpu" and not any(map(shutil.which, compilers)):
                raise ValueError(f"compile needs a C++ compiler on a CPU, and there is no {' or '.join(compilers)}")
            self._compiled, self._trusted = torch.compile(self.model.hidden), False

    def on_fit_end(self) -> None:
        self._compiled = None

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Dropout follows from seed, process, step and batch, so that a resumed run needs no random state restored."""
        key = (self._dropout_seed, self.global_rank, self.global_step, batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))  # type: ignore[arg-type]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss: Lightning would do so only after the hook where checkpoints are saved, which then lack it."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.global_step + 1) % every == 0:
            loss = self.trainer.strategy.reduce(self._loss, reduce_op="mean")
            for logger in self.loggers:
                logger.log_metrics({"train/loss": float(loss)}, step=self.global_step)

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

        @functools.cache
        def total_steps() -> int:
            max_steps = self.trainer.max_steps
            return max_steps if max_steps > 0 else int(self.trainer.estimated_stepping_batches)

        def share(step: int) -> float:
            # At step 0, which is now, Lightning could only tell by making the loaders, which then cannot be resumed.
            steps, lowest = total_steps() if step else math.inf, hp["min_learning_rate"]
            warmup = min(hp["warmup_steps"], steps)
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


#: The arguments of LanguageModule that are plain numbers, as a checkpoint stores them.
CONFIGURATION = [name for name in LanguageModule.__init__.__annotations__ if name not in ("attention", "return")]
MODEL_ARGUMENTS = inspect.signature(LanguageModel).parameters
