"""Which form of ONNX can hold which packed model.

qdq          integers with calibrated ranges: onnxruntime, OpenVINO, TensorRT
dynamic      each row finds its range: onnxruntime
weight_only  packed kernels, everything else float
float        nothing is rounded
"""

from collections.abc import Iterable

from qvit_jax.errors import ExportError
from qvit_jax.export.graph import Product, Program

_INT8 = 8


def choose(program: Program, asked: str = '') -> str:
  """Returns the profile that holds a model.

  Args:
    program: The model.
    asked: A profile, or '' for the one that the model's bits have a form in.

  Raises:
    ExportError: There is none, or it is not the one that was asked for.
  """
  products = list(program.products.values())
  found = _of(products)
  for product in products:
    if why := _refused(product, found):
      raise ExportError(
        f'{product.site.path} {why}, for which ONNX has no form; '
        f'{_advice(product)}'
      )
  if asked and asked != found:
    raise ExportError(
      f'export.profile={asked!r} has no form for this model, which '
      f'{WHAT[found]}; leave export.profile out, or set '
      f'--config.export.profile={found}'
      + _OTHERS.get(asked, '')
    )
  return found


WHAT = {
  'qdq': 'has calibrated ranges',
  'dynamic': 'finds the range of each row as it runs',
  'weight_only': 'rounds nothing but kernels',
  'float': 'rounds nothing',
}
_OTHERS = {
  'qdq': ' (qdq is for rows such as int8_static)',
  'dynamic': ' (dynamic is for rows such as int8_dynamic and w4a4)',
  'weight_only': ' (weight_only is for rows such as int4_weight_only)',
  'float': ' (float is for fp32, or a run without quant.recipe)',
}


def _of(products: Iterable[Product]) -> str:
  products = list(products)
  if any(p.plan.acts and p.plan.is_static for p in products):
    return 'qdq'
  if any(p.plan.acts for p in products):
    return 'dynamic'
  if any(p.kernel and p.kernel.scale is not None for p in products):
    return 'weight_only'
  return 'float'


def _refused(p: Product, profile: str) -> str:
  """Returns why a profile cannot hold a product; '' if it can."""
  plan, kernel = p.plan, p.kernel
  if p.site.window is not None and kernel.shift is not None:
    return 'is a convolution with odd codes of nine bits'
  if not plan.acts:
    if kernel is not None and kernel.codes.dtype.kind == 'i':
      return _wide(kernel.codes.itemsize * _INT8)
    return ''
  if plan.softmax != 'uniform':
    return f'has {plan.softmax} softmax codes'
  if plan.acts > _INT8:
    return f'has activations of {plan.acts} bits'
  if kernel is not None and kernel.scale is None:
    return 'has a float kernel and rounded activations'
  if kernel is not None and len(kernel.scale) > 1:
    return 'has kernel scales of groups and rounded activations'
  if kernel is not None and (why := _wide(kernel.codes.itemsize * _INT8)):
    return why
  if profile == 'qdq' and not plan.is_static:
    return 'finds its ranges as it runs, beside products with calibrated ones'
  if plan.is_static and any(c[0].size > 1 for c in (p.lhs, p.rhs) if c):
    return 'has ranges for each position'
  if profile == 'dynamic' and p.site.window is not None:
    return 'is a convolution whose ranges are found as it runs'
  return ''


def _wide(bits: int) -> str:
  return f'has codes of {bits} bits' if bits > _INT8 else ''


def _advice(p: Product) -> str:
  """Returns what to do about a product that no profile holds."""
  if p.site.window is not None and not p.plan.is_static:
    return 'give a row with calibrated ranges, such as int8_static'
  if p.plan.is_static and p.lhs and p.lhs[0].size > 1:
    return 'calibrate with --config.ptq.scales=per_tensor'
  return (
    'give another row (int8_static, int8_dynamic, w4a4, int4_weight_only), or '
    'set --config.export.format=stablehlo, which keeps everything'
  )
