"""Dashboard: what TensorBoard shows of a run first."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from bsbr_pl.module import LanguageModule
from bsbr_pl.run_folder import run_folder

#: Section -> chart -> regular expressions of the curves in it.
CHARTS = {
    "1. training": {
        "loss": ["train/loss", "val/loss"],
        "bits per byte": ["val/bits_per_byte"],
        "learning rate": ["train/learning_rate"],
        "gradient norm, before clipping": ["train/gradient_norm"],
        "training tokens": ["train/tokens"],
        "accuracy": ["val/accuracy"],
    },
    "2. speed and memory": {
        "tokens per second": ["step/tokens_per_second"],
        "seconds of a step": ["step/seconds", "step/data_seconds"],
        "share of the device's peak FLOPs": ["flops/utilization"],
        "peak memory, bytes": ["memory/.*peak_bytes", "memory/peak_resident_bytes"],
    },
    "3. attention": {
        "entropy, nats": ["attention/entropy_nats/.*"],
        "distance to the attended token": ["attention/distance_tokens/.*"],
        "weight outside of the window": ["attention/outside_share/.*"],
    },
}
RESULTS = ("val/loss", "val/bits_per_byte", "val/accuracy")  # columns of the tab HPARAMS; an absent one stays empty


class Dashboard(Callback):
    """When training starts, gives TensorBoard a page of charts, and the configuration and arguments of the run.

        CUSTOM SCALARS   loss, bits per byte, learning rate, gradient norm and tokens; speed and memory; attention
        TEXT             the run's config.yaml
        HPARAMS          the run's arguments, beside its last validation

    Other loggers get nothing.
    """

    @rank_zero_only
    def _show(self, trainer: Trainer, pl_module: LanguageModule, configuration: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from torch.utils.tensorboard.summary import hparams  # imports tensorboard

                writer = logger.experiment
                charts = {}
                for section, curves in CHARTS.items():
                    charts[section] = {title: ["Multiline", tags] for title, tags in curves.items()}
                writer.add_custom_scalars(charts)
                writer.add_text("configuration", f"```yaml\n{configuration}\n```", trainer.global_step)
                given = pl_module.run["arguments"].items()
                arguments = {name: value if type(value) in (int, float) else str(value) for name, value in given}
                for summary in hparams(arguments, dict.fromkeys(RESULTS, 0))[:2]:  # the third ends a run
                    writer.file_writer.add_summary(summary)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        path = run_folder(trainer) / "config.yaml"  # every process asks for the folder
        self._show(trainer, pl_module, path.read_text() if path.exists() else "none was saved")
