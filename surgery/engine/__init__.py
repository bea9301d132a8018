"""Decoding at the speed of memory: one token a step on preallocated buffers, replayed as a whole."""

from halobench.surgery.engine.attention import NotTakenOverError
from halobench.surgery.engine.engine import DecodeEngine, hears_steps, refusal

__all__ = ["DecodeEngine", "NotTakenOverError", "hears_steps", "refusal"]
