"""The solvers by name, in the order in which a row applies them.

The first change the float model but not its function, then kernels are rounded,
then what stays float is fitted.
"""

import importlib

from qvit_jax.quantization.ptq.solver import Solver


def _of(file: str) -> Solver:
  """Returns the record of a file in this folder."""
  package = __name__.rpartition('.')[0]
  return importlib.import_module(f'{package}.{file}').SOLVER


SOLVERS: dict[str, Solver] = {
  'rotate': _of('rotate'),
  'equalize': _of('equalize'),
  'absorb': _of('absorb'),
  'smooth_quant': _of('smooth_quant'),
  'reparametrize': _of('reparametrize'),
  'hadamard': Solver(needs_stream=True, needs_acts=True),  # `plans.plan_sites`
  'per_tensor': Solver(),  # `apply.round_kernel`
  'gptq': _of('gptq'),
  'adaround': _of('adaround'),
  'log2_softmax': Solver(softmax='log2'),
  'twin_softmax': Solver(softmax='twin'),
  'bias_correction': Solver(reads_means=True),  # `apply.apply_row`
  'tune': Solver(),  # `tune.tune`, which runs the model
}
