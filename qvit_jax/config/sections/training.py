"""How it is trained. A row a field."""

from qvit_jax.config.fields import (
  ADAM,
  ANY,
  BELOW_ONE,
  BY_EPOCHS,
  DECAYS,
  DECAYS_LR,
  DISTILLS,
  FEATURES,
  ONE_UP,
  SCALES_LOSS,
  SGD,
  SHARE,
  SOFT,
  STAGES,
  TEACHER,
  WARMS,
  WARMS_BY_EPOCH,
  ZERO_UP,
  Field,
  number,
  one_of,
  strings,
)

FIELDS = (
  Field(
    'optim.name', 'adamw', one_of('adamw', 'sgd', 'lamb', 'adafactor'),
    "'adamw' | 'sgd' | 'lamb' | 'adafactor'",
  ),
  Field(
    'optim.lr', 0.001, number(0, open_low=True),
    'Peak learning rate; > 0.',
  ),
  Field(
    'optim.quant_lr', 0.0, ZERO_UP,
    "Of learned steps, on the same schedule, in shares of each array's root "
    'mean square; 0 = lr, not in shares. They do not decay.',
    of_method=True,
  ),
  Field(
    'optim.schedule', 'cosine', one_of('cosine', 'linear', 'constant'),
    "'cosine' | 'linear' | 'constant', after warm-up",
  ),
  Field(
    'optim.warmup_epochs', 0.0, ZERO_UP,
    'Linear warm-up, used when warmup_steps is 0. Where `train.steps` cuts a '
    'run of `train.epochs` short, the warm-up shrinks with it.',
    needs=(WARMS_BY_EPOCH,),
  ),
  Field(
    'optim.warmup_steps', 0, ZERO_UP,
    'Updates; shorter than the training.',
  ),
  Field(
    'optim.warmup_from', 1e-05, ZERO_UP,
    'Learning rate of the first update; >= 0.',
    needs=(WARMS,),
  ),
  Field(
    'optim.end_lr', 0.0, ZERO_UP,
    'Learning rate after the last update; >= 0.',
    needs=(DECAYS_LR,),
  ),
  Field(
    'optim.weight_decay', 0.0, ZERO_UP,
    'Per unit of learning rate; >= 0.',
  ),
  Field(
    'optim.decay_rules', ('kernel$',), strings(),
    'Regexes of the parameters that decay.',
    needs=(DECAYS,),
  ),
  Field(
    'optim.clip_norm', 0.0, ZERO_UP,
    'Global gradient norm; 0 = no clipping.',
  ),
  Field(
    'optim.loss_scale', 2.0**15, number(1, 2**60),
    "model.dtype='float16': what the loss is multiplied by at first; [1, "
    '2**60). Halves where a gradient overflows, whose update is skipped.',
    needs=(SCALES_LOSS,),
  ),
  Field(
    'optim.loss_scale_growth', 2000, ONE_UP,
    'Finite updates until it doubles; >= 1.',
    needs=(SCALES_LOSS,),
  ),
  Field(
    'optim.b1', 0.9, BELOW_ONE,
    'adamw, lamb: decay of the first moment; [0, 1).',
    needs=(ADAM,),
  ),
  Field(
    'optim.b2', 0.999, BELOW_ONE,
    'adamw, lamb: decay of the second moment; [0, 1).',
    needs=(ADAM,),
  ),
  Field(
    'optim.momentum', 0.9, BELOW_ONE,
    'sgd: [0, 1).',
    needs=(SGD,),
  ),
  Field(
    'train.steps', 0, ZERO_UP,
    'Updates; >= 0; 0: `epochs` counts.',
  ),
  Field(
    'train.epochs', 0.0, ZERO_UP,
    'Passes over the training split, used when steps is 0.',
    needs=(BY_EPOCHS,),
  ),
  Field(
    'train.batch_size', 128, ONE_UP,
    'Images an update, over all devices.',
  ),
  Field(
    'train.accumulate', 1, ONE_UP,
    'Forward-backward passes an update; divides the batch.',
  ),
  Field(
    'train.label_smoothing', 0.0, BELOW_ONE,
    'Share of a label that the other classes get; [0, 1).',
  ),
  Field(
    'train.ema_decay', 0.0, BELOW_ONE,
    'Of the weights that are evaluated; 0 = off; [0, 1).',
  ),
  Field(
    'train.patience', 0, ZERO_UP,
    'Stop after this many evaluations without a new best.',
  ),
  Field(
    'train.trainable', ('auto',), strings(),
    "Collections that get gradients, or parts of them such as 'params/head'; "
    "('auto',): what the recipe learns, or adapters and the head. Where they "
    'lie behind the pooling, and nothing changes features, these are computed '
    'once; else a line says why not.',
  ),
  Field(
    'train.stages', (), STAGES,
    "Parts of the updates, 'NAME:SHARE' in order, shares that sum to 1: 'all' "
    "(bits as planned, all is trained) | 'acts' (kernels in float) | "
    "'weights' (activations in float) | 'norms' (only norms, biases, "
    "LayerScale and collections besides params are trained) | 'freeze' "
    '(statsq: weights far from a rounding boundary are held; see '
    "quant.freeze) | 'held' (statistics of BatchNorm stay as they are). "
    "() = 'all'.",
  ),
  Field(
    'train.reestimate_batches', 0, ZERO_UP,
    'Batches of training images, without augmentation, from which statistics '
    'of BatchNorm are estimated anew after the last update; 0 = off.',
  ),
  Field(
    'train.teacher', '', ANY,
    'A model to learn from: the workdir of a run of ours, of any size and '
    "bits, or what weights.path takes; '' = none.",
    is_path=True,
  ),
  Field(
    'train.teacher_size', '', ANY,
    "Size of a teacher that is no run of ours, as model.size; '' = as the "
    'student.',
    needs=(TEACHER,),
  ),
  Field(
    'train.distill', 'soft', one_of('none', 'soft', 'hard'),
    "From the teacher's logits: 'soft' (all of them) | 'hard' (its first "
    "choice) | 'none'. Counts with a teacher.",
    needs=(TEACHER,),
  ),
  Field(
    'train.distill_weight', 0.5, SHARE,
    'Share of that loss, the labels get the rest; 0..1.',
    needs=(TEACHER, DISTILLS,),
  ),
  Field(
    'train.temperature', 1.0, number(0, open_low=True),
    "Both logits are divided by it when 'soft'; > 0.",
    needs=(TEACHER, SOFT,),
  ),
  Field(
    'train.feature_weight', 0.0, ZERO_UP,
    'Weight of the distance between the features before both heads, along the '
    "main directions of the teacher's; 0 = off; >= 0.",
  ),
  Field(
    'train.feature_variance', 0.6, SHARE,
    'Share of variance these directions hold; 0..1.',
    needs=(TEACHER, FEATURES,),
  ),
)  # fmt: skip
