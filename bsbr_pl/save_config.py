"""SaveConfig: config.yaml in the run's folder, which one process at a time trains in."""

from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from .run_folder import holds_a_run, run_folder


class SaveConfig(SaveConfigCallback):
    """Saves the configuration with the run, in a folder that no other process trains in.

    A folder that holds a run already is only used with a `ckpt_path`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, config, overwrite=True, **options)
        self.resumed = config.get("ckpt_path") is not None
        self.lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":  # validate and test may use a run's folder, which keeps its configuration
            return
        folder = run_folder(trainer)
        if not self.resumed and holds_a_run(folder):
            raise ValueError(f"{folder} holds another run: choose another one, or give its ckpt_path to resume it")
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".training.lock")  # the operating system's: it ends with the process
            try:
                self.lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(f"another process trains in {folder}: start again, or choose another one") from error
            path = str(folder / self.config_filename)  # not in trainer.log_dir, which MLflow with a database lacks
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
