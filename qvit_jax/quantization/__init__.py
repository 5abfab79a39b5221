"""Quantization: what is quantized how, and the cores that do it."""

from qvit_jax.quantization.methods import METHODS, build_ops, build_plan
from qvit_jax.quantization.qtensor import QTensor, dequantize, quantize
from qvit_jax.quantization.spec import QuantPlan, QuantSpec, parse_spec

__all__ = [
    'METHODS', 'QTensor', 'QuantPlan', 'QuantSpec', 'build_ops', 'build_plan',
    'dequantize', 'parse_spec', 'quantize',
]  # fmt: skip
