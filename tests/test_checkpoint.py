"""Damaged and hostile checkpoints, in every way that a checkpoint is used: refused in a sentence, or whole."""

import io
import math
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import environment, fuzz_checkpoints
from faults.damage import damages, equal, outcome, tiny, ways
from faults.fuzz_checkpoints import pack, parts_of

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


def refusal(content: bytes, folder: Path) -> str:
    """What `load_checkpoint` says of a file with this content."""
    (folder / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is not a readable checkpoint: ") as error:
        load_checkpoint(folder / "x.ckpt")
    return str(error.value).partition("checkpoint: ")[2]


def test_an_archive_as_torch_writes_it_is_read(made, tmp_path):
    """`pack` is written from the format alone: the archives of the other tests differ from it in one thing only."""
    content = made[0].read_bytes()
    (tmp_path / "again.ckpt").write_bytes(pack(parts_of(content)))
    assert equal(load_checkpoint(tmp_path / "again.ckpt"), torch.load(made[0], weights_only=True))


def test_a_file_is_one_archive_from_its_first_byte_to_its_last(made, tmp_path):
    content = made[0].read_bytes()
    parts = parts_of(content)
    zeros = [(name, bytes(len(part)) if name.endswith("data/0") else part) for name, part in parts]
    old = io.BytesIO()
    torch.save(load_checkpoint(made[0]), old, _use_new_zipfile_serialization=False)
    whole = "the archive is not the whole file"
    assert "does not follow the part before it" in refusal(pack(zeros) + content, tmp_path)
    assert "does not follow the part before it" in refusal(old.getvalue() + content, tmp_path)
    assert "does not follow the part before it" in refusal(b"x" + content, tmp_path)
    assert "does not follow the part before it" in refusal(pack(parts, gap=bytes(64)), tmp_path)
    assert whole in refusal(content + bytes(9), tmp_path)
    assert whole in refusal(content[:-2] + b"\4\0abcd", tmp_path)
    assert "version is in it twice" in refusal(pack([*parts, parts[-2]]), tmp_path)
    assert "is no part of a checkpoint" in refusal(pack([*parts, ("archive/code/a.py", b"1")]), tmp_path)
    assert "no tensor shows data/999" in refusal(pack([*parts, ("archive/data/999", b"1")]), tmp_path)
    assert "several folders" in refusal(pack([*parts[:-1], ("x/.data/serialization_id", b"3")]), tmp_path)


def test_a_directory_that_disagrees_with_its_members_is_refused(made, tmp_path):
    parts = parts_of(made[0].read_bytes())
    for field in ("crc", "size", "offset"):
        for change in (1, -1, 64):
            assert refusal(pack(parts, wrong={4: {field: change}}), tmp_path)


def test_nothing_is_inflated(made, tmp_path):
    parts = parts_of(made[0].read_bytes())
    assert "archive/data/0 was changed" in refusal(pack(parts, deflated=4), tmp_path)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert "archive/data.pkl was changed" in refusal(bomb.getvalue(), tmp_path)


NOT_HELD = {
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    "stretched": (lambda: torch.zeros(1).expand(10**9), "overlap"),
    "overlapping": (lambda: torch.zeros(100).unfold(0, 10, 5), "overlap"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    "on meta": (lambda: torch.zeros(3, device="meta"), "_rebuild_meta_tensor_no_storage"),
    "bytearray": (lambda: bytearray(3), "builtin"),
    "repeated": (fuzz_checkpoints.laughs, "more values than bytes"),
    "deep": (lambda: fuzz_checkpoints.nested(65), "nested more than 64 levels deep"),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("name", NOT_HELD)
def test_only_dense_real_tensors_and_plain_values_are_held(name, made, tmp_path):
    value, words = NOT_HELD[name]
    out = io.BytesIO()
    torch.save(load_checkpoint(made[0]) | {"x": value()}, out)
    assert words in refusal(out.getvalue(), tmp_path)


def test_tensors_of_one_storage_share_it_and_transposed_ones_come_back(made, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    held = {"base": base, "column": base[:, 1], "transposed": base.T, "none": base[:0], "one": base[1, 1].expand(1, 1)}
    torch.save(load_checkpoint(made[0]) | {"x": held}, tmp_path / "views.ckpt")
    found = load_checkpoint(tmp_path / "views.ckpt")["x"]
    assert equal(found, held)
    assert found["column"].data_ptr() == found["base"].data_ptr() + 4
    assert found["transposed"].stride() == (1, 4)


def rewritten(content: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    """The archive with its pickle changed at one place each."""
    (name, script), *rest = parts_of(content)
    for before, after in changes:
        assert script.count(before) == 1
        script = script.replace(before, after)
    return pack([(name, script), *rest])


def test_sizes_are_bounded_by_the_file(made, tmp_path):
    out = io.BytesIO()
    torch.save(load_checkpoint(made[0]) | {"x": torch.arange(1234.0)}, out)
    count, size = b"M\xd2\x04tr", b"K\x00M\xd2\x04\x85r"  # 1234 numbers of the storage; offset 0, size (1234,)
    content = out.getvalue()
    assert "does not have 2000 numbers" in refusal(rewritten(content, (count, b"M\xd0\x07tr")), tmp_path)
    assert "exceeds its storage of 1234" in refusal(rewritten(content, (size, b"K\x01M\xd2\x04\x85r")), tmp_path)
    assert "no place of a tensor" in refusal(rewritten(content, (size, b"J\xff\xff\xff\xffM\xd2\x04\x85r")), tmp_path)
    short = rewritten(content, (size, b"K\x07M\x64\x00\x85r"))  # from 7, 100 of them
    (tmp_path / "short.ckpt").write_bytes(short)
    assert equal(load_checkpoint(tmp_path / "short.ckpt")["x"], torch.arange(7.0, 107.0))


@pytest.mark.parametrize(
    "instructions",
    [
        b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R0",
        b"ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R0",
        b"Nr\xff\xff\xff\x7f0",  # a place in the memo that takes gigabytes
        b"X\xff\xff\xff\xffabc",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aK\x01s\x86b0",  # would change the reader
    ],
)
def test_no_instruction_takes_memory_or_changes_the_reader(instructions, made, tmp_path):
    (name, script), *rest = parts_of(made[0].read_bytes())
    assert refusal(pack([(name, script[:2] + instructions + script[2:]), *rest]), tmp_path)
    assert load_checkpoint(made[0])


@pytest.mark.parametrize(("value", "words"), [({1, 2}, "__builtin__.set"), (torch.zeros(1).expand(9), "overlap")])
def test_what_could_not_be_read_again_is_not_written(value, words, made, tmp_path):
    checkpoint = load_checkpoint(made[0]) | {"callbacks": {"seen": value}}
    with pytest.raises(ValueError, match=rf"x.ckpt could not be read again \(.*{words}.*\): a callback's state may"):
        CheckedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


def changed(*to: Any) -> Callable[[Any], Any]:
    """The optimisers' states with another moment of the embedding, or none."""

    def change(states: Any) -> Any:
        moments = states[0]["state"].pop("model.embedding.weight")
        if to:
            states[0]["state"]["model.embedding.weight"] = moments | {to[0]: to[1]}
        return states

    return change


def recorded(metrics: dict[str, Any]) -> Callable[[Any], Any]:
    """The callbacks' states with these metrics in the record."""
    return lambda states: states | {"RunRecorder": states["RunRecorder"] | {"metrics": metrics}}


OMITTED = object()
NOT_OF_A_RUN = {
    "optimizer_states is of type float": {"optimizer_states": 5.5},
    "loops is of type list": {"loops": [{}]},
    "callbacks is of type str": {"callbacks": "x"},
    "global_step is of type float": {"global_step": 5.5},
    "cannot be restored: KeyError: 'param_groups'": {"optimizer_states": [{}]},
    "the checkpoint lacks the state of its training loop": {"loops": {}},
    "the checkpoint lacks the state of its training": {"loops": OMITTED},
    "must have one entry of optimizer_states, and has 0": {"optimizer_states": []},
    "must have one entry of lr_schedulers, and has 0": {"lr_schedulers": []},
    "the checkpoint's record.metrics.val/loss must be of type object": {"callbacks": recorded({"val/loss": [1]})},
    "the checkpoint's record.metrics.val/loss lacks step": {"callbacks": recorded({"val/loss": {1: 2}})},
    "the checkpoint's record.metrics.epoch.value must be of type list": {
        "callbacks": recorded({"epoch": {"step": [1], "seconds": [1.0], "value": math.nan}})
    },
    "the checkpoint's record.metrics.epoch has columns of different": {
        "callbacks": recorded({"epoch": {"step": [1, 2], "seconds": [1.0], "value": [1.0]}})
    },
    "cannot be restored: AttributeError: 'int' object has": {"loops": {"fit_loop": 3}},
    "state in the checkpoint is not that of its weights": {"optimizer_states": changed("exp_avg", torch.zeros(3))},
    "state in the checkpoint lacks model.embedding.weight": {"optimizer_states": changed()},
    "the checkpoint's loops have completed={}, which is no": {"loops": {"fit_loop": {"total": {"completed": {}}}}},
    "weights are not those of its model: 0 is not in both": {"state_dict": {0: None}},
}


@pytest.mark.parametrize("words", NOT_OF_A_RUN)
def test_what_no_run_can_be_resumed_from_is_said(words, made, tmp_path):
    whole = made[0]
    checkpoint = load_checkpoint(whole)
    for part, value in NOT_OF_A_RUN[words].items():
        checkpoint[part] = value(checkpoint[part]) if callable(value) else value
    checkpoint = {part: value for part, value in checkpoint.items() if value is not OMITTED}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt|the checkpoint") as error:
        fuzz_checkpoints.trained(tmp_path / "x.ckpt", tiny(whole.parents[3]))
    assert words in str(error.value)


def test_mutations_of_the_structure_are_refused_or_make_no_difference(capsys):
    environment.preload("faults.fuzz_checkpoints")
    assert fuzz_checkpoints.run(12, seed=0) == 0, capsys.readouterr().out


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
