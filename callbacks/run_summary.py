"""RunSummary: what is trained, on what and for how long, printed before a run; its results, printed after it."""

import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from bsbr_pl.data import TokenData
from bsbr_pl.data.base import SPLITS
from bsbr_pl.data.corpora import RELEASED
from bsbr_pl.data.files import compressed_bits_per_byte
from bsbr_pl.foreign import trusted_now
from bsbr_pl.module import LanguageModule
from bsbr_pl.run_folder import run_folder
from bsbr_pl.spec import layers_of
from bsbr_pl.steps import batches_of, planned_steps, seconds_left
from bsbr_pl.utils.flops import forward_flops
from bsbr_pl.utils.timing import Clock
from bsbr_pl.values import FEW_DOCUMENTS

DASHBOARD = "http://localhost:6006/#custom_scalars"  # callbacks.Dashboard, in the TensorBoard that the command starts
WIDTH = 79  # characters of a line of generated text


class RunSummary(Callback):
    """Prints what is trained before a run; after it the last validation, compressors on the same text, and a sample.

    Args:
        prompt: the start of the generated text; if null, tokens from the middle of the validation text.
        prompt_length: how many tokens of the validation text.
        num_tokens: tokens to generate; 0 for none.
        temperature: of the sampling.
        top_k: of the sampling.
        most_lines: lines of generated text that are printed.
    """

    clock: Clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        prompt: str | None = None,
        prompt_length: int = 32,
        num_tokens: int = 100,
        temperature: float = 0.7,
        top_k: int | None = 50,
        most_lines: int = 8,
    ) -> None:
        self.prompt, self.prompt_length = prompt, prompt_length
        self.num_tokens, self.temperature, self.top_k = num_tokens, temperature, top_k
        self.most_lines = most_lines
        self._seconds: float | None = None  # of this part of the run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        folder = run_folder(trainer)  # every process asks for it
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            rows = [("model", _model(pl_module, data.context_length)), *_data(data), ("run", _length(trainer, data))]
            if trainer.ckpt_path:
                rows.append(("resumed", f"from step {trainer.global_step:,} of {_here(trainer.ckpt_path)}"))
            _print([*rows, ("folder", _here(folder))], 8)
        self._seen, self._started = pl_module.seen["tokens"], self.clock()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds = self.clock() - self._started

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        model, folder = pl_module.whole_model(), run_folder(trainer)
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        run = pl_module.run
        validated = trainer.num_val_batches and trainer.num_val_batches[0]
        speed = self._speed(run["tokens"], ", with validation" if validated else "")
        print(f"\nAfter {run['step']:,} steps and {run['tokens']:,} tokens{speed}:")
        _print(_validation(trainer, data), 15)
        if data.kind == "text" and self.num_tokens:
            self._print_sample(model, data, pl_module.device)
        _print_next(trainer, folder)

    def _speed(self, tokens: int, included: str) -> str:
        if self._seconds is None:
            return ""
        trained = tokens - self._seen
        part = f", {trained:,} of them" if self._seen else ""
        return f"{part} in {tqdm.format_interval(self._seconds)} ({trained / self._seconds:,.0f} tokens/s{included})"

    def _print_sample(self, model: Any, data: Any, device: torch.device) -> None:
        tokenizer, prompt, title = data.tokenizer, self.prompt, "Prompt"
        if prompt is None:
            tokens = data.corpus.tokens("val")
            middle = len(tokens) // 2
            prompt = tokenizer.decode(tokens[middle : middle + self.prompt_length].tolist())
            title = "Prompt, from the validation text"
        start = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(prompt)]], device=device)
        room = self.num_tokens if model.max_length is None else max(0, model.max_length + 1 - start.shape[1])
        ids = model.generate(start, min(self.num_tokens, room), self.temperature, self.top_k)
        if prompt:
            print(f"\n{title}:\n{_shown(prompt, self.most_lines)}")
        print(f"Generated:\n{_shown(tokenizer.decode(ids[0, start.shape[1] :].tolist()), self.most_lines)}")


def _model(module: LanguageModule, length: int) -> str:
    model = module.model
    names = dict.fromkeys(spec.key for spec in layers_of(module.hparams["attention"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = f"{' + '.join(names)}, {parameters:,} parameters; at {length:,} tokens of context"
    flops, costs = forward_flops(model, length), []
    if flops is not None:
        costs.append(f"{flops // length:,} FLOPs a token forward")
    if all(attention.has_decode for attention in model.attentions):
        costs.append(f"decode state: {model.state_size(length):,} numbers")
    lines = (textwrap.fill(name, WIDTH - 12), "; ".join(costs))
    return "\n".join(line for line in lines if line)


def _data(data: TokenData) -> list[tuple[str, str]]:
    """The name of the text, its checksum where it is known, and tokens and documents of each split.

    Of a recall task its arguments.
    """
    text = data.text_data
    if data.kind != "text" or text is None:
        return [("data", textwrap.fill(str(data), WIDTH - 12))]
    source, checksum = data.hparams["source"], str(text.corpus.meta["source_sha256"])
    name = f"{source}, {data.vocab_size:,} token ids"
    if source in RELEASED:
        name = f"{name}, sha256 {checksum[:12]}"
    rows, few = [name], []
    for split in SPLITS:
        tokens, documents = len(text.corpus.tokens(split)), len(text.documents(split)) - 1
        rows.append(f"{split:<5} {tokens:>13,} tokens in {documents:,} documents")
        if 0 < documents < FEW_DOCUMENTS:
            few.append(split)
    if few:
        rows.append(f"Under {FEW_DOCUMENTS} documents in {', '.join(few)}; intervals over parts of it")
    return [("data", "\n".join(rows))]


def _length(trainer: Trainer, data: TokenData) -> str:
    """What bounds the run: its steps with their tokens (at most, if samples have several lengths), and its time."""
    total = planned_steps(trainer)
    bounds = []
    if total:
        batch = data.batch_size * max(data.train_lengths)
        of_step, of_run = batch * trainer.accumulate_grad_batches, batch * batches_of(trainer, total)
        each, together = f"{of_step:,} tokens", f"{of_run:,} tokens"
        several_lengths = len(data.train_lengths) > 1
        if several_lengths:
            together = f"at most {together}"
        if several_lengths or of_run < total * of_step:
            each = f"at most {each}"
        bounds.append(f"{total:,} steps of {each}: {together}")
    bounds += [f"at most {tqdm.format_interval(seconds)}" for seconds in seconds_left(trainer)]
    return "; ".join(bounds) or "until it is stopped"


def _validation(trainer: Trainer, data: TokenData) -> list[tuple[str, str]]:
    """The metrics of the last validation, the text that they are of, and the best checkpoint: names and values."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    if not metrics:
        return [("validation", "none: limit_val_batches=0")]
    rows = {key.removeprefix("val/").replace("_", " "): f"{value:.4f}" for key, value in sorted(metrics.items())}
    batches, read = len(data.val_dataloader()), int(trainer.num_val_batches[0])
    if data.kind == "text" and data.text_data:
        text, tokens = data.text_data.text("val"), len(data.text_data.corpus.tokens("val")) - 1
        amount = f"{tokens:,} tokens, {len(text):,} bytes"
        if read >= batches:  # compressors read the whole text, which is not comparable with a part of it
            others = [f"{name} {bits:.4f}" for name, bits in compressed_bits_per_byte(text).items()]
            rows["bits per byte"] += f"    {', '.join(others)}"
        else:
            amount = f"the first {read * data.eval_batch_size * data.validation_length:,} of {amount}"
        rows["validated on"] = amount
    elif read < batches:
        rows["validated on"] = f"the first {read:,} of {batches:,} batches"
    if checkpoint := getattr(trainer.checkpoint_callback, "best_model_path", ""):
        rows["best checkpoint"] = _here(checkpoint)
    return list(rows.items())


def _print_next(trainer: Trainer, folder: Path) -> None:
    """The commands that show the curves and evaluate the checkpoints, as they are typed here."""
    programs = Path(sys.executable).parent
    here = f"{programs.relative_to(Path.cwd())}/" if programs.is_relative_to(Path.cwd()) else ""
    where = shlex.quote(_here(folder))
    commands = []
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        commands.append(("curves", f"{here}tensorboard --logdir {where}\nand open {DASHBOARD}"))
    if next(folder.glob("checkpoints/*.ckpt"), None):
        script = shlex.quote(_here(Path(__file__).parents[1] / "evaluate.py"))
        trusted = "".join(f" --trust={shlex.quote(package)}" for package in sorted(trusted_now()))
        commands.append(("evaluation", f"{here}python {script} {where}{trusted}"))
    print()
    _print(commands, 10)


def _print(rows: list[tuple[str, str]], width: int) -> None:
    """Names, and their values beside them; a value may have several lines."""
    for name, value in rows:
        print(f"  {name:<{width}}  " + value.replace("\n", "\n" + " " * (width + 4)))


def _here(path: str | Path) -> str:
    """A path below the working directory without its name."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _shown(text: str, most_lines: int) -> str:
    """The first lines of a text, cut to a terminal's width; control characters become `?`."""
    lines = []
    for line in text.splitlines():
        cut = line.expandtabs(4)[: WIDTH - 2].rstrip()
        if cut:
            lines.append("  " + "".join(letter if letter.isprintable() else "?" for letter in cut))
    return "\n".join(lines[:most_lines])
