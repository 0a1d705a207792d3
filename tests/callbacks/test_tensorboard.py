"""A real run, read in a real TensorBoard: over HTTP, and where Chromium is installed as a person sees it."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks import AttentionMaps, Dashboard, FlopCounter, PeakMemory, RunRecorder, StepTimer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"


@pytest.fixture(scope="module")
def board(make_data, make_module, tmp_path_factory):
    """Address of a TensorBoard that shows a run of BSBR with all callbacks."""
    folder = tmp_path_factory.mktemp("runs")
    watched = [StepTimer(), PeakMemory(), FlopCounter(), AttentionMaps(every_n_steps=20), Dashboard(), RunRecorder()]
    trainer = Trainer(
        logger=TensorBoardLogger(folder, name=None, default_hp_metric=False),
        callbacks=watched,
        accelerator="cpu",
        max_epochs=-1,
        max_steps=40,
        log_every_n_steps=4,
        val_check_interval=20,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_module("bsbr"), make_data())
    command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", folder, "--port", "0"]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        for line in server.stdout:
            if address := re.search(r"http://\S+?:\d+/", line):
                break
        else:
            pytest.fail("TensorBoard ended without an address")
        yield address[0]
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()


def get(address: str):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)


def test_it_serves_every_family_of_metrics_and_the_pictures(board):
    (scalars,) = get(f"{board}data/plugin/scalars/tags").values()
    assert {"step/seconds", "memory/peak_resident_bytes", "flops/utilization", "train/gradient_norm"} <= set(scalars)
    assert "attention/entropy_nats/layer0" in scalars
    (images,) = get(f"{board}data/plugin/images/tags").values()
    assert set(images) == {"attention/maps", "attention/chunk_map"}
    found = get(f"{board}data/plugin/scalars/scalars?run=version_0&tag=step/seconds")
    assert [step for _, step, _ in found] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at TensorBoard: apt install chromium")
@pytest.mark.parametrize("page", ["custom_scalars", "images"])
def test_it_is_seen_in_a_browser(board, page, tmp_path):
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"tensorboard_{page}.png"
    flags = [*QUIET.split(), f"--user-data-dir={tmp_path}/profile", "--window-size=1500,1300"]
    flags += ["--virtual-time-budget=15000", f"--screenshot={picture}", f"{board}?darkMode=false#{page}"]
    subprocess.run([CHROMIUM, *flags], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (1300, 1500, 3)
    orange = (pixels[..., 0] > 220) & (abs(pixels[..., 1] - 120) < 60) & (pixels[..., 2] < 60)
    assert orange.sum() > 5000, "TensorBoard's own bar is there"
    content = pixels[150:, 350:].reshape(-1, 3)
    assert len(np.unique(content, axis=0)) > 50, "curves or pictures, not an empty page"
