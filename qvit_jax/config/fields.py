"""What each field of a config may be, and when it counts.

Tables only; `qvit_jax.config` checks by them.
"""

import math
import re
from collections.abc import Callable
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def _one_of(*values: str) -> Check:
  return (lambda v: v in values), ' | '.join(repr(v) for v in values)


def _number(low: float, high: float = math.inf, *, open_low=False) -> Check:
  def holds(v):
    return math.isfinite(v) and (low < v if open_low else low <= v) and v < high

  text = f'a number {">" if open_low else ">="} {low:g}'
  return holds, text + (f' and < {high:g}' if high < math.inf else '')


def _share() -> Check:
  return (lambda v: 0 <= v <= 1), 'a number from 0 to 1'


def _channels(*, positive: bool) -> Check:
  def holds(v):
    return len(v) == 3 and all(
        isinstance(x, (int, float)) and math.isfinite(x) for x in v
    ) and not (positive and min(v) <= 0)  # fmt: skip

  return holds, f'three {"positive " if positive else ""}numbers'


def _strings() -> Check:
  return (
    lambda v: bool(v) and all(isinstance(x, str) and x for x in v)
  ), "a tuple of names such as ('params',)"


_ANY: Check = ((lambda v: True), '')
_BOOL: Check = ((lambda v: isinstance(v, bool)), 'True or False')
_ONE_UP = _number(1)
_ZERO_UP = _number(0)
_BELOW_ONE = _number(0, 1)

LEGAL: dict[str, Check] = {
  'seed': _number(0, 2**32),
  'model.name': _ANY,  # `models.family` knows the names
  'model.size': _ANY,
  'model.patch': _ONE_UP,
  'model.width': _ONE_UP,
  'model.depth': _ONE_UP,
  'model.heads': _ONE_UP,
  'model.mlp_dim': _ONE_UP,
  'model.image_size': _ONE_UP,
  'model.num_classes': _number(2),
  'model.pool': _one_of('token', 'mean', 'patch_mean', 'token_mean'),
  'model.norm_after_pool': _BOOL,
  'model.registers': _ZERO_UP,
  'model.layer_scale': _ZERO_UP,
  'model.qk_norm': _BOOL,
  'model.norm_eps': _number(0, open_low=True),
  'model.dropout': _BELOW_ONE,
  'model.attention_dropout': _BELOW_ONE,
  'model.embedding_dropout': _BELOW_ONE,
  'model.head_dropout': _BELOW_ONE,
  'model.stochastic_depth': _BELOW_ONE,
  'model.dtype': _one_of('bfloat16', 'float16', 'float32'),
  'model.remat': _BOOL,
  'quant.recipe': _one_of('none', 'aqt', 'lsq', 'statsq', 'qvit', 'ptq'),
  'quant.default': _ANY,
  'quant.attention': _ANY,
  'quant.rules': _ANY,
  'quant.act_granularity': _one_of('per_token', 'per_tensor'),
  'quant.steps': _one_of('per_tensor', 'per_head', 'per_position', 'per_token'),
  'quant.zero_point': _BOOL,
  'quant.hadamard': _BOOL,
  'quant.irm': _one_of('paper', 'layernorm'),
  'quant.dgd': _ZERO_UP,
  'quant.calibration_path': _ANY,
  'quant.freeze': _number(0, 0.5, open_low=True),
  'quant.dampen': _ZERO_UP,
  'quant.backward_bits': ((lambda v: v in (0, 8)), '0 | 8'),
  'lora.rank': _ZERO_UP,
  'lora.alpha': _number(0, open_low=True),
  'lora.scaling': _one_of('alpha/r', 'rsqrt'),
  'lora.dropout': _BELOW_ONE,
  'lora.targets': (
    lambda v: v == () or _strings()[0](v) and not isinstance(v, str),
    "() or a tuple of names and regexes such as ('qv',)",
  ),
  'lora.init': _one_of('zero', 'pissa', 'loftq'),
  'lora.dora': _BOOL,
  'lora.base': _one_of('float', 'int8', 'int4'),
  'lora.group': _ZERO_UP,
  'lora.name': (
    lambda v: bool(re.fullmatch(r'[\w][\w.-]*', v)),
    'letters, digits, _ . and -',
  ),
  'lora.path': _ANY,
  'lora.requantize': _one_of('nearest', 'gptq'),
  'weights.path': _ANY,
  'weights.required': _BOOL,
  'data.source': _one_of('digits', 'tfds', 'folder'),
  'data.name': _ANY,
  'data.dir': _ANY,
  'data.train_split': _ANY,
  'data.eval_split': _ANY,
  'data.holdout': _BELOW_ONE,
  'data.bad_files': _ZERO_UP,
  'data.max_pixels': _number(1, 89_478_486),
  'data.mean': _channels(positive=False),
  'data.std': _channels(positive=True),
  'data.resize': _one_of('bicubic', 'bilinear'),
  'data.pad': _ZERO_UP,
  'data.flip': _BOOL,
  'data.erase': _share(),
  'data.mixup': _ZERO_UP,
  'data.cutmix': _ZERO_UP,
  'data.resident_mib': _ZERO_UP,
  'data.workers': _ZERO_UP,
  'optim.name': _one_of('adamw', 'sgd', 'lamb', 'adafactor'),
  'optim.lr': _number(0, open_low=True),
  'optim.quant_lr': _ZERO_UP,
  'optim.schedule': _one_of('cosine', 'linear', 'constant'),
  'optim.warmup_epochs': _ZERO_UP,
  'optim.warmup_steps': _ZERO_UP,
  'optim.warmup_from': _ZERO_UP,
  'optim.end_lr': _ZERO_UP,
  'optim.weight_decay': _ZERO_UP,
  'optim.decay_rules': _strings(),
  'optim.clip_norm': _ZERO_UP,
  'optim.loss_scale': _number(1, 2**60),
  'optim.loss_scale_growth': _ONE_UP,
  'optim.b1': _BELOW_ONE,
  'optim.b2': _BELOW_ONE,
  'optim.momentum': _BELOW_ONE,
  'train.steps': _ZERO_UP,
  'train.epochs': _ZERO_UP,
  'train.batch_size': _ONE_UP,
  'train.accumulate': _ONE_UP,
  'train.label_smoothing': _BELOW_ONE,
  'train.ema_decay': _BELOW_ONE,
  'train.patience': _ZERO_UP,
  'train.trainable': _strings(),
  'train.stages': (
    lambda v: isinstance(v, (tuple, list)),
    "a tuple of stages such as ('acts:0.3', 'all:0.7')",
  ),
  'train.teacher': _ANY,
  'train.teacher_size': _ANY,
  'train.distill': _one_of('none', 'soft', 'hard'),
  'train.distill_weight': _share(),
  'train.temperature': _number(0, open_low=True),
  'train.feature_weight': _ZERO_UP,
  'train.feature_variance': _share(),
  'eval.batch_size': _ONE_UP,
  'eval.num_examples': _ZERO_UP,
  'eval.every': _ZERO_UP,
  'eval.images': _ANY,
  'eval.top_k': _ONE_UP,
  'ptq.rows': _strings(),
  'ptq.calibration_examples': _ONE_UP,
  'ptq.calibration_path': _ANY,
  'ptq.range': _one_of(
    'minmax', 'moving_average', 'percentile', 'mse', 'entropy'
  ),
  'ptq.scales': _one_of('per_tensor', 'per_position'),
  'ptq.choices': _strings(),
  'ptq.sensitivity_examples': _ONE_UP,
  'ptq.budget_mb': _ZERO_UP,
  'ptq.budget_gbops': _ZERO_UP,
  'ptq.tune_steps': _ONE_UP,
  'ptq.latency_batch': _ONE_UP,
  'ptq.rounds': _number(2),
  'ptq.qat_runs': (
    lambda v: v == () or _strings()[0](v) and not isinstance(v, str),
    'a tuple of workdirs',
  ),
  'ptq.qat_specs': (
    lambda v: v == () or _strings()[0](v) and not isinstance(v, str),
    "a tuple of specs such as ('w8a8', 'w4a4')",
  ),
  'ptq.qat_recipe': _one_of('aqt', 'lsq', 'statsq', 'qvit'),
  'ptq.qat_seeds': _ONE_UP,
  'checkpoint.path': _ANY,
  'checkpoint.every': _ZERO_UP,
  'export.format': _one_of('safetensors', 'npz', 'packed'),
  'export.layout': _one_of(
    'timm',
    'timm_distilled',
    'dinov2',
    'hf',
    'hf_deit',
    'hf_dinov2',
    'torchvision',
    'google',
  ),
  'mesh.data': _ZERO_UP,
  'mesh.fsdp': _ONE_UP,
  'mesh.tensor': _ONE_UP,
  'log.every': _ONE_UP,
  'log.tensorboard': _BOOL,
  'log.histograms': _BOOL,
}

# Fields that only count under a condition on others: (fields, does it hold,
# what to do). Checked for fields that the command line sets.
NEEDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ('quant.default', 'quant.attention', 'quant.rules'),
        lambda c: c.quant.recipe not in ('none', 'ptq'),
        "quant.recipe is 'none' or 'ptq'; set --config.quant.recipe=aqt",
    ),
    (
        ('lora.alpha', 'lora.scaling', 'lora.dropout', 'lora.init',
         'lora.dora', 'lora.base', 'lora.group', 'lora.name', 'lora.path',
         'lora.requantize'),
        lambda c: c.lora.rank > 0,
        'lora.rank is 0; set --config.lora.rank=8 and --config.lora.targets=',
    ),
    (
        ('lora.group', 'lora.requantize'),
        lambda c: c.lora.base != 'float',
        'no kernel is packed; set --config.lora.base=int4',
    ),
    (
        ('quant.act_granularity',),
        lambda c: c.quant.recipe == 'aqt',
        'only aqt finds scales anew; set --config.quant.recipe=aqt',
    ),
    (
        ('quant.steps', 'quant.calibration_path', 'optim.quant_lr'),
        lambda c: c.quant.recipe in ('lsq', 'statsq', 'qvit'),
        'no step is learned; set --config.quant.recipe=lsq',
    ),
    (
        ('quant.zero_point',),
        lambda c: c.quant.recipe in ('lsq', 'statsq'),
        'qvit always has zero points; set --config.quant.recipe=lsq',
    ),
    (
        ('quant.hadamard',),
        lambda c: c.quant.recipe in ('lsq', 'statsq'),
        'only lsq and statsq turn; set --config.quant.recipe=lsq',
    ),
    (
        ('quant.zero_point', 'quant.calibration_path'),
        lambda c: c.quant.steps != 'per_token',
        'no step of activations is learned; set '
        '--config.quant.steps=per_tensor',
    ),
    (
        ('quant.freeze',),
        lambda c: 'freeze' in str(c.train.stages),
        "no stage is named 'freeze'; set --config.train.stages="
        "\"('all:0.9', 'freeze:0.1')\"",
    ),
    (
        ('quant.dampen',),
        lambda c: c.quant.recipe in ('lsq', 'qvit'),
        'no kernel has a learned step; set --config.quant.recipe=lsq',
    ),
    (
        ('quant.irm',),
        lambda c: c.quant.recipe == 'qvit',
        'only qvit rectifies; set --config.quant.recipe=qvit',
    ),
    (
        ('model.dtype',),
        lambda c: c.quant.recipe != 'ptq',
        'a packed model computes in the dtype that it was packed with',
    ),
    (
        ('quant.backward_bits',),
        lambda c: c.quant.recipe == 'aqt',
        "only recipe 'aqt' has it; set --config.quant.recipe=aqt",
    ),
    (
        ('optim.loss_scale', 'optim.loss_scale_growth'),
        lambda c: c.model.dtype == 'float16',
        'only float16 needs it; set --config.model.dtype=float16',
    ),
    (
        ('export.layout',),
        lambda c: c.export.format != 'packed',
        "export.format is 'packed', whose names are our own; set "
        '--config.export.format=safetensors',
    ),
    (
        ('model.patch', 'model.width', 'model.depth', 'model.heads',
         'model.mlp_dim'),
        lambda c: not c.model.size,
        'model.size is set; add --config.model.size=',
    ),
    (
        ('data.holdout', 'data.bad_files', 'data.max_pixels'),
        lambda c: c.data.source == 'folder' or c.eval.images,
        'no image files are read; set --config.data.source=folder',
    ),
    (
        ('data.resident_mib',),
        lambda c: c.data.source != 'folder',
        'folders are always streamed',
    ),
    (
        ('optim.momentum',),
        lambda c: c.optim.name == 'sgd',
        'only sgd has it; set --config.optim.name=sgd',
    ),
    (
        ('optim.b1', 'optim.b2'),
        lambda c: c.optim.name in ('adamw', 'lamb'),
        'only adamw and lamb have it; set --config.optim.name=adamw',
    ),
    (
        ('optim.end_lr',),
        lambda c: c.optim.schedule != 'constant',
        'the schedule is constant; set --config.optim.schedule=cosine',
    ),
    (
        ('optim.decay_rules',),
        lambda c: c.optim.weight_decay > 0,
        'optim.weight_decay is 0; raise it',
    ),
    (
        ('optim.warmup_epochs',),
        lambda c: c.optim.warmup_steps == 0,
        'optim.warmup_steps is set; add --config.optim.warmup_steps=0',
    ),
    (
        ('ptq.range',),
        lambda c: (
            c.quant.calibration_path
            or any('static' in row for row in c.ptq.rows)
        ),
        'no row of ptq.rows is static; add int8_static',
    ),
    (
        ('ptq.tune_steps',),
        lambda c: any('tune' in row for row in c.ptq.rows),
        'no row of ptq.rows has the solver tune; add w4a4+gptq+tune',
    ),
    (
        ('ptq.scales',),
        lambda c: any('static' in r or 'clip' in r for r in c.ptq.rows),
        'no row of ptq.rows is static; add int8_static',
    ),
    (
        ('ptq.qat_recipe', 'ptq.qat_seeds'),
        lambda c: c.ptq.qat_specs,
        'ptq.qat_specs is empty; set --config.ptq.qat_specs="(\'w4a4\',)"',
    ),
    (
        ('weights.required',),
        lambda c: c.weights.path,
        'weights.path is empty; set --config.weights.path=',
    ),
    (
        ('train.epochs',),
        lambda c: c.train.steps == 0,
        'train.steps is set; add --config.train.steps=0',
    ),
    (
        ('train.teacher_size', 'train.distill', 'train.distill_weight',
         'train.temperature', 'train.feature_variance'),
        lambda c: c.train.teacher,
        'train.teacher is empty; set --config.train.teacher=',
    ),
    (
        ('train.distill_weight',),
        lambda c: c.train.distill != 'none',
        "train.distill is 'none'; set --config.train.distill=soft",
    ),
    (
        ('train.temperature',),
        lambda c: c.train.distill == 'soft',
        'only soft distillation has it; set --config.train.distill=soft',
    ),
    (
        ('train.feature_variance',),
        lambda c: c.train.feature_weight > 0,
        'train.feature_weight is 0; raise it',
    ),
)  # fmt: skip

# Fields of `quant` that count in training alone.
_TRAINING = ('quant.calibration_path', 'quant.freeze', 'quant.dampen',
             'quant.dgd', 'quant.backward_bits')  # fmt: skip
# Fields that count in --mode=predict alone.
_PREDICT = ('eval.images', 'eval.top_k')

# Sections and fields that a mode does not read; a flag for one of them is
# mentioned.
UNUSED = {
    'train': ('export', 'ptq', *_PREDICT),
    'eval': ('optim', 'train', 'export', 'ptq', *_TRAINING, *_PREDICT),
    'predict': ('optim', 'train', 'log', 'seed', 'export', 'ptq',
                'data.source', 'data.name', 'data.dir', 'data.train_split',
                'data.eval_split', 'data.holdout', 'data.bad_files', 'data.pad',
                'data.flip', 'data.erase', 'data.mixup', 'data.cutmix',
                'data.resident_mib', 'eval.num_examples', 'eval.every',
                *_TRAINING),
    'ptq': ('optim', 'train', 'export', 'log', 'mesh', *_PREDICT),
    'sensitivity': ('optim', 'train', 'export', 'log', 'mesh', 'ptq.rows',
                    'ptq.calibration_examples', 'ptq.calibration_path',
                    'ptq.range', 'ptq.scales', 'ptq.tune_steps',
                    'ptq.latency_batch', 'ptq.rounds', 'ptq.qat_runs',
                    'ptq.qat_specs', 'ptq.qat_recipe', 'ptq.qat_seeds',
                    *_PREDICT),
    'sites': ('optim', 'train', 'weights', 'data', 'eval', 'checkpoint',
              'mesh', 'log', 'seed', 'export', 'ptq', *_TRAINING),
    # It times the first updates of stage 'all', from random weights.
    'benchmark': ('weights', 'checkpoint', 'log', 'export', 'ptq',
                  'quant.calibration_path', 'quant.freeze', 'train.stages',
                  'train.patience', *_PREDICT),
    'merge_lora': ('optim', 'train', 'log', 'export', 'quant.dampen',
                   *_PREDICT),
    'export': ('optim', 'train', 'data', 'eval', 'mesh', 'log', 'seed',
               'ptq', *_TRAINING),
}  # fmt: skip

# The same of --mode=ptq where it trains: the curve sets these two itself.
UNUSED_TRAINING = ('export', 'quant.default', 'quant.attention', *_PREDICT)
