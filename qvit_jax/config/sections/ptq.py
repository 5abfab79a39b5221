"""Post-training quantization. A row a field."""

from qvit_jax.config.fields import (
  ANY,
  CURVE,
  MIXES,
  ONE_UP,
  RANGES,
  STATIC,
  ZERO_UP,
  Field,
  names,
  number,
  one_of,
  strings,
)

FIELDS = (
  Field(
    'ptq.rows', (
      'fp32', 'bf16', 'fp16', 'int8_dynamic', 'int8_static',
      'int8_weight_only', 'int4_weight_only', 'int4_weight_only_g32',
      'w16a16', 'w12a12', 'w10a10', 'w8a8', 'w6a6', 'w4a8', 'w4a4',
      'w4a4+plain', 'w3a3', 'w2a2+plain',
      'int8_clip_99.9', 'mixed_simple', 'mixed_variance',
      'mixed_sensitivity',
    ),
    strings(),
    'fp32 bf16 fp16, int8_dynamic int8_static int8_weight_only, '
    'int4_weight_only (also _g32, _g64, _g128), wXaY with X and Y among 2..8, '
    '10, 12, 16 (also wXaY_static), mixed_simple mixed_variance '
    'mixed_sensitivity, int8_clip_99.9 (also _99, _95, and int4). '
    "`+gptq+rotate` replaces a row's own solvers, `+plain` is min-max "
    'rounding. Solvers: rotate equalize absorb smooth_quant reparametrize, '
    'hadamard, per_tensor, gptq adaround, log2_softmax twin_softmax, '
    'bias_correction tune.',
  ),
  Field(
    'ptq.calibration_examples', 256, ONE_UP,
    'Images of the training split; >= 1.',
  ),
  Field(
    'ptq.calibration_path', '', ANY,
    "A folder `calibration` that an earlier run of the same weights wrote; '' "
    "= the workdir's own.",
    is_path=True,
  ),
  Field(
    'ptq.range', 'auto',
    one_of(
      'auto', 'minmax', 'moving_average', 'percentile', 'mse', 'entropy'
    ),
    'Of static activations, and of a start from quant.calibration_path: '
    "'auto' (what measured best at the row's bits; 'mse' at such a start) | "
    "'minmax' | 'moving_average' | 'percentile' | 'mse' | 'entropy'",
    needs=(RANGES,),
  ),
  Field(
    'ptq.scales', 'per_tensor', one_of('per_tensor', 'per_position'),
    "Static scales: 'per_tensor' | 'per_position' (each token position; each "
    'head of attention products; each channel of values)',
    needs=(STATIC,),
  ),
  Field(
    'ptq.choices', ('w4a4', 'w4a8', 'w8a8'), strings(),
    'Specs that mixed_sensitivity chooses from and --mode=sensitivity tries.',
    needs=(MIXES,),
  ),
  Field(
    'ptq.sensitivity_examples', 64, ONE_UP,
    'Images for the effect of one site; >= 1.',
    needs=(MIXES,),
  ),
  Field(
    'ptq.budget_mb', 0.0, ZERO_UP,
    'Most that mixed_sensitivity may take. Both 0: bytes halfway between the '
    'smallest and the largest choice. Packed kernels with scales, in 10**6 '
    'bytes; >= 0.',
    needs=(MIXES,),
  ),
  Field(
    'ptq.budget_gbops', 0.0, ZERO_UP,
    '10**9 bit operations an image; >= 0.',
    needs=(MIXES,),
  ),
  Field(
    'ptq.tune_steps', 100, ONE_UP,
    'Updates of the solver tune; >= 1.',
  ),
  Field(
    'ptq.latency_batch', 32, ONE_UP,
    'Images of a timed forward pass; >= 1.',
  ),
  Field(
    'ptq.rounds', 7, number(2),
    'Timed passes of each row beside float; >= 2.',
  ),
  Field(
    'ptq.engines', ('auto',), names("a tuple such as ('onnxruntime',)"),
    "Runtimes that are timed beside each row: 'onnxruntime' 'openvino'; "
    "('auto',): those that are installed; (): none.",
  ),
  Field(
    'ptq.qat_runs', (), names('a tuple of workdirs'),
    'Workdirs of quantization-aware training, shown beside the rows.',
    is_path=True,
  ),
  Field(
    'ptq.qat_specs', (), names("a tuple of specs such as ('w8a8', 'w4a4')"),
    'Bits wXaY to train at from the same float parameters, for the curve of '
    'accuracy against bits; attention products aY too. Sections optim and '
    'train, quant.rules and what belongs to the recipe count then.',
  ),
  Field(
    'ptq.qat_seeds', 1, ONE_UP,
    'Runs at each of them: seed, seed + 1, ...; >= 1.',
    needs=(CURVE,),
  ),
)  # fmt: skip
