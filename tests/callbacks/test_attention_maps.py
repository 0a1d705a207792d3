"""Maps of every architecture are logged with the right numbers, and training does not change."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.utils.visualization import map_statistics
from callbacks import AttentionMaps


def events(logger: TensorBoardLogger) -> EventAccumulator:
    accumulator = EventAccumulator(logger.log_dir, {"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pictures_and_numbers_of_every_architecture(name, make_data, make_module, make_trainer, tmp_path):
    """BSBR for seven steps; the others for one, because a picture takes longer than a step."""
    logger = TensorBoardLogger(tmp_path)
    module, data = make_module(name), make_data()
    steps, drawn = (7, [2, 5, 6]) if name == "bsbr" else (1, [0])
    make_trainer(logger=logger, callbacks=AttentionMaps(every_n_steps=3), max_steps=steps).fit(module, data)
    found = events(logger)
    tags = {"attention/maps", "attention/chunk_map"} if name == "bsbr" else {"attention/maps"}
    assert set(found.Tags()["images"]) == tags
    assert [image.step for image in found.Images("attention/maps")] == drawn, "every third step, and the last"

    ids = next(iter(data.val_dataloader()))["input_ids"][:1]
    weights = module.model.eval().get_attention_weights(ids)[1, 0]
    t, j = torch.arange(32)[:, None], torch.arange(32)
    chunks, two_chunks, window = t // 8 == j // 8, t // 8 - j // 8 < 2, t - j < 8
    exact = {"sliding_window": window, "bsbr": window, "gau": chunks, "moba": chunks, "nsa": two_chunks}.get(name)
    expected = map_statistics(weights, ids[0], exact)
    assert ("outside_share" in expected) == (exact is not None)
    for statistic, value in expected.items():
        assert found.Scalars(f"attention/{statistic}/layer1")[-1].value == pytest.approx(value, rel=1e-5)
    logged = {tag.split("/")[1] for tag in found.Tags()["scalars"] if tag.startswith("attention/")}
    assert logged == set(expected)
    if name == "sliding_window":
        assert expected["outside_share"] == 0


def logged_share(module, data, make_trainer, lines) -> set[float] | None:
    """The values of `outside_share` that AttentionMaps logs of an untrained module; None if there are none."""
    trainer = make_trainer(logger=lines, callbacks=AttentionMaps(), max_steps=1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    module.configure_optimizers = lambda: optimizer  # the weights stay as they are
    trainer.fit(module, data)
    metrics = {key: value for _, line in lines.of("attention/") for key, value in line.items()}
    return {value for key, value in metrics.items() if "outside_share" in key} or None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_size": 5},
        {"chunk_size": 1},
        {"overlap": False},
        {"overlap": False, "chunk_size": 5},
        {"retrieval_top_k": 1, "conv_size": 1, "rope": False},
    ],
)
def test_without_retrieval_no_weight_is_outside(make_data, make_module, make_trainer, lines, options):
    """The gain of BSBR starts at 0, so an untrained model retrieves nothing."""
    assert logged_share(make_module("bsbr", **options), make_data(), make_trainer, lines) == {0.0}


@pytest.mark.parametrize("window", [1, 5, 8])
def test_no_weight_is_outside_a_window(make_data, make_module, make_trainer, lines, window):
    module = make_module("sliding_window", window_size=window)
    assert logged_share(module, make_data(), make_trainer, lines) == {0.0}


@pytest.mark.parametrize("overlap", [True, False])
def test_with_retrieval_the_share_is_the_weight_outside(make_data, make_module, make_trainer, lines, overlap):
    """Against a loop over heads, queries and keys."""
    module, data = make_module("bsbr", initial_gain=0.5, overlap=overlap), make_data()
    ids = next(iter(data.val_dataloader()))["input_ids"][:1]
    with torch.no_grad():
        maps = module.model.get_attention_weights(ids)[:, 0].abs().tolist()
    expected = []
    for layer in maps:
        shares = []
        for head in layer:
            for t, row in enumerate(head):
                exact = range(t - 7, t + 1) if overlap else range(t // 8 * 8, t + 1)
                shares.append(sum(weight for j, weight in enumerate(row) if j not in exact) / sum(row))
        expected.append(sum(shares) / len(shares))
    found = logged_share(module, data, make_trainer, lines)
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-5)
    assert min(found) > 0.01


@pytest.mark.parametrize("name", ["linear", "delta_net", "gated_delta_net"])
def test_an_option_of_speed_changes_no_number(name, make_data, make_module, make_trainer, lines):
    """The same weights with chunks of 4 and of 16: the same map, so the same numbers, and no bound, so no share."""
    found = []
    for chunk_size in (4, 16):
        lines.lines.clear()
        assert logged_share(make_module(name, chunk_size=chunk_size), make_data(), make_trainer, lines) is None
        found.append({key: value for _, line in lines.of("attention/") for key, value in line.items()})
    assert found[0].keys() == found[1].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_layers_of_different_architectures(make_data, make_trainer, lines):
    from bsbr_pl.module import LanguageModule

    torch.manual_seed(0)
    mixed = [ARCHITECTURES["gau"], ARCHITECTURES["standard"]]
    module = LanguageModule(mixed, 257, hidden_dim=16, num_layers=2, num_heads=2)
    make_trainer(logger=lines, callbacks=AttentionMaps(), max_steps=1).fit(module, make_data())
    keys = {key for key in lines.keys() if key.startswith("attention/entropy")}  # noqa: SIM118
    assert keys == {f"attention/entropy_nats/layer{i}" for i in range(3)}, "a layer of GAU is two attentions"


def test_an_architecture_without_maps_is_named_once(make_data, make_module, make_trainer, lines, caplog):
    module = make_module("bsbr", compression_factor=2)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        make_trainer(logger=lines, callbacks=AttentionMaps(2), max_steps=4).fit(module, make_data())
    assert caplog.text.count("AttentionMaps skips BSBRAttention: ") == 1
    assert not lines.of("attention/")


def test_the_callback_leaves_modes_and_random_state_alone(make_data, make_module, make_trainer, lines):
    module = make_module(dropout=0.5)
    callback = AttentionMaps()
    trainer = make_trainer(logger=lines, callbacks=callback, max_steps=1)
    trainer.fit(module, make_data())
    module.model.train()
    module.model.branches[0].eval()  # frozen by somebody
    modes, state = [m.training for m in module.modules()], torch.get_rng_state()
    callback._look(trainer, module)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_validation_set_it_says_so(make_data, make_module, make_trainer, caplog):
    loader = make_data().val_dataloader()
    module = make_module()
    module.validation_step = None
    trainer: Trainer = make_trainer(callbacks=AttentionMaps(), max_steps=1, val_check_interval=1)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.fit(module, loader)
    assert "there is no validation set" in caplog.text


def test_plain_loaders_work_and_draw_the_same_numbers(make_data, make_module, make_trainer, lines):
    batches = list(make_data().val_dataloader())
    weights = []
    for used in ([], [AttentionMaps(1)]):
        # Shuffled by the global random state: a number drawn for the probe would change what is trained on.
        shuffled, plain = (torch.utils.data.DataLoader(batches, batch_size=None, shuffle=s) for s in (True, False))
        module = make_module()
        make_trainer(logger=lines, callbacks=used, max_steps=3, val_check_interval=2).fit(module, shuffled, plain)
        weights.append(module.model.state_dict())
    assert lines.of("attention/")
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("name", ["every_n_steps", "max_length"])
def test_arguments_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
        AttentionMaps(**{name: 0})


def test_a_step_of_several_batches_is_drawn_once(make_data, make_module, make_trainer, lines):
    settings = {"max_steps": 3, "accumulate_grad_batches": 2}
    make_trainer(logger=lines, callbacks=AttentionMaps(1), **settings).fit(make_module(), make_data())
    steps = [step for step, _ in lines.of("attention/")]
    assert steps == [0, 1, 2]
