"""Damaged and hostile checkpoints, in every way that a checkpoint is used: refused in a sentence, or whole."""

import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
from faults.damage import damages, equal, outcome, ways

from bsbr_pl.checkpoint import CheckedCheckpointIO, load_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_thread):
    """The checkpoint of a tiny run, and every way to use it."""
    argv, sys.argv = sys.argv, ["train.py"]
    yield ways(tmp_path_factory.mktemp("made"))
    sys.argv = argv


READ = ("load_checkpoint", "LanguageModule.load", "evaluate.py")
TRAIN = ("train.py fit", "train.py validate", "train.py test")


@pytest.mark.parametrize("way", READ)
def test_damage_is_refused_or_makes_no_difference(way, made, tmp_path):
    whole, uses = made
    expected = uses[way](whole)
    found = []
    for what, content in damages(whole.read_bytes()):
        (tmp_path / "damaged.ckpt").write_bytes(content)
        found.append(outcome(uses[way], tmp_path / "damaged.ckpt", expected))
        assert found[-1] in ("refused", "equal"), f"{what}: {found[-1]}"
    assert set(found[:50]) == {"refused"}, "cut short"
    assert found.count("refused") > 200


def test_a_part_that_is_marked_as_a_folder_is_refused(made, tmp_path):
    """Torch would not read it, and take what lies in memory for the tensor; its checksum is right."""
    content = bytearray(made[0].read_bytes())
    entry = content.index(b"archive/data/0", content.index(b"PK\1\2")) - 46  # in the directory at the end
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 38] |= 0x10
    (tmp_path / "marked.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"marked.ckpt is not a readable checkpoint: .*archive/data/0"):
        load_checkpoint(tmp_path / "marked.ckpt")


@pytest.mark.parametrize("way", TRAIN)
def test_no_command_goes_on_from_a_damaged_checkpoint(way, made, tmp_path):
    whole, uses = made
    content = bytearray(whole.read_bytes())
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    weight = torch.load(whole, weights_only=True)["state_dict"]["model.embedding.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "turned.ckpt").write_bytes(content)
    torch.load(tmp_path / "turned.ckpt", weights_only=True)  # torch itself sees nothing
    for name in ("cut.ckpt", "turned.ckpt"):
        assert outcome(uses[way], tmp_path / name, None) == "refused"


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", [*READ, *TRAIN])
def test_code_in_a_checkpoint_is_not_run(way, made, tmp_path):
    whole, uses = made
    hostile = load_checkpoint(whole) | {"callbacks": Hostile(tmp_path / "ran")}
    torch.save(hostile, tmp_path / "zipped.ckpt")
    torch.save(hostile, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickled.ckpt").write_bytes(pickle.dumps(hostile["callbacks"]))
    for name in ("zipped.ckpt", "old.ckpt", "pickled.ckpt") if way in READ else ("zipped.ckpt",):
        assert outcome(uses[way], tmp_path / name, None) == "refused"
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zipped.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the code is there, and would run"


def test_what_is_not_trusted_is_said(made, tmp_path):
    whole, _ = made
    torch.save(load_checkpoint(whole) | {"callbacks": Hostile(tmp_path)}, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match=r"hostile.ckpt is not a readable checkpoint: .* is never executed"):
        load_checkpoint(tmp_path / "hostile.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign.ckpt is not a readable checkpoint: .*no hyper_parameters"):
        load_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"none.ckpt is not a readable checkpoint: No such file"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_that_finds_no_room_leaves_the_older_one(made, tmp_path):
    whole, _ = made
    checkpoint, path = load_checkpoint(whole), tmp_path / "best.ckpt"
    CheckedCheckpointIO().save_checkpoint(checkpoint, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"best\.ckpt"):
            CheckedCheckpointIO().save_checkpoint(checkpoint | {"epoch": 99}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert equal(load_checkpoint(path), checkpoint)
    assert list(tmp_path.iterdir()) == [path]
