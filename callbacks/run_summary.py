"""RunSummary: the size of the model, printed at the start of a run, and its results, printed at the end."""

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from bsbr_pl.data import TokenData
from bsbr_pl.data.files import compressed_bits_per_byte
from bsbr_pl.module import LanguageModule


class RunSummary(Callback):
    """Prints the model's size; at the end the last validation, compressors on the same text, and a generated sample.

    Args:
        prompt: the start of the generated text.
        num_tokens: tokens to generate; 0 for none.
        temperature: of the sampling.
        top_k: of the sampling.
    """

    def __init__(
        self, prompt: str = "def ", num_tokens: int = 200, temperature: float = 0.7, top_k: int | None = 50
    ) -> None:
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.top_k = top_k

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        model = pl_module.model
        T = trainer.datamodule.context_length  # type: ignore[attr-defined]
        names = dict.fromkeys(type(attention).__name__ for attention in model.attentions)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{' + '.join(names)}: {parameters:,} parameters; at {T} tokens of context", end=" ")
        print(f"{model.flops(T) // T:,} FLOPs a token forward and a decode state of {model.state_size(T):,} numbers")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        model = pl_module.whole_model()
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        run = pl_module.run
        print(f"\nAfter {run['step']:,} steps and {run['tokens']:,} tokens:")
        for name, value in _validation(trainer, data):
            print(f"  {name:<28} {value}")
        if data.kind == "text" and self.num_tokens:
            tokenizer = data.tokenizer
            start = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(self.prompt)]], device=pl_module.device)
            room = self.num_tokens if model.max_length is None else max(0, model.max_length + 1 - start.shape[1])
            ids = model.generate(start, min(self.num_tokens, room), self.temperature, self.top_k)
            print(f"\nGenerated:\n{tokenizer.decode(ids[0, 1:].tolist())}\n")


def _validation(trainer: Trainer, data: TokenData) -> list[tuple[str, str]]:
    """The metrics of the last validation, the text that they are of, and the best checkpoint: names and values."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    if not metrics:
        return [("validation", "none: limit_val_batches=0")]
    rows = [(key.removeprefix("val/").replace("_", " "), f"{value:.4f}") for key, value in sorted(metrics.items())]
    batches, read = len(data.val_dataloader()), int(trainer.num_val_batches[0])
    if data.kind == "text" and (text_data := data.text_data):
        text, tokens = text_data.text("val"), len(text_data.corpus.tokens("val")) - 1
        amount = f"{tokens:,} tokens, {len(text):,} bytes"
        if read >= batches:  # compressors read the whole text, which is not comparable with a part of it
            compressed = compressed_bits_per_byte(text).items()
            rows += [(f"bits per byte of {name}", f"{bits:.4f}") for name, bits in compressed]
        else:
            amount = f"the first {read * data.eval_batch_size * data.validation_length:,} of {amount}"
        rows.append(("validation text", amount))
    elif read < batches:
        rows.append(("validation", f"the first {read:,} of {batches:,} batches"))
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return [*rows, ("checkpoint", checkpoint)] if checkpoint else rows
