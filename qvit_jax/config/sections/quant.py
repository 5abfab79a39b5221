"""What is quantized and adapted, and how. A row a field."""

from qvit_jax.config.fields import (
  ADAPTS,
  ANY,
  BELOW_ONE,
  BOOL,
  FILE_NAME,
  FREEZES,
  LEARNS_STEPS,
  PACKS,
  ZERO_UP,
  Field,
  names,
  number,
  one_of,
)

FIELDS = (
  Field(
    'quant.recipe', 'none', ANY,
    "'none' (float) | 'aqt' (AQT, straight-through) | 'lsq' (learned steps: "
    "LSQ, LSQ+) | 'statsq' (OFQ's kernels, activations as 'lsq') | 'qvit' "
    "(LSQ+, rectified queries and keys, clipped GELU) | 'ptq' (the packed "
    'model that checkpoint.path names, in modes eval and predict). --mode=ptq '
    'starts in float and trains at ptq.qat_specs by this recipe.',
    choices=True,
  ),
  Field(
    'quant.default', 'w4a4', ANY,
    "Bits of every layer: 'wXaY', 'wX' (weights only), 'aY' (activations "
    "only) or 'float'; X and Y are 2 to 8.",
    of_method=True,
  ),
  Field(
    'quant.attention', 'float', ANY,
    "Bits of both attention products: 'aY' or 'float'.",
    of_method=True,
  ),
  Field(
    'quant.rules', (), ANY,
    "((regex, spec), ...): the first regex found in a site's path wins over "
    "`default`, e.g. (('REGEX', 'w8'),). Specs with a weight "
    'part leave the attention products alone. In modes ptq and sensitivity '
    'they win over the bits of every row and choice.',
    of_method=True,
  ),
  Field(
    'quant.act_granularity', '',
    one_of('', 'per_tensor', 'per_head', 'per_position', 'per_token'),
    'What shares a range or a learned step of activations: the whole tensor | '
    'a head of attention products | a token (each head and channel of '
    "attention products) | each token of each image, found anew. '' = the "
    "recipe's own: per_token for aqt (which has per_tensor too), per_tensor "
    'for lsq, statsq and qvit (which have all four).',
    of_method=True,
  ),
  Field(
    'quant.hadamard', False, BOOL,
    'lsq, statsq: inputs of layers behind a nonlinearity are turned by blocks '
    'of a Hadamard matrix before they are rounded, as their kernels are.',
    of_method=True,
  ),
  Field(
    'quant.zero_point', True, BOOL,
    'lsq, statsq: activations learn a zero point (LSQ+); False: their codes '
    'are signed where the first batch has negative values (LSQ).',
    needs=(LEARNS_STEPS,), of_method=True,
  ),
  Field(
    'quant.calibration_path', '', ANY,
    'lsq, statsq, qvit: a folder `calibration` that --mode=ptq of the same '
    'float model wrote: the steps of activations start from its statistics, '
    'by ptq.range; ptq.scales there is quant.act_granularity here: per_tensor '
    "or per_position. '' = from the first images.",
    needs=(LEARNS_STEPS,), is_path=True, of_method=True,
  ),
  Field(
    'quant.freeze', 0.005, number(0, 0.5, open_low=True),
    "statsq, in the stage 'freeze' of train.stages: how near a rounding "
    'boundary a weight must be to be trained, in steps of the grid; (0, 0.5).',
    needs=(FREEZES,), of_method=True,
  ),
  Field(
    'quant.dampen', 0.0, ZERO_UP,
    'lsq, qvit: weight of the squared distance between kernels and their '
    'levels, summed over all kernels; 0 = off; >= 0.',
    of_method=True,
  ),
  Field(
    'quant.irm', 'paper', one_of('paper', 'layernorm'),
    "qvit: 'paper' (statistics of a head) | 'layernorm' (of each token)",
    of_method=True,
  ),
  Field(
    'quant.dgd', 0.0, ZERO_UP,
    "Weight of the distance between the student's and the teacher's "
    "similarity maps of queries and keys (Q-ViT's DGD); 0 = off; >= 0.",
  ),
  Field(
    'quant.backward_bits', 0, ((lambda v: v in (0, 8)), '0 | 8'),
    'aqt: 8 = products of the backward pass with quantized operands have '
    '8-bit gradients, rounded stochastically; 0 = float gradients.',
    of_method=True,
  ),
  # Adapters: low-rank paths beside frozen kernels. They and the head are what
  # is trained and kept in checkpoints; the base is that of weights.path or
  # checkpoint.path. With a quant.recipe they are added to the kernels before
  # these are rounded (L4Q).
  Field(
    'lora.rank', 0, ZERO_UP,
    '0 = no adapters; up to the smaller side of the kernels.',
  ),
  Field(
    'lora.alpha', 16.0, number(0, open_low=True),
    '> 0; what scaling divides.',
    needs=(ADAPTS,),
  ),
  Field(
    'lora.scaling', 'alpha/r', one_of('alpha/r', 'rsqrt'),
    "Factor of the adapters: 'alpha/r', or 'rsqrt': alpha / sqrt(rank).",
    needs=(ADAPTS,),
  ),
  Field(
    'lora.dropout', 0.0, BELOW_ONE,
    "On the adapters' inputs; [0, 1).",
    needs=(ADAPTS,),
  ),
  Field(
    'lora.targets', (),
    names("() or a tuple of names and regexes such as ('qv',)"),
    'Layers with adapters: attn (query, key, value, out) | qv | mlp | all '
    '(every layer but the head), or regexes of their paths.',
  ),
  Field(
    'lora.init', 'zero', one_of('zero', 'pissa', 'loftq'),
    "'zero' (they start by adding nothing) | 'pissa' (from the principal part "
    "of the kernel) | 'loftq' (from that of what packing loses).",
    needs=(ADAPTS,),
  ),
  Field(
    'lora.dora', False, BOOL,
    'Each output channel learns its length too (DoRA).',
    needs=(ADAPTS,),
  ),
  Field(
    'lora.base', 'float', one_of('float', 'int8', 'int4'),
    "The frozen kernels in memory: 'float' | 'int8' | 'int4' (packed).",
    needs=(ADAPTS,),
  ),
  Field(
    'lora.group', 64, ZERO_UP,
    'Input channels that share a packed scale; 0 = all.',
    needs=(ADAPTS, PACKS,),
  ),
  Field(
    'lora.name', 'adapter', FILE_NAME,
    'Of the file WORKDIR/adapters/NAME.safetensors that training ends with, '
    'and that eval and merge_lora read where the run is of another name.',
    needs=(ADAPTS,),
  ),
  Field(
    'lora.path', '', ANY,
    "Another folder for these files; '' = WORKDIR/adapters.",
    needs=(ADAPTS,), is_path=True,
  ),
  Field(
    'lora.requantize', 'nearest', one_of('nearest', 'gptq'),
    "merge_lora into a packed base: 'nearest' | 'gptq' (reads "
    'ptq.calibration_examples).',
    needs=(ADAPTS, PACKS,),
  ),
)  # fmt: skip
