"""Every field of a qvit_jax config: its default, its unit, its legal values.

An experiment file calls `get_config()` and sets what differs. Sections are one
level deep. `--config.section.field=value` overrides a field on the command
line; an unknown field is an error that names the nearest one. The legal values
written here are enforced by `qvit_jax/config/fields.py`.
"""

import ml_collections


def get_config():
  """Returns the defaults of all sections."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # Of init, data order, augmentation and dropout; 0 to 2**32 - 1.

  c.model = ml_collections.ConfigDict(
    dict(
      name='vit',  # 'vit'
      # 'Ti', 'S', 'B' or 'L', a slash and the patch in pixels: 'L/16'.
      # '' takes the five numbers below instead.
      size='',
      patch=16,  # Side of a patch in pixels; divides image_size.
      width=192,  # Channels of a token; heads divides it.
      depth=12,  # Transformer blocks; >= 1.
      heads=3,  # Attention heads; >= 1.
      mlp_dim=768,  # Hidden channels of the MLP; >= 1.
      image_size=224,  # Side of the square input in pixels; >= 1.
      num_classes=1000,  # Outputs of the head; >= 2.
      # What the head sees: 'token' (class token) | 'mean' (of the patches;
      # no class token) | 'patch_mean' (of the patches, beside a class token,
      # as MAE) | 'token_mean' (token and mean side by side, as DINOv2).
      pool='token',
      # The last norm stands behind the pooling (MAE's fc_norm); not with
      # 'token_mean'.
      norm_after_pool=False,
      # Tokens after the class token that no patch fills: registers, or the
      # distillation token of DeiT; >= 0.
      registers=0,
      layer_scale=0.0,  # Initial value of LayerScale; 0 = none.
      qk_norm=False,  # LayerNorm on queries and keys of each head.
      norm_eps=1e-6,  # Epsilon of every LayerNorm; > 0.
      dropout=0.0,  # After attention and in the MLP; [0, 1).
      attention_dropout=0.0,  # On attention weights; [0, 1).
      embedding_dropout=0.0,  # After the position embedding; [0, 1).
      head_dropout=0.0,  # Before the head; [0, 1).
      # Chance to skip the last block's branches, growing linearly from 0
      # at the first block; [0, 1).
      stochastic_depth=0.0,
      # Of products: 'bfloat16' | 'float16' (with loss scaling) | 'float32';
      # parameters, norms and softmax are float32.
      dtype='bfloat16',
      remat=False,  # Recompute blocks in the backward pass: less memory.
    )
  )

  c.quant = ml_collections.ConfigDict(
    dict(
      # 'none' (float) | 'aqt' (AQT, straight-through) | 'lsq' (learned steps:
      # LSQ, LSQ+) | 'statsq' (OFQ's kernels, activations as 'lsq') | 'qvit'
      # (LSQ+, rectified queries and keys, clipped GELU) | 'ptq' (with
      # --mode=eval: the packed model that checkpoint.path names)
      recipe='none',
      # Bits of every layer: 'wXaY', 'wX' (weights only), 'aY'
      # (activations only) or 'float'; X and Y are 2 to 8.
      default='w4a4',
      # Bits of both attention products: 'aY' or 'float'.
      attention='float',
      # ((regex, spec), ...): the first regex found in a site's path wins
      # over `default`, e.g. (('patch_embed|head', 'w8a8'),). Specs with a
      # weight part leave the attention products alone.
      rules=(),
      act_granularity='per_token',  # aqt: 'per_token' | 'per_tensor'
      # What shares a learned step of activations (lsq, statsq, qvit):
      # 'per_tensor' | 'per_head' (of attention products) | 'per_position'
      # (each token; each head and channel of attention products) |
      # 'per_token' (nothing is learned: each token of each image has its own
      # range, as in the dynamic rows of --mode=ptq).
      steps='per_tensor',
      # lsq, statsq: inputs of layers behind a nonlinearity are turned by blocks
      # of a Hadamard matrix before they are rounded, as their kernels are.
      hadamard=False,
      # lsq, statsq: activations learn a zero point (LSQ+); False: their codes
      # are signed where the first batch has negative values (LSQ).
      zero_point=True,
      # lsq, statsq, qvit: a folder `calibration` that --mode=ptq of the same
      # float model wrote: the steps of activations start from its statistics,
      # by ptq.range; ptq.scales there was quant.steps here, so 'per_tensor' or
      # 'per_position'. '' = from the first images.
      calibration_path='',
      # statsq, in the stage 'freeze' of train.stages: how near a rounding
      # boundary a weight must be to be trained, in steps of the grid; (0, 0.5).
      freeze=0.005,
      # lsq, qvit: weight of the squared distance between kernels and their
      # levels, summed over all kernels; 0 = off; >= 0.
      dampen=0.0,
      # qvit: 'paper' (statistics of a head) | 'layernorm' (of each token)
      irm='paper',
      # Weight of the distance between the student's and the teacher's
      # similarity maps of queries and keys (Q-ViT's DGD); 0 = off; >= 0.
      dgd=0.0,
      # aqt: 8 = products of the backward pass with quantized operands have
      # 8-bit gradients, rounded stochastically; 0 = float gradients.
      backward_bits=0,
    )
  )

  # Adapters: low-rank paths beside frozen kernels. They and the head are what
  # is trained and kept in checkpoints; the base is that of weights.path or
  # checkpoint.path. With a quant.recipe they are added to the kernels before
  # these are rounded (L4Q).
  c.lora = ml_collections.ConfigDict(
    dict(
      rank=0,  # 0 = no adapters; up to the smaller side of the kernels.
      alpha=16.0,  # > 0; what scaling divides.
      # Factor of the adapters: 'alpha/r', or 'rsqrt': alpha / sqrt(rank).
      scaling='alpha/r',
      dropout=0.0,  # On the adapters' inputs; [0, 1).
      # Layers with adapters: 'attn' (query, key, value, out) | 'qv' | 'mlp' |
      # 'all' (every layer but the head), or regexes of their paths.
      targets=(),
      # 'zero' (they start by adding nothing) | 'pissa' (from the principal
      # part of the kernel) | 'loftq' (from that of what packing loses).
      init='zero',
      dora=False,  # Each output channel learns its length too (DoRA).
      # The frozen kernels in memory: 'float' | 'int8' | 'int4' (packed).
      base='float',
      group=64,  # Input channels that share a packed scale; 0 = all.
      # Of the file WORKDIR/adapters/NAME.safetensors that training ends with,
      # and that eval and merge_lora read where the run is of another name.
      name='adapter',
      path='',  # Another folder for these files; '' = WORKDIR/adapters.
      # merge_lora into a packed base: 'nearest' | 'gptq' (reads
      # ptq.calibration_examples).
      requantize='nearest',
    )
  )

  c.weights = ml_collections.ConfigDict(
    dict(
      # What to start from: a .safetensors, .pth, .bin or .npz file, a folder
      # as on the Hugging Face hub, hf://OWNER/NAME[@REVISION], or the workdir
      # of another run; '' = from scratch. A head of another class count is
      # replaced by a fresh one.
      path='',
      # False: where the hub cannot be reached and its cache is empty, say so
      # and start from random weights. A path on the command line is required.
      required=True,
    )
  )

  c.data = ml_collections.ConfigDict(
    dict(
      # 'digits' (ships with scikit-learn) | 'tfds' | 'folder' (of images:
      # DIR/SPLIT/CLASS/FILE, or Tiny-ImageNet as distributed)
      source='digits',
      name='',  # TFDS name, e.g. 'cifar100'; '' with the other sources.
      # tfds: data_dir; '' = TFDS_DATA_DIR, else TFDS's own. folder: DIR.
      dir='',
      # TFDS split syntax works: 'train[:90%]'; folder: the name of a folder,
      # or such a share of it in percent, stratified, the same for every seed.
      train_split='train',
      eval_split='test',  # Split that is evaluated, in the same syntax.
      # folder: share of the training images that is evaluated instead where
      # eval_split has no folder; [0, 1), 0 = that is an error.
      holdout=0.1,
      # folder: files that cannot be decoded are skipped and named, up to this
      # many; 0 = the first one is an error. --mode=predict skips all.
      bad_files=10,
      # folder, predict: pixels (width x height) that a file may have, more
      # count as bad; 1 to 89,478,485, where Pillow's own limit lies.
      max_pixels=2**26,
      mean=(0.485, 0.456, 0.406),  # Of the RGB channels in 0..1.
      std=(0.229, 0.224, 0.225),  # > 0
      resize='bicubic',  # 'bicubic' | 'bilinear', both with antialias
      pad=0,  # Pixels: pad by this many, crop at random; >= 0.
      flip=False,  # Mirror left-right with probability 1/2.
      erase=0.0,  # Chance to erase a rectangle of an image; [0, 1].
      mixup=0.0,  # Beta parameter of mixup; 0 = off.
      cutmix=0.0,  # Beta parameter of CutMix; 0 = off.
      # MiB of uint8 images (train + eval) kept on the device; larger sets
      # stream from the host, as folders always do.
      resident_mib=2048,
      workers=0,  # Decoding processes when streaming; 0 = threads.
    )
  )

  c.optim = ml_collections.ConfigDict(
    dict(
      name='adamw',  # 'adamw' | 'sgd' | 'lamb' | 'adafactor'
      lr=1e-3,  # Peak learning rate; > 0.
      # Of learned steps, on the same schedule, in shares of each array's root
      # mean square; 0 = lr, not in shares. They do not decay.
      quant_lr=0.0,
      schedule='cosine',  # 'cosine' | 'linear' | 'constant', after warm-up
      # Linear warm-up, used when warmup_steps is 0. Where `train.steps` cuts a
      # run of `train.epochs` short, the warm-up shrinks with it.
      warmup_epochs=0.0,
      warmup_steps=0,  # Updates; shorter than the training.
      warmup_from=1e-5,  # Learning rate of the first update; >= 0.
      end_lr=0.0,  # Learning rate after the last update; >= 0.
      weight_decay=0.0,  # Per unit of learning rate; >= 0.
      decay_rules=('kernel$',),  # Regexes of the parameters that decay.
      clip_norm=0.0,  # Global gradient norm; 0 = no clipping.
      # model.dtype='float16': what the loss is multiplied by at first; [1,
      # 2**60). Halves where a gradient overflows, whose update is skipped.
      loss_scale=2.0**15,
      loss_scale_growth=2000,  # Finite updates until it doubles; >= 1.
      b1=0.9,  # adamw, lamb: decay of the first moment; [0, 1).
      b2=0.999,  # adamw, lamb: decay of the second moment; [0, 1).
      momentum=0.9,  # sgd: [0, 1).
    )
  )

  c.train = ml_collections.ConfigDict(
    dict(
      steps=0,  # Updates; >= 0; 0: `epochs` counts.
      epochs=0.0,  # Passes over the training split, used when steps is 0.
      batch_size=128,  # Images an update, over all devices.
      accumulate=1,  # Forward-backward passes an update; divides the batch.
      label_smoothing=0.0,  # [0, 1)
      ema_decay=0.0,  # Of the weights that are evaluated; 0 = off; [0, 1).
      patience=0,  # Stop after this many evaluations without a new best.
      # Collections that get gradients, or parts of them such as 'params/head';
      # ('auto',): what the recipe learns, or adapters and the head.
      trainable=('auto',),
      # Parts of the updates, 'NAME:SHARE' in order, shares that sum to 1:
      # 'all' (bits as planned, all is trained) | 'acts' (kernels in float) |
      # 'weights' (activations in float) | 'norms' (only norms, biases,
      # LayerScale and collections besides params are trained) | 'freeze'
      # (statsq: weights far from a rounding boundary are held; see
      # quant.freeze). () = 'all'.
      stages=(),
      # A model to learn from: the workdir of a run of ours, of any size and
      # bits, or what weights.path takes; '' = none.
      teacher='',
      # Size of a teacher that is no run of ours, as model.size; '' = as the
      # student.
      teacher_size='',
      # From the teacher's logits: 'soft' (all of them) | 'hard' (its first
      # choice) | 'none'. Counts with a teacher.
      distill='soft',
      distill_weight=0.5,  # Share of that loss, the labels get the rest; 0..1.
      temperature=1.0,  # Both logits are divided by it when 'soft'; > 0.
      # Weight of the distance between the features before both heads, along
      # the main directions of the teacher's; 0 = off; >= 0.
      feature_weight=0.0,
      feature_variance=0.6,  # Share of variance these directions hold; 0..1.
    )
  )

  c.eval = ml_collections.ConfigDict(
    dict(
      batch_size=256,  # Images a step, over all devices.
      # Evaluate the first N images (folder: N spread over the classes); 0 =
      # all.
      num_examples=0,
      every=0,  # Updates between evaluations; 0 = once an epoch.
      # --mode=predict: a folder, searched with those below it, or one file.
      images='',
      top_k=5,  # --mode=predict: likeliest classes that are named; >= 1.
    )
  )

  c.ptq = ml_collections.ConfigDict(
    dict(
      # fp32 bf16 fp16, int8_dynamic int8_static int8_weight_only,
      # int4_weight_only (also _g32, _g64, _g128), wXaY with X and Y among
      # 2..8, 10, 12, 16, mixed_simple mixed_variance mixed_sensitivity,
      # int8_clip_99.9 (also _99, _95, and int4). `+gptq+rotate` replaces a
      # row's own solvers, `+plain` is min-max rounding. Solvers: rotate
      # smooth_quant reparametrize, hadamard, gptq adaround, log2_softmax
      # twin_softmax, bias_correction tune.
      rows=(
        'fp32', 'bf16', 'fp16', 'int8_dynamic', 'int8_static',
        'int8_weight_only', 'int4_weight_only', 'int4_weight_only_g32',
        'w8a8', 'w6a6', 'w4a8', 'w4a4', 'w4a4+plain', 'w3a3', 'w2a2+plain',
        'int8_clip_99.9', 'mixed_simple', 'mixed_variance', 'mixed_sensitivity',
      ),
      calibration_examples=256,  # Images of the training split; >= 1.
      # A folder `calibration` that an earlier run of the same weights wrote;
      # '' = the workdir's own.
      calibration_path='',
      # Of static activations, and of a start from quant.calibration_path:
      # 'minmax' | 'moving_average' | 'percentile' | 'mse' | 'entropy'
      range='mse',
      # Static scales: 'per_tensor' | 'per_position' (each token position; each
      # head of attention products; each channel of values)
      scales='per_tensor',
      # Specs that mixed_sensitivity chooses from and --mode=sensitivity tries.
      choices=('w4a4', 'w4a8', 'w8a8'),
      sensitivity_examples=64,  # Images for the effect of one site; >= 1.
      # Most that mixed_sensitivity may take. Both 0: bytes halfway between the
      # smallest and the largest choice.
      budget_mb=0.0,  # Packed kernels with scales, in 10**6 bytes; >= 0.
      budget_gbops=0.0,  # 10**9 bit operations an image; >= 0.
      tune_steps=200,  # Updates of the solver tune; >= 1.
      latency_batch=32,  # Images of a timed forward pass; >= 1.
      rounds=7,  # Timed passes of each row beside float; >= 2.
      # Workdirs of quantization-aware training, shown beside the rows.
      qat_runs=(),
      # Bits wXaY to train at from the same float parameters, for the curve of
      # accuracy against bits; attention products aY too. Sections optim and
      # train, quant.rules and what belongs to the recipe count then.
      qat_specs=(),
      qat_recipe='lsq',  # 'aqt' | 'lsq' | 'statsq' | 'qvit'
      qat_seeds=1,  # Runs at each of them: seed, seed + 1, ...; >= 1.
    )
  )  # fmt: skip

  c.checkpoint = ml_collections.ConfigDict(
    dict(
      # Another run's workdir, or WORKDIR/checkpoints/STEP: what `eval`
      # evaluates and what a new `train` run starts from. '' = own workdir.
      # With quant.recipe='ptq': the file of a packed model.
      path='',
      every=0,  # Updates between saves; 0 = at each evaluation.
    )
  )

  c.export = ml_collections.ConfigDict(
    dict(
      # 'safetensors' | 'npz' | 'packed' (the integers of a run with any
      # quant.recipe but 'none'; layout has no effect)
      format='safetensors',
      # Whose names and axes: 'timm' | 'timm_distilled' | 'dinov2' | 'hf' |
      # 'hf_deit' | 'hf_dinov2' | 'torchvision' | 'google'
      layout='timm',
    )
  )

  # Devices along each axis of the mesh; their product is the device count.
  c.mesh = ml_collections.ConfigDict(
    dict(
      data=0,  # Copies of the model; 0 = all devices that are left.
      fsdp=1,  # Parts that parameters and batch are split into.
      tensor=1,  # Parts that heads and MLP channels are split into.
    )
  )

  c.log = ml_collections.ConfigDict(
    dict(
      every=50,  # Updates between two lines of metrics; >= 1.
      tensorboard=True,  # Event files through CLU (needs TensorFlow).
      histograms=True,  # Of the weights, at each evaluation.
    )
  )
  return c
