"""Gives an example config of every mixer, with sizes that all differ."""

import dataclasses

from decodax.layers.alibi import Alibi
from decodax.layers.head_norms import HeadNorms
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gated_linear import GatedLinearConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mfa import MFAConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.mixers.short_convolution import ShortConvolutionConfig
from decodax.layers.norm import RMSNormConfig
from decodax.layers.rope import Rope
from tests.contracts.outside import OUTSIDE

_ROPE = Rope(4, 100.0)
_NORM = RMSNormConfig(1e-5)


def gqa():
    options = {
        "head_norms": HeadNorms(_NORM, _NORM),
        "sinks": True,
        "output_gate": True,
        "softcap": 2.0,
        "qkv_bias": True,
    }
    late = HeadNorms(_NORM, None, dataclasses.replace(_NORM, has_weight=False), after_rotation=True)
    neighbours = dataclasses.replace(_ROPE, interleaved=True)
    return {
        "alibi": GQAConfig(6, 2, 5, Alibi(), 0.4, qkv_bias=True),
        "values are keys": GQAConfig(6, 2, 5, neighbours, 0.4, head_norms=late, values_are_keys=True),
        "all tokens": GQAConfig(
            6, 2, 5, _ROPE, 0.4, head_norms=HeadNorms(_NORM, _NORM, across_heads=True), clip=1.5, out_bias=True
        ),
        "window": GQAConfig(6, 2, 5, _ROPE, 0.4, window=4, **options),
    }


def mla():
    """After a cache, few tokens attend to latents; with small heads one token, and more to expanded keys."""
    return {
        "absorbed": MLAConfig(3, 5, 7, 11, 8, _ROPE, 0.35, _NORM, bias=True),
        "expanded": MLAConfig(3, 1, 2, 11, None, dataclasses.replace(_ROPE, interleaved=True), 0.5, _NORM),
    }


def mfa():
    return MFAConfig(5, 6, 7, _ROPE, 0.4, _NORM)


def cca():
    return {
        "three tokens": CCAConfig(6, 2, 5, _ROPE, 0.4),
        "window": CCAConfig(6, 2, 5, _ROPE, 0.4, depthwise_width=3, bias=True, window=5),
    }


def gated_linear():
    return GatedLinearConfig(3, 5, 7, gate_rank=2, gate_temperature=4.0, scale=0.4, norm=_NORM)


def lightning():
    return LightningConfig(3, 5, slopes=(0.9, 0.0, 0.01), activation="silu", scale=1.0, norm=_NORM)


def gated_delta():
    return GatedDeltaConfig(2, 6, 5, 7, convolution_width=4, activation="silu", scale=0.4, norm=_NORM)


def short_convolution():
    return {
        "three tokens": ShortConvolutionConfig(7, 3),
        "biases": ShortConvolutionConfig(7, 5, bias=True),
    }


def token_shift():
    return OUTSIDE["mixers"]["token_shift"](7)
