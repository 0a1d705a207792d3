"""A small real text, a small real model, and a Trainer around them."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from lightning import Trainer
from lightning.pytorch.loggers import Logger

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import TextData
from bsbr_pl.module import LanguageModule

pytest_plugins = ["slow_tests"]

# The same examples on every run and no clock: a busy machine must not decide whether a test passes. Others, and more of
# them: `pytest --hypothesis-profile=long --hypothesis-seed=1`.
settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile("ci")


class Lines(Logger):
    """Keeps what is logged as (step, metrics)."""

    name, version = "lines", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, prefix: str) -> list[tuple[int | None, dict[str, float]]]:
        """The lines with a key under `prefix`."""
        return [line for line in self.lines if any(key.startswith(prefix) for key in line[1])]

    def keys(self) -> set[str]:
        return {key for _, metrics in self.lines for key in metrics}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These models are far too small for two threads to be worth their waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (root / f"{i}.txt").write_text("".join(f"line {j} of {i}, the same as {j - i}\n" for j in range(25)))
    return root


@pytest.fixture(scope="session")
def make_data(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TextData]:
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**arguments: Any) -> TextData:
        small = {"context_length": 32, "batch_size": 4, "val_fraction": 0.15, "test_fraction": 0.15}
        return TextData(str(texts), "bytes", cache_dir=cache, **small | arguments)

    return make


def make_module(name: str = "bsbr", dropout: float = 0.0, seed: int = 0, **options: Any) -> LanguageModule:
    torch.manual_seed(seed)
    sizes = {"chunk_size", "window_size"} & inspect.signature(ARCHITECTURES[name]).parameters.keys()
    attention = partial(ARCHITECTURES[name], **dict.fromkeys(sizes, 8) | options)
    return LanguageModule(attention, 257, hidden_dim=16, num_layers=2, num_heads=2, dropout=dropout, warmup_steps=2)


@pytest.fixture(name="make_module", scope="session")
def make_module_fixture() -> Callable[..., LanguageModule]:
    return make_module


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**arguments: Any) -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        steps = {"max_epochs": -1, "max_steps": 8, "log_every_n_steps": 2, "num_sanity_val_steps": 0}
        steps |= {"val_check_interval": 4, "check_val_every_n_epoch": None, "use_distributed_sampler": False}
        return Trainer(default_root_dir=tmp_path, enable_model_summary=False, **quiet | steps | arguments)

    return make
