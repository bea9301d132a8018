"""Token mixers that can stand in a decoder layer, one file each, behind one contract (contract.py).

To add one: write a Mixer, name it here, or from your own package through the entry-point group `halobench.mixers`.
Importing this package costs nothing; a mixer's module is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from halobench.registry import Registry

if TYPE_CHECKING:
    from halobench.mixers.contract import Mixer

MIXERS: Registry[type[Mixer]] = Registry(
    "mixer",
    {
        "lightning": "halobench.mixers.lightning:LightningMixer",
        "retnet": "halobench.mixers.simple_gla:RetentionMixer",
        "simple_gla": "halobench.mixers.simple_gla:SimpleGLAMixer",
        "mamba2": "halobench.mixers.mamba2:Mamba2Mixer",
        "gla": "halobench.mixers.gla:GLAMixer",
        "deltanet": "halobench.mixers.delta:DeltaNetMixer",
        "gated_deltanet": "halobench.mixers.delta:GatedDeltaNetMixer",
        "kda": "halobench.mixers.delta:KDAMixer",
        "rwkv7": "halobench.mixers.rwkv7:RWKV7Mixer",
        "sliding_window": "halobench.mixers.sliding_window:SlidingWindowMixer",
        "softmax": "halobench.mixers.softmax:SoftmaxMixer",
    },
    group="halobench.mixers",
)

__all__ = ["MIXERS"]
