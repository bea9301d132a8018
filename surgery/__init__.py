"""Turning a decoder into a hybrid: reading its attention, planning, transplanting, and the class of the result.

Importing this package registers the hybrid with transformers' Auto classes.
"""

from halobench.surgery.hybrid import HybridConfig, HybridForCausalLM
from halobench.surgery.plan import LayerPlan, SurgeryPlan
from halobench.surgery.transplant import transplant

__all__ = ["HybridConfig", "HybridForCausalLM", "LayerPlan", "SurgeryPlan", "transplant"]
