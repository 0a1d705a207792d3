"""The defaults that published rows rest on: rows name only what differs from them."""

import inspect

import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import DATA_SETS
from bsbr_pl.data.tasks import mqar
from bsbr_pl.evals.certificate import certify
from bsbr_pl.evals.costs import measure_costs
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.research import ExperimentRunner
from bsbr_pl.utils.timing import measure
from bsbr_pl.values import bootstrap_interval, crossover, exponent
from callbacks import AttentionMaps, FlopCounter, LastCheckpoint

CHUNKED = {"chunk_size": 64, "conv_size": 4}
DELTA = {"allow_neg_eigval": False, "head_dim": None, "expand_v": 1.0}
SAMPLES = {"num_train": 100_000, "seed": 0, "num_workers": 0}
EXPECTED = {
    "standard": {"rope": True, "bias": False, "conv_size": 1},
    "sliding_window": {"window_size": 128, "rope": True, "bias": False, "conv_size": 1, "output_gate": False},
    "moba": {"chunk_size": 64, "top_k": 3, "rope": True, "conv_size": 1, "qk_norm": False, "output_gate": False},
    "linear": CHUNKED | {"output_norm": "denominator"},
    "delta_net": CHUNKED | DELTA | {"output_gate": False},
    "gated_delta_net": CHUNKED | DELTA | {"decay_init": "spaced"},
    "gated_delta_product": {"chunk_size": 32, "conv_size": 4, "conv_init": "uniform", "num_steps": 2}
    | {"forget_gate": True, "allow_neg_eigval": True},
    "retnet": {"chunk_size": 64, "conv_size": 1, "conv_init": "identity", "expand_v": 2.0},
    "rwkv7": {"chunk_size": 64, "rank": 32},
    "gla": CHUNKED | {"expand_k": 1.0, "gate_rank": 16, "tied_keys": False},
    "mamba2": CHUNKED | {"expansion_factor": 2, "key_dim": 64},
    "log_linear": CHUNKED | {"expansion_factor": 2, "key_dim": 64, "num_levels": 15},
    "kda": CHUNKED | {"allow_neg_eigval": False},
    "fox": {"rope": False, "qk_norm": False, "kv_shift": False, "output_gate": False},
    "hopfield": {"num_updates": 1, "beta": None, "rope": True},
    "gau": {"num_heads": 1, "chunk_size": 128, "expansion_factor": 2, "key_dim": 128, "rope": True, "published": False},
    "nsa": {"chunk_size": 64, "top_k": 4, "window_size": 128, "rope": True, "conv_size": 1, "num_kv_heads": None},
    "bsbr": {
        **{"chunk_size": 128, "retrieval_top_k": None, "compression_factor": 1, "router_dim": None, "normalize": True},
        **{"route_every": None, "initial_gain": 0.0, "rope": True, "overlap": True, "conv_size": 4, "bias": False},
        **{"qk_norm": False, "output_gate": False},
    },
    "TextData": {"bpe_vocab_size": 4096, "context_length": 512, "batch_size": 8, "seed": 0, "num_workers": 0}
    | {"val_fraction": 0.05, "test_fraction": 0.05, "streaming": False, "join_rows": False, "max_rows": None},
    "MQARData": {"vocab_size": 8192, "train_segments": ((64, 4, 100_000),), "test_segments": ((64, 4, 3_000),)}
    | {"random_filler": False, "power": 0.01, "batch_size": 64, "seed": 0, "num_workers": 0},
    "InductionData": SAMPLES
    | {"vocab_size": 16, "context_length": 256, "test_lengths": (64, 128, 256, 512, 1024), "num_test": 1_000},
    "SelectiveCopyData": SAMPLES | {"vocab_size": 16, "context_length": 256, "num_copied": 16, "num_test": 1_000},
    "NeedleData": SAMPLES
    | {"bpe_vocab_size": 4096, "context_length": 512, "depths": (0.0, 0.25, 0.5, 0.75, 1.0), "num_test": 200},
    "MADData": {"task": "memorization", "num_test": 1_280, "batch_size": 128, "seed": 0}
    | dict.fromkeys(("vocab_size", "context_length", "num_train", "noise_share", "motif_size", "num_copied"), None),
    "StateTrackingData": SAMPLES
    | {"task": "parity", "train_lengths": (3, 40), "test_lengths": (40, 80, 160, 320), "ask": "every", "num_test": 500}
    | {"modulus": 5, "num_pairs": 4, "num_symbols": 8, "batch_size": 256, "eval_batch_size": None},
    "LanguageModule": {"learning_rate": 3e-3, "min_learning_rate": 0.0, "warmup_steps": 50, "weight_decay": 0.1}
    | {"beta1": 0.9, "beta2": 0.95},
    "mqar": {"random_filler": False, "power": 0.01},
    "measure": {"rounds": 10, "warmup": 2, "min_seconds": 0.0},
    "measure_costs": {"rounds": 5, "seed": 0},
    "bootstrap_interval": {"confidence": 0.95, "resamples": 2000, "seed": 0},
    "exponent": {"shortest": 0, "resamples": 1000},
    "crossover": {"resamples": 1000},
    "certify": {"seed": 0},
    "ExperimentRunner": {"rounds": 3, "seed": 0},
    "FlopCounter": {"warmup_steps": 3},
    "AttentionMaps": {"every_n_steps": 300, "max_length": 512},
    "LastCheckpoint": {"every_n_steps": 100},
}
FUNCTIONS = (
    mqar,
    measure,
    measure_costs,
    bootstrap_interval,
    exponent,
    crossover,
    certify,
    ExperimentRunner,
    LanguageModule,
)
OTHERS = {one.__name__: one for one in (*FUNCTIONS, FlopCounter, AttentionMaps, LastCheckpoint)}


@pytest.mark.parametrize("name", EXPECTED)
def test_defaults_do_not_change_in_silence(name):
    subject = {**ARCHITECTURES, **DATA_SETS, **OTHERS}[name]
    found = {one.name: one.default for one in inspect.signature(subject).parameters.values()}
    assert {argument: found[argument] for argument in EXPECTED[name]} == EXPECTED[name]


D, H, K = 24, 3, 8
CONVOLUTION = 4 * 3 * D
PARAMETERS = {  # parameters by hand: maps with a bias only where the formula has one
    "standard": 4 * D * D,
    "sliding_window": 4 * D * D,
    "linear": 4 * D * D + CONVOLUTION,
    "delta_net": 4 * D * D + CONVOLUTION + (D + 1) * H + K,
    "gated_delta_net": 5 * D * D + CONVOLUTION + 2 * (D + 1) * H + H + K,
    "gated_delta_product": 7 * D * D + 4 * 5 * D + 3 * (D + 1) * H + H + K,
    "moba": 4 * D * D,
    "retnet": 8 * D * D + 2 * K,
    "rwkv7": 4 * D * D + 3 * (2 * 32 * D) + 2 * D + 6 * D + 5 * D,
    "gla": 5 * D * D + CONVOLUTION + 2 * 16 * D + D + K,
    "mamba2": (2 * 64 + 2 * D) * (D + 4 + 1) + 2 * (2 * D * D) + (D + 1) * H + 2 * H + 2 * D,
    "log_linear": (2 * 64 + 2 * D) * (D + 4 + 1) + 2 * (2 * D * D) + (D + 1) * (1 + 15) * H + 2 * H + 2 * D,
    "kda": 4 * D * D + CONVOLUTION + D * H + 2 * (2 * K * D + D) + H + K,
    "fox": 4 * D * D + (D + 1) * H,
    "hopfield": 4 * D * D + H,
    "gau": 3 * (2 * D * D) + 128 * D + 2 * 4 * 128,
    "nsa": 4 * D * D + 3 * D * H,
    "bsbr": 6 * D * D + CONVOLUTION + H,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_number_of_parameters(name):
    assert sum(parameter.numel() for parameter in ARCHITECTURES[name](D, H).parameters()) == PARAMETERS[name]


def test_published_widths_of_gated_delta_net():
    """Keys of 3 D / 4, values of 3 D / 2, as published: the maps have 6 D^2 parameters."""
    gated = ARCHITECTURES["gated_delta_net"](D, H, head_dim=6, expand_v=2.0)
    maps = 6 * D * D + 4 * (2 * 18 + 36)
    assert sum(parameter.numel() for parameter in gated.parameters()) == maps + 2 * (D + 1) * H + H + 12


def test_state_size_is_chosen_apart_from_the_width():
    one_head = ARCHITECTURES["delta_net"](128, 1, conv_size=1)
    four_heads = ARCHITECTURES["delta_net"](128, 4, head_dim=64, conv_size=1)
    assert one_head.state_size(1) == four_heads.state_size(1) == 128 * 128


def test_random_decays_are_the_published_ones():
    torch.manual_seed(0)
    gated = ARCHITECTURES["gated_delta_net"](4, 4000, head_dim=1, decay_init="random")
    rate, dt = gated.log_rate.exp(), torch.nn.functional.softplus(gated.decay.bias)
    assert 0 < rate.min() < 0.1 < 15.9 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8, abs=0.3)
    assert 0.000999 < dt.min() < 0.0011 < 0.09 < dt.max() < 0.1001
    assert dt.log10().mean().item() == pytest.approx(-2, abs=0.05)
    with pytest.raises(ValueError, match="decay_init must be one of spaced, random, got 'other'"):
        ARCHITECTURES["gated_delta_net"](4, 2, decay_init="other")


def test_the_published_start_of_gau():
    torch.manual_seed(0)
    gau = ARCHITECTURES["gau"](D, published=True)
    for start, numbers in ((gau.scale, 4 * 128), (gau.bias, 128)):
        assert start.numel() == numbers
        assert start.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(gau.offset, torch.zeros(4, 128))
    with pytest.raises(ValueError, match=r"chunk_size must be at most 512 if published, .* got 513"):
        ARCHITECTURES["gau"](D, chunk_size=513, published=True)
    own = ARCHITECTURES["gau"](D)
    assert own.bias is None
    assert own.scale[:, 0].tolist() == pytest.approx([1, 1, 128**-0.5, 128**-0.5])


def test_a_norm_of_linear_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="output_norm must be one of denominator, rms, got 'none'"):
        ARCHITECTURES["linear"](16, 2, output_norm="none")


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
def test_widths_of_the_delta_nets_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match=r"expand_v must be above 0, with .* whole number, got 0\.3"):
        ARCHITECTURES[name](16, 2, expand_v=0.3)
    with pytest.raises(ValueError, match="head_dim must be a positive integer, got 0"):
        ARCHITECTURES[name](16, 2, head_dim=0)
    assert ARCHITECTURES[name](16, 3, head_dim=4).out.weight.shape == (16, 12), "heads need not divide the width"


def test_initial_values():
    torch.manual_seed(0)
    assert ARCHITECTURES["hopfield"](D, H).beta.flatten().tolist() == pytest.approx([K**-0.5] * H)
    assert ARCHITECTURES["hopfield"](D, H, beta=0.3).beta.flatten().tolist() == pytest.approx([0.3] * H)
    bsbr = ARCHITECTURES["bsbr"](256, 4, compression_factor=4, initial_gain=0.5)
    assert bsbr.gain.flatten().tolist() == [0.5] * 4
    assert bsbr.down.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert bsbr.up.std().item() == pytest.approx(16**-0.5, rel=0.05)
    decay = torch.nn.functional.softplus(ARCHITECTURES["gated_delta_net"](D, H).decay.bias)
    assert decay.tolist() == pytest.approx([0.1, 0.01, 0.001], rel=1e-3), "memories of 10 to 1000 tokens"


SIZES = ("chunk_size", "conv_size", "window_size", "num_steps", "rank", "gate_rank", "key_dim", "expansion_factor")
ZEROS = [
    (name, size) for name, kind in ARCHITECTURES.items() for size in SIZES if size in inspect.signature(kind).parameters
]


@pytest.mark.parametrize(("name", "size"), ZEROS)
def test_a_size_of_zero_is_refused(name, size):
    with pytest.raises(ValueError, match=f"^{size} must be a positive integer, got 0$"):
        ARCHITECTURES[name](D, H, **{size: 0})
