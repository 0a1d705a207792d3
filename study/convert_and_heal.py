"""Convert a trained Standard model to BSBR: how much is lost, and how many steps of fine-tuning recover it.

    python study/convert_and_heal.py                      # 11 minutes on one thread
    python study/convert_and_heal.py --steps 160 --heal-steps 16 --folder runs/convert_short

Each row is the loss of one model on the whole validation text: the trained Standard model; BSBR with its weights,
before any training; BSBR after `--heal-steps` more steps. Two baselines get the same few steps: the Standard model,
trained further, and BSBR from its own initialization. The learning rate of the fine-tune rises to `--heal-rate` in a
tenth of its steps, then falls to 0.

Runs are kept in `--folder` and are not repeated. Options that are not listed here go to train.py.
"""

import sys
from pathlib import Path

from trainings import ROOT, finished_record  # first: it makes the modules of the repository importable

import train
from benchmarks.common import parser, publish


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(out=ROOT / "results" / "convert_and_heal.json")
    options.add_argument("--steps", type=int, default=640, help="of training Standard")
    options.add_argument("--heal-steps", type=int, default=64, help="of the fine-tune")
    options.add_argument("--heal-rate", type=float, default=1e-3, help="learning rate of the fine-tune, at its highest")
    options.add_argument("--chunk-size", type=int, default=64, help="of BSBR, tokens")
    options.add_argument("--context-length", type=int, default=512, help="tokens")
    options.add_argument("--folder", type=Path, default=ROOT / "runs" / "convert_and_heal", help="of the runs")
    chosen, more = options.parse_known_args()
    command_line = sys.argv
    sys.argv = command_line[:1]  # LightningCLI warns about other arguments

    def run(command: str, name: str, *arguments: str) -> float:
        """Bits per byte of the validation text at the end of a command of train.py."""
        line = [command, f"--config={ROOT / 'configs' / name}.yaml", f"--data.context_length={chosen.context_length}"]
        line += ["--data.batch_size=8", "--trainer.enable_progress_bar=false", *more, *arguments]
        return float(train.main(line).trainer.callback_metrics["val/bits_per_byte"])

    def fit(folder: str, name: str, steps: int, *arguments: str) -> float:
        """Train in this folder, unless the run is there already. Returns bits per byte of the validation text."""
        if found := finished_record(chosen.folder / folder):
            return found["metrics"]["val/bits_per_byte"]["value"][-1]
        logger = {"save_dir": chosen.folder, "name": "", "version": folder}
        where = [f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()]
        length = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
        return run("fit", name, *length, *where, *arguments)

    chunk = f"--model.attention.chunk_size={chosen.chunk_size}"
    start = f"--initial_weights={chosen.folder / 'standard/checkpoints/last.ckpt'}"
    heal = (f"--model.learning_rate={chosen.heal_rate}", f"--model.warmup_steps={chosen.heal_steps // 10}")
    rows: list[dict] = []

    def add(model: str, steps: int, bits: float) -> None:
        over = 100 * (bits / rows[0]["bits per byte"] - 1) if rows else 0.0
        rows.append({"model": model, "steps": steps, "bits per byte": round(bits, 4), "over Standard, %": over})

    steps, few = chosen.steps, chosen.heal_steps
    add("Standard", steps, fit("standard", "standard", steps))
    add("BSBR with its weights", steps, run("validate", "bsbr", chunk, start))
    add("BSBR, healed", steps + few, fit("healed", "bsbr", few, chunk, start, *heal))
    add("Standard, trained on", steps + few, fit("trained_on", "standard", few, start, *heal))
    add("BSBR from its own start", few, fit("from_its_own_start", "bsbr", few, chunk))
    sys.argv = command_line
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()
