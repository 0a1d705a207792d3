"""The attention architectures, one self-contained file each, under the contract of `base.Attention`."""

from .base import Attention
from .bsbr import BSBRAttention
from .delta_net import DeltaNetAttention
from .fox import FoXAttention
from .gated_delta_net import GatedDeltaNetAttention
from .gated_delta_product import GatedDeltaProductAttention
from .gau import GAUAttention
from .gla import GLAAttention
from .hopfield import HopfieldAttention
from .kda import KDAAttention
from .linear import LinearAttention
from .log_linear import LogLinearAttention
from .mamba2 import Mamba2Attention
from .moba import MoBAAttention
from .nsa import NSAAttention
from .retnet import RetNetAttention
from .rwkv7 import RWKV7Attention
from .sliding_window import SlidingWindowAttention
from .standard import StandardAttention

#: Registry key -> class; the key is also the name of the architecture's file and of its YAML.
ARCHITECTURES: dict[str, type[Attention]] = {
    "standard": StandardAttention,
    "sliding_window": SlidingWindowAttention,
    "linear": LinearAttention,
    "delta_net": DeltaNetAttention,
    "gated_delta_net": GatedDeltaNetAttention,
    "gated_delta_product": GatedDeltaProductAttention,
    "retnet": RetNetAttention,
    "gla": GLAAttention,
    "mamba2": Mamba2Attention,
    "log_linear": LogLinearAttention,
    "kda": KDAAttention,
    "rwkv7": RWKV7Attention,
    "fox": FoXAttention,
    "hopfield": HopfieldAttention,
    "gau": GAUAttention,
    "moba": MoBAAttention,
    "nsa": NSAAttention,
    "bsbr": BSBRAttention,
}

__all__ = [
    "ARCHITECTURES",
    "Attention",
    "BSBRAttention",
    "DeltaNetAttention",
    "FoXAttention",
    "GAUAttention",
    "GLAAttention",
    "GatedDeltaNetAttention",
    "GatedDeltaProductAttention",
    "HopfieldAttention",
    "KDAAttention",
    "LinearAttention",
    "LogLinearAttention",
    "Mamba2Attention",
    "MoBAAttention",
    "NSAAttention",
    "RWKV7Attention",
    "RetNetAttention",
    "SlidingWindowAttention",
    "StandardAttention",
]
