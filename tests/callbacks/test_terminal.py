"""What a person sees of a run: its start, one line while it trains, its results; held against its record."""

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.damage import tiny
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train
from bsbr_pl import run_folder
from bsbr_pl.__main__ import run
from bsbr_pl.data.files import compressed_bits_per_byte
from bsbr_pl.parsing import trusted_packages
from callbacks import ProgressLine
from callbacks.dashboard import CHARTS
from callbacks.progress_line import _is_terminal

LINE = re.compile(
    r"step (?P<step>\d+)/8(  \d\d:\d\d left)?(  (?P<rate>[\d.]+)(?P<unit>k?) tok/s)?  loss (?P<loss>\d+\.\d{3})"
    r"  lr (?P<lr>[\d.e-]+)  (not validated yet|validating \d+/\d+|bits/byte (?P<bits>\d+\.\d{3}))"
)
SHOWN = ["--trainer.enable_progress_bar=true", "--trainer.max_steps=8", "--trainer.val_check_interval=4"]
SHOWN += ["--trainer.log_every_n_steps=1"]


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "80")
    return ["fit", *tiny(Path())]


def metrics() -> dict[str, dict[str, list[float]]]:
    return json.loads(Path("runs/version_0/record.json").read_text())["metrics"]


def test_lines_of_a_file_are_those_of_the_record(options, capfd, caplog):
    cli = train.main([*options, *SHOWN])
    out, err = capfd.readouterr()
    assert err == ""
    assert [record.getMessage() for record in caplog.records] == [], "Lightning says nothing"
    start, *rest = out.split("step 1/8", 1)
    middle, end = ("step 1/8" + rest[0]).split("\n\nAfter ", 1)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert len([line for line in out.splitlines() if not line.startswith("step ")]) + 1 <= 40, "fits one screen"
    assert "\r" not in out

    parameters = sum(parameter.numel() for parameter in cli.model.model.parameters())
    assert start.startswith(f"  model     bsbr, {parameters:,} parameters; at 32 tokens of context\n")
    assert f"; decode state: {cli.model.model.state_size(32):,} numbers\n" in start
    text = cli.datamodule
    for split in ("train", "val", "test"):
        tokens, documents = len(text.corpus.tokens(split)), len(text.documents(split)) - 1
        assert re.search(rf"\n +{split} +{tokens:,} tokens in {documents} documents\n", start)
    assert "Under 5 documents in train, val, test; intervals over parts of it\n" in start
    assert start.endswith("  run       8 steps of 128 tokens: 1,024 tokens\n  folder    runs/version_0\n")

    found = metrics()
    lines = [LINE.fullmatch(line) for line in middle.splitlines()]
    assert [int(line["step"]) for line in lines] == list(range(1, 9))
    for line in lines:
        step = int(line["step"])
        assert float(line["loss"]) == pytest.approx(found["train/loss"]["value"][step - 1], abs=5.1e-4)
        if step < 8:
            assert float(line["lr"]) == pytest.approx(found["train/learning_rate"]["value"][step], rel=0.06)
        bits = found["val/bits_per_byte"]["value"][step // 4 - 1] if step >= 4 else None
        assert line["bits"] == (None if bits is None else f"{bits:.3f}")
        assert float(line["rate"]) > 0
    assert found["train/tokens"]["value"] == [128 * step for step in range(1, 9)]

    values = {name: found[f"val/{name}"]["value"][-1] for name in ("loss", "bits_per_byte", "accuracy", "perplexity")}
    assert re.match(r"8 steps and 1,024 tokens in \d\d:\d\d \([\d,]+ tokens/s, with validation\):\n", end)
    for name in ("loss", "accuracy", "perplexity"):
        assert re.search(rf"\n  {name} +{values[name]:.4f}\n", end)
    others = ", ".join(f"{name} {bits:.4f}" for name, bits in compressed_bits_per_byte(text.text("val")).items())
    assert re.search(rf"\n  bits per byte +{values['bits_per_byte']:.4f}    {others}\n", end)
    prompt = re.search(r"Prompt, from the validation text:\n(.*?)Generated:\n", end, re.DOTALL)[1]
    assert all(line.strip() in text.text("val").decode() for line in prompt.splitlines())
    page = "and open http://localhost:6006/#custom_scalars"
    assert re.search(rf"\n  curves      \S*tensorboard --logdir runs/version_0\n {{14}}{page}\n", end)
    assert re.search(r"\n  evaluation  \S*python \S*evaluate.py runs/version_0\n$", end)


def test_a_scripted_clock_gives_time_left_and_tokens_per_second(options, capfd, monkeypatch):
    """One second from one reading of the clock to the next."""
    seconds = iter(range(10_000))
    monkeypatch.setattr("callbacks.progress_line.ProgressLine.clock", lambda self: float(next(seconds)))
    train.main([*options, *SHOWN, "--trainer.val_check_interval=100"])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    # Readings of step 1: start of training, first step, window; from then on window, time left.
    assert lines[0].startswith("step 1/8  64.0 tok/s  ")  # two readings after the start: 128 tokens in 2 seconds
    assert lines[1].startswith("step 2/8  00:18 left  128 tok/s  ")  # 3 seconds since the first step, 6 more steps
    assert lines[2].startswith("step 3/8  00:12 left  64.0 tok/s  ")  # 5 seconds for 2 steps, 5 more


@pytest.mark.parametrize(("limits", "left"), [([], 12.0), ([5.0, 30.0], 5.0), ([30.0], 12.0)])
def test_the_time_left_is_that_of_the_first_bound(limits, left, monkeypatch):
    """After 2 of 8 steps in 4 seconds, and with `max_time`."""
    monkeypatch.setattr("callbacks.progress_line.planned_steps", lambda trainer: 8)
    monkeypatch.setattr("callbacks.progress_line.seconds_left", lambda trainer: [*limits])
    line = ProgressLine()
    line._first, line._started, line.clock = 0, 10.0, lambda: 14.0
    assert line._seconds_left(SimpleNamespace(global_step=2)) == left


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_on_a_terminal_one_line_is_drawn_in_place(options, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("callbacks.progress_line.SECONDS", 0.0)
    train.main([*options, *SHOWN])
    out = capsys.readouterr().out
    drawn = out[out.index("\rstep 1/8") : out.index("\n\nAfter 8 steps")]
    assert "\n" not in drawn
    shown = [line.rstrip() for line in drawn.split("\r") if line.strip()]
    assert max(map(len, shown)) <= columns
    assert all(line.startswith("step ") for line in shown)
    assert sum("validating" in line for line in shown) >= 2
    assert ("[" in drawn) == (columns == 120 or "[=" in drawn)
    bits = metrics()["val/bits_per_byte"]["value"][-1]
    assert shown[-1].startswith("step 8/8")
    assert f"bits/byte {bits:.3f}" in shown[-1]


def test_a_terminal_is_drawn_ten_times_a_second(capsys, monkeypatch):
    """And where a line is due. Drawing costs time, and batches may take a millisecond."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    now = iter(number / 16 for number in range(1000, 1100))  # 0.0625 seconds from one reading to the next
    line = ProgressLine()
    times, line.clock = [], lambda: times.append(next(now)) or times[-1]
    for step in range(1, 9):
        line._draw([f"step {step}/8"], step, 8, due=step == 8)
    shown = re.findall(r"step (\d)/8", capsys.readouterr().out)
    assert list(dict.fromkeys(shown)) == ["1", "3", "5", "7", "8"]


def test_a_pipe_that_nobody_reads_does_not_end_a_training(options, monkeypatch):
    def closed(*unused, **options):
        raise BrokenPipeError

    monkeypatch.setattr("callbacks.progress_line.print", closed, raising=False)
    assert train.main([*options, *SHOWN]).trainer.global_step == 8


def test_a_resumed_run_says_from_where(options, capfd):
    train.main([*options, *SHOWN])
    capfd.readouterr()
    train.main([*options, *SHOWN, "--trainer.max_steps=12", "--ckpt_path=last"])
    out = capfd.readouterr().out
    assert "\n  resumed   from step 8 of runs/version_0/checkpoints/last.ckpt\n  folder    runs/version_0\n" in out
    speed = r"in \d\d:\d\d \([\d,]+ tokens/s, with validation\):\n"
    assert re.search(rf"\nAfter 12 steps and 1,536 tokens, 512 of them {speed}", out)


def test_tensorboard_gets_a_page_of_its_own_and_no_curves_of_one_point(options):
    train.main([*options, *SHOWN])
    events = EventAccumulator("runs/version_0", size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    (content,) = events.PluginTagToContent("custom_scalars")
    layout = Layout.FromString(events.Tensors(content)[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(CHARTS)
    shown = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert {"train/loss", "val/loss", "val/bits_per_byte", "train/gradient_norm", "train/tokens"} <= shown
    for pattern in shown - {"memory/.*peak_bytes"}:
        assert any(re.fullmatch(pattern, tag) for tag in tags["scalars"]), pattern
    for constant in ("flops/forward_macs", "flops/step_flops", "memory/peak_tensor_bytes", "step/p50_seconds"):
        assert constant not in tags["scalars"]
        assert f"{constant}/text_summary" in tags["tensors"]
        assert constant in metrics(), "other loggers have it as before"
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert Path("runs/version_0/config.yaml").read_text() in text
    start = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    assert start.session_start_info.hparams["model.hidden_dim"].number_value == 16
    norms = metrics()["train/gradient_norm"]["value"]
    assert len(norms) == 8
    assert min(norms) > 0


def test_the_gradient_norm_is_that_before_clipping(make_module, make_data, make_trainer, lines):
    module, norms = make_module(), []

    def keep(optimizer, **unused):
        norms.append(sum(float(p.grad.double().square().sum()) for p in module.parameters()) ** 0.5)

    module.configure_gradient_clipping = keep
    make_trainer(logger=lines, log_every_n_steps=1, max_steps=3).fit(module, make_data())
    logged = [found["train/gradient_norm"] for _, found in lines.of("train/gradient_norm")]
    assert logged == pytest.approx(norms, rel=1e-5)


def test_a_folder_with_another_digit_is_no_run(tmp_path):
    """`²` is a digit, but no number."""
    for name in ("version_²", "version_3", "version_x"):
        (tmp_path / name).mkdir()
    assert run_folder.next_version(tmp_path) == "version_4"


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    """Both see the same folders, so both choose the same name."""
    other = run_folder.next_version

    def seen_before_the_other_made_it(folder):
        monkeypatch.setattr(run_folder, "next_version", other)
        (folder / "version_0").mkdir()
        return "version_0"

    monkeypatch.setattr(run_folder, "next_version", seen_before_the_other_made_it)
    assert run_folder.reserve(tmp_path / "runs") == tmp_path / "runs/version_1"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["version_0", "version_1"]


@pytest.mark.parametrize("half", ["", "0.3,", "0.3,1", "0.3,x\r\n"])
def test_half_a_line_of_metrics_is_left_out(tmp_path, half):
    """Of a process that was killed."""
    logger = CSVLogger(tmp_path, "", 0)
    folder = Path(logger.experiment.log_dir)
    whole = "loss,step\r\n0.5,0\r\n0.4,1\r\n"
    (folder / "metrics_before_resume.csv").write_text(f"{whole}0.2,2\r\n{half}", newline="")
    run_folder.put_csv_rows_back(SimpleNamespace(loggers=[logger], global_step=2))
    assert (folder / "metrics.csv").read_bytes() == whole.encode()


def test_a_run_that_leaves_nothing_leaves_no_folder(options):
    with pytest.raises(ValueError, match="fewer than one batch"):  # once TensorBoard's file is there
        train.main([*options, "--data.batch_size=10000"])
    assert not Path("runs").exists()
    Path("runs/version_3").mkdir(parents=True)
    with pytest.raises(ValueError, match="rotary positions need an even head width"):  # in the first step
        train.main([*options, "--model.num_heads=16"])
    train.main([*options, "--trainer.fast_dev_run=true"])
    assert [path.name for path in Path("runs").iterdir()] == ["version_3"]


def test_without_a_logger_everything_is_in_the_runs_folder(options):
    for _ in range(2):
        train.main([*options, "--trainer.logger=false"])
    assert sorted(path.name for path in Path().iterdir()) == ["cache", "runs", "text.txt"]
    left = {path.name for path in Path("runs/version_1").iterdir()}
    assert left == {".training.lock", "checkpoints", "config.yaml", "record.json"}


def test_a_trusted_package_trains_and_is_evaluated(options, monkeypatch, capfd):
    Path("my_trusted.py").write_text(
        "from bsbr_pl.attention import LinearAttention\n\nclass Mine(LinearAttention):\n    pass\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    asked = [*options, "--model.attention=my_trusted.Mine"]
    with pytest.raises(SystemExit):
        train.main(asked)
    assert "my_trusted" not in sys.modules
    cli = train.main([*asked, "--trust", "my_trusted"])
    assert type(cli.model.model.attentions[0]).__name__ == "Mine"
    del sys.modules["my_trusted"]
    few = ["--lengths=[]", "--multiples=[1]", "--output_dir=evaluation"]
    assert run("evaluate", ["runs", *few], "evaluate.py") == 1
    assert "--trust=PACKAGE" in capfd.readouterr().err
    assert run("evaluate", ["runs", "--trust=my_trusted", *few], "evaluate.py") == 0


def test_trust_is_repeated_or_has_commas():
    assert trusted_packages(["fit", "--trust", "a", "--x=1", "--trust=b,c", "--trusty=d"]) == ["a", "b", "c"]
    assert trusted_packages(["fit", "--trust="]) == []


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_what_is_no_terminal(stream, monkeypatch):
    """A process may have been started without a standard output."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert not _is_terminal()


@pytest.mark.parametrize(("command", "doing"), [("validate", "validating"), ("test", "testing")])
def test_without_training_the_line_counts_batches(options, capsys, monkeypatch, command, doing):
    train.main([*options, *SHOWN])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("callbacks.progress_line.SECONDS", 0.0)
    capsys.readouterr()
    last = "--ckpt_path=runs/version_0/checkpoints/last.ckpt"
    cli = train.main([command, *options[1:], "--trainer.enable_progress_bar=true", last])
    (batches,) = cli.trainer.num_val_batches if command == "validate" else cli.trainer.num_test_batches
    out = capsys.readouterr().out
    assert [f"{doing} {i}/{batches}" in out for i in (1, batches, batches + 1)] == [True, True, False]
