r"""Every field of a qvit_jax config: its default, its unit, its legal values.

An experiment file calls `get_config()` and sets what differs. Sections are one
level deep. `--config.section.field=value` overrides a field on the command
line; an unknown field is an error that names the nearest one. The rows that
this list is printed from, and the legal values that are enforced, lie in
`qvit_jax/config/sections`; `python main.py --help section.field` says when a
field counts.

seed
  seed = 0
    Of init, data order, augmentation and dropout; 0 to 2**32 - 1.

model
  model.name = 'vit'
    The family of models.
  model.size = ''
    ViT: 'Ti', 'S', 'B' or 'L', a slash and the patch in pixels: 'L/16'; ''
    takes the five numbers below instead, 'auto' the whole model from the
    weights or the run that is named, and says which from where. VGG: '11',
    '13', '16' or '19' layers. MobileNetV2: a factor of all channels from '0.35'
    to '1.4'.
  model.patch = 16
    Side of a patch in pixels; divides image_size.
  model.width = 192
    Channels of a token; heads divides it.
  model.depth = 12
    Transformer blocks; >= 1.
  model.heads = 3
    Attention heads; >= 1.
  model.mlp_dim = 768
    Hidden channels of the MLP; >= 1.
  model.image_size = 224
    Side of the square input in pixels; >= 1.
  model.num_classes = 1000
    Outputs of the head; >= 2.
  model.position = 'learned'
    Of patches: 'learned' (added to them) | 'rope' (turns queries and keys by
    row and column, no parameters, DINOv3).
  model.pool = 'token'
    What the head sees: 'token' (class token) | 'mean' (of the patches; no class
    token) | 'patch_mean' (of the patches, beside a class token, as MAE) |
    'token_mean' (token and mean side by side, as DINOv2) | 'attention' (a
    learned token asks the patches, no class token, SigLIP) | 'token_attention'
    (a learned token asks all tokens, beside a class token: an attentive probe).
  model.norm_after_pool = False
    The last norm stands behind the pooling (MAE's fc_norm); not with
    'token_mean', 'attention' or 'token_attention'.
  model.last_norm = True
    There is a norm behind the blocks, or behind the pooling; not in RADIO.
  model.pre_norm = False
    A norm stands before the blocks, behind the positions (CLIP).
  model.activation = 'gelu'
    Between the layers of an MLP: 'gelu' (exact) | 'gelu_tanh' (SigLIP) |
    'quick_gelu' (x sigmoid(1.702 x), of OpenAI's CLIP) | 'swiglu' (SiLU of a
    second layer times the first, DINOv3's larger ones). No tensor shows which
    GELU.
  model.registers = 0
    Tokens after the class token that no patch fills: registers, or the
    distillation token of DeiT; >= 0.
  model.layer_scale = 0.0
    Initial value of LayerScale; 0 = none.
  model.qk_norm = False
    LayerNorm on queries and keys of each head.
  model.norm_eps = 1e-06
    Epsilon of every LayerNorm; > 0.
  model.channels = 64
    Of VGG's first stage; others have 2, 4 and 8 times as many, hidden layers of
    the classifier 64 times; 64 in the paper.
  model.classifier = 'paper'
    Of VGG: 'paper' (mean of 7 x 7 windows, two hidden layers, head) | 'linear'
    (mean of the image, head), for small images.
  model.padding = ''
    Where a stride skips pixels: 'torch' (as many zeros on both sides) | 'same'
    (TensorFlow's: as few as the image size allows, the odd one below and on the
    right). Trained weights know one of them; '' = 'torch', and an error where
    weights do not say that they mean it.
  model.batch_norm = 'train'
    BatchNorm behind convolutions: 'train' (training normalises by the batch and
    averages its statistics) | 'held' (training too normalises by the averages,
    which stay as they are) | 'none' (there is none, or it is folded into
    kernels and biases).
  model.dropout = 0.0
    After attention and in the MLP; [0, 1).
  model.attention_dropout = 0.0
    On attention weights; [0, 1).
  model.embedding_dropout = 0.0
    After the position embedding; [0, 1).
  model.head_dropout = 0.0
    Before the head, and between the hidden layers of vgg's classifier; [0, 1).
  model.stochastic_depth = 0.0
    Chance to skip the last block's branches, growing linearly from 0 at the
    first block; [0, 1).
  model.dtype = 'bfloat16'
    Of products: 'bfloat16' | 'float16' (with loss scaling) | 'float32';
    parameters, norms and softmax are float32.
  model.remat = False
    Recompute blocks (stages of vgg) in the backward pass: less memory.

quant
  quant.recipe = 'none'
    'none' (float) | 'aqt' (AQT, straight-through) | 'lsq' (learned steps: LSQ,
    LSQ+) | 'statsq' (OFQ's kernels, activations as 'lsq') | 'qvit' (LSQ+,
    rectified queries and keys, clipped GELU) | 'ptq' (the packed model that
    checkpoint.path names, in modes eval and predict). --mode=ptq starts in
    float and trains at ptq.qat_specs by this recipe.
  quant.default = 'w4a4'
    Bits of every layer: 'wXaY', 'wX' (weights only), 'aY' (activations only) or
    'float'; X and Y are 2 to 8.
  quant.attention = 'float'
    Bits of both attention products: 'aY' or 'float'.
  quant.rules = ()
    ((regex, spec), ...): the first regex found in a site's path wins over
    `default`, e.g. (('REGEX', 'w8'),). Specs with a weight part leave the
    attention products alone. In modes ptq and sensitivity they win over the
    bits of every row and choice.
  quant.act_granularity = ''
    What shares a range or a learned step of activations: the whole tensor | a
    head of attention products | a token (each head and channel of attention
    products) | each token of each image, found anew. '' = the recipe's own:
    per_token for aqt (which has per_tensor too), per_tensor for lsq, statsq and
    qvit (which have all four).
  quant.hadamard = False
    lsq, statsq: inputs of layers behind a nonlinearity are turned by blocks of
    a Hadamard matrix before they are rounded, as their kernels are.
  quant.zero_point = True
    lsq, statsq: activations learn a zero point (LSQ+); False: their codes are
    signed where the first batch has negative values (LSQ).
  quant.calibration_path = ''
    lsq, statsq, qvit: a folder `calibration` that --mode=ptq of the same float
    model wrote: the steps of activations start from its statistics, by
    ptq.range; ptq.scales there is quant.act_granularity here: per_tensor or
    per_position. '' = from the first images.
  quant.freeze = 0.005
    statsq, in the stage 'freeze' of train.stages: how near a rounding boundary
    a weight must be to be trained, in steps of the grid; (0, 0.5).
  quant.dampen = 0.0
    lsq, qvit: weight of the squared distance between kernels and their levels,
    summed over all kernels; 0 = off; >= 0.
  quant.irm = 'paper'
    qvit: 'paper' (statistics of a head) | 'layernorm' (of each token)
  quant.dgd = 0.0
    Weight of the distance between the student's and the teacher's similarity
    maps of queries and keys (Q-ViT's DGD); 0 = off; >= 0.
  quant.backward_bits = 0
    aqt: 8 = products of the backward pass with quantized operands have 8-bit
    gradients, rounded stochastically; 0 = float gradients.

lora
  lora.rank = 0
    0 = no adapters; up to the smaller side of the kernels.
  lora.alpha = 16.0
    > 0; what scaling divides.
  lora.scaling = 'alpha/r'
    Factor of the adapters: 'alpha/r', or 'rsqrt': alpha / sqrt(rank).
  lora.dropout = 0.0
    On the adapters' inputs; [0, 1).
  lora.targets = ()
    Layers with adapters: attn (query, key, value, out) | qv | mlp | all (every
    layer but the head), or regexes of their paths.
  lora.init = 'zero'
    'zero' (they start by adding nothing) | 'pissa' (from the principal part of
    the kernel) | 'loftq' (from that of what packing loses).
  lora.dora = False
    Each output channel learns its length too (DoRA).
  lora.base = 'float'
    The frozen kernels in memory: 'float' | 'int8' | 'int4' (packed).
  lora.group = 64
    Input channels that share a packed scale; 0 = all.
  lora.name = 'adapter'
    Of the file WORKDIR/adapters/NAME.safetensors that training ends with, and
    that eval and merge_lora read where the run is of another name.
  lora.path = ''
    Another folder for these files; '' = WORKDIR/adapters.
  lora.requantize = 'nearest'
    merge_lora into a packed base: 'nearest' | 'gptq' (reads
    ptq.calibration_examples).

weights
  weights.path = ''
    What to start from: a .safetensors, .pth, .bin or .npz file, a folder as on
    the Hugging Face hub, hf://OWNER/NAME[@REVISION], or the workdir of another
    run; '' = from scratch. A head of another class count is replaced by a fresh
    one.
  weights.required = True
    False: where the hub cannot be reached and its cache is empty, say so and
    start from random weights. A path on the command line is required.

data
  data.source = 'digits'
    'digits' (ships with scikit-learn) | 'tfds' | 'folder' (of images:
    DIR/SPLIT/CLASS/FILE, or Tiny-ImageNet or Food-101 as distributed)
  data.name = ''
    TFDS name, e.g. 'cifar100'; '' with the other sources.
  data.dir = ''
    tfds: data_dir; '' = TFDS_DATA_DIR, else TFDS's own. folder: DIR.
  data.train_split = 'train'
    TFDS split syntax works: 'train[:90%]'; folder: the name of a folder, or
    such a share of it in percent, stratified, the same for every seed.
  data.eval_split = 'test'
    Split that is evaluated, in the same syntax.
  data.holdout = 0.1
    folder: share of the training images that is evaluated instead where
    eval_split has no folder; [0, 1), 0 = that is an error.
  data.bad_files = 10
    folder: files that cannot be decoded are skipped and named, up to this many;
    0 = the first one is an error. --mode=predict skips all.
  data.max_pixels = 67108864
    folder, predict: pixels (width x height) that a file may have, more count as
    bad; 1 to 89,478,485, where Pillow's own limit lies.
  data.mean = (0.485, 0.456, 0.406)
    Of the RGB channels in 0..1.
  data.std = (0.229, 0.224, 0.225)
    Of the RGB channels in 0..1; > 0.
  data.resize = 'bicubic'
    'bicubic' | 'bilinear', both with antialias
  data.crop = 0.0
    Train on windows of random size and place, resized to the model: the
    smallest share of the area of the image, e.g. 0.08; the aspect is 3/4 to
    4/3; 0 = off.
  data.jitter = 0.0
    Change brightness, contrast and saturation in a random order, each by a
    factor from 1 - jitter to 1 + jitter; [0, 1], 0 = off.
  data.randaugment = ()
    RandAugment: (operations an image, magnitude of 0 to 30), e.g. (2, 9); () =
    off.
  data.pad = 0
    Pixels: pad by this many, crop at random; >= 0.
  data.flip = False
    Mirror left-right with probability 1/2.
  data.erase = 0.0
    Chance to erase a rectangle of an image; [0, 1].
  data.mixup = 0.0
    Beta parameter of mixup; 0 = off.
  data.cutmix = 0.0
    Beta parameter of CutMix; 0 = off.
  data.resident_mib = 2048
    MiB of uint8 images (train + eval) kept on the device; larger sets stream
    from the host, as folders always do. Also the most that features which are
    computed once may take (see train.trainable).
  data.workers = 0
    Decoding processes when streaming; 0 = threads.

optim
  optim.name = 'adamw'
    'adamw' | 'sgd' | 'lamb' | 'adafactor'
  optim.lr = 0.001
    Peak learning rate; > 0.
  optim.quant_lr = 0.0
    Of learned steps, on the same schedule, in shares of each array's root mean
    square; 0 = lr, not in shares. They do not decay.
  optim.schedule = 'cosine'
    'cosine' | 'linear' | 'constant', after warm-up
  optim.warmup_epochs = 0.0
    Linear warm-up, used when warmup_steps is 0. Where `train.steps` cuts a run
    of `train.epochs` short, the warm-up shrinks with it.
  optim.warmup_steps = 0
    Updates; shorter than the training.
  optim.warmup_from = 1e-05
    Learning rate of the first update; >= 0.
  optim.end_lr = 0.0
    Learning rate after the last update; >= 0.
  optim.weight_decay = 0.0
    Per unit of learning rate; >= 0.
  optim.decay_rules = ('kernel$',)
    Regexes of the parameters that decay.
  optim.clip_norm = 0.0
    Global gradient norm; 0 = no clipping.
  optim.loss_scale = 32768.0
    model.dtype='float16': what the loss is multiplied by at first; [1, 2**60).
    Halves where a gradient overflows, whose update is skipped.
  optim.loss_scale_growth = 2000
    Finite updates until it doubles; >= 1.
  optim.b1 = 0.9
    adamw, lamb: decay of the first moment; [0, 1).
  optim.b2 = 0.999
    adamw, lamb: decay of the second moment; [0, 1).
  optim.momentum = 0.9
    sgd: [0, 1).

train
  train.steps = 0
    Updates; >= 0; 0: `epochs` counts.
  train.epochs = 0.0
    Passes over the training split, used when steps is 0.
  train.batch_size = 128
    Images an update, over all devices.
  train.accumulate = 1
    Forward-backward passes an update; divides the batch.
  train.label_smoothing = 0.0
    Share of a label that the other classes get; [0, 1).
  train.ema_decay = 0.0
    Of the weights that are evaluated; 0 = off; [0, 1).
  train.patience = 0
    Stop after this many evaluations without a new best.
  train.trainable = ('auto',)
    Collections that get gradients, or parts of them such as 'params/head';
    ('auto',): what the recipe learns, or adapters and the head. Where they lie
    behind the pooling, and nothing changes features, these are computed once;
    else a line says why not.
  train.stages = ()
    Parts of the updates, 'NAME:SHARE' in order, shares that sum to 1: 'all'
    (bits as planned, all is trained) | 'acts' (kernels in float) | 'weights'
    (activations in float) | 'norms' (only norms, biases, LayerScale and
    collections besides params are trained) | 'freeze' (statsq: weights far from
    a rounding boundary are held; see quant.freeze) | 'held' (statistics of
    BatchNorm stay as they are). () = 'all'.
  train.reestimate_batches = 0
    Batches of training images, without augmentation, from which statistics of
    BatchNorm are estimated anew after the last update; 0 = off.
  train.teacher = ''
    A model to learn from: the workdir of a run of ours, of any size and bits,
    or what weights.path takes; '' = none.
  train.teacher_size = ''
    Size of a teacher that is no run of ours, as model.size; '' = as the
    student.
  train.distill = 'soft'
    From the teacher's logits: 'soft' (all of them) | 'hard' (its first choice)
    | 'none'. Counts with a teacher.
  train.distill_weight = 0.5
    Share of that loss, the labels get the rest; 0..1.
  train.temperature = 1.0
    Both logits are divided by it when 'soft'; > 0.
  train.feature_weight = 0.0
    Weight of the distance between the features before both heads, along the
    main directions of the teacher's; 0 = off; >= 0.
  train.feature_variance = 0.6
    Share of variance these directions hold; 0..1.

eval
  eval.batch_size = 256
    Images a step, over all devices.
  eval.num_examples = 0
    Evaluate the first N images (folder: N spread over the classes); 0 = all.
  eval.engine = 'jax'
    What runs the model in eval, predict and benchmark: 'jax' | 'onnxruntime' |
    'openvino', on the CPU.
  eval.rivals = ()
    --mode=benchmark of a packed file: other packed files of the same model,
    ONNX files and those of OpenVINO that take turns with it.
  eval.every = 0
    Updates between evaluations; 0 = once an epoch.
  eval.images = ''
    --mode=predict: a folder, searched with those below it, or one file.
  eval.top_k = 5
    --mode=predict: likeliest classes that are named; >= 1.

checkpoint
  checkpoint.path = ''
    Another run's workdir, or WORKDIR/checkpoints/STEP: what `eval` evaluates
    and what a new `train` run starts from. '' = own workdir. With
    quant.recipe='ptq': the file of a packed model.
  checkpoint.every = 0
    Updates between saves; 0 = at each evaluation.

export
  export.format = 'safetensors'
    'safetensors' | 'npz' (weights in a layout) | 'packed' (the integers of a
    run with any quant.recipe but 'none') | 'onnx' (for onnxruntime, OpenVINO
    and others) | 'stablehlo' (the program of jax.export with its weights); both
    of a run or a packed file
  export.profile = ''
    Form of an ONNX file: 'qdq' (calibrated ranges; onnxruntime, OpenVINO,
    TensorRT) | 'dynamic' (each row finds its range; onnxruntime) |
    'weight_only' | 'float'; '' = that of the model's bits.
  export.preprocess = False
    Whether the ONNX file takes uint8 pixels of any size and resizes and
    normalises them itself.
  export.layout = 'timm'
    Whose names and axes.

mesh
  mesh.data = 0
    Copies of the model; 0 = all devices that are left.
  mesh.fsdp = 1
    Parts that parameters and batch are split into.
  mesh.fsdp_min_mib = 0.25
    Smaller arrays, in MiB, lie whole on every device; 0 splits all. From 4 on,
    kernels of a ViT-S are not split at all.
  mesh.tensor = 1
    Parts that heads and MLP channels are split into.
  mesh.timeout = 300
    Seconds that a process waits for the others of its run to start.

log
  log.every = 50
    Updates between two lines of metrics; >= 1.
  log.tensorboard = True
    Event files through CLU (needs TensorFlow).
  log.histograms = True
    Of the weights, at each evaluation.
  log.tracker = ''
    'wandb': scalars, confusion matrix and config go to Weights & Biases too
    (needs requirements-wandb.txt; WANDB_MODE=offline keeps them here); a
    resumed run goes on there; '' = none.

ptq
  ptq.rows = ('fp32', 'bf16', 'fp16', 'int8_dynamic', 'int8_static',
      'int8_weight_only', 'int4_weight_only', 'int4_weight_only_g32', 'w16a16',
      'w12a12', 'w10a10', 'w8a8', 'w6a6', 'w4a8', 'w4a4', 'w4a4+plain', 'w3a3',
      'w2a2+plain', 'int8_clip_99.9', 'mixed_simple', 'mixed_variance',
      'mixed_sensitivity')
    fp32 bf16 fp16, int8_dynamic int8_static int8_weight_only, int4_weight_only
    (also _g32, _g64, _g128), wXaY with X and Y among 2..8, 10, 12, 16 (also
    wXaY_static), mixed_simple mixed_variance mixed_sensitivity, int8_clip_99.9
    (also _99, _95, and int4). `+gptq+rotate` replaces a row's own solvers,
    `+plain` is min-max rounding. Solvers: rotate equalize absorb smooth_quant
    reparametrize, hadamard, per_tensor, gptq adaround, log2_softmax
    twin_softmax, bias_correction tune.
  ptq.calibration_examples = 256
    Images of the training split; >= 1.
  ptq.calibration_path = ''
    A folder `calibration` that an earlier run of the same weights wrote; '' =
    the workdir's own.
  ptq.range = 'auto'
    Of static activations, and of a start from quant.calibration_path: 'auto'
    (what measured best at the row's bits; 'mse' at such a start) | 'minmax' |
    'moving_average' | 'percentile' | 'mse' | 'entropy'
  ptq.scales = 'per_tensor'
    Static scales: 'per_tensor' | 'per_position' (each token position; each head
    of attention products; each channel of values)
  ptq.choices = ('w4a4', 'w4a8', 'w8a8')
    Specs that mixed_sensitivity chooses from and --mode=sensitivity tries.
  ptq.sensitivity_examples = 64
    Images for the effect of one site; >= 1.
  ptq.budget_mb = 0.0
    Most that mixed_sensitivity may take. Both 0: bytes halfway between the
    smallest and the largest choice. Packed kernels with scales, in 10**6 bytes;
    >= 0.
  ptq.budget_gbops = 0.0
    10**9 bit operations an image; >= 0.
  ptq.tune_steps = 100
    Updates of the solver tune; >= 1.
  ptq.latency_batch = 32
    Images of a timed forward pass; >= 1.
  ptq.rounds = 7
    Timed passes of each row beside float; >= 2.
  ptq.engines = ('auto',)
    Runtimes that are timed beside each row: 'onnxruntime' 'openvino';
    ('auto',): those that are installed; (): none.
  ptq.qat_runs = ()
    Workdirs of quantization-aware training, shown beside the rows.
  ptq.qat_specs = ()
    Bits wXaY to train at from the same float parameters, for the curve of
    accuracy against bits; attention products aY too. Sections optim and train,
    quant.rules and what belongs to the recipe count then.
  ptq.qat_seeds = 1
    Runs at each of them: seed, seed + 1, ...; >= 1.

compare
  compare.runs = ()
    --mode=compare: workdirs, steps, packed files or adapters that stand side by
    side on one page; the first one is what the others are tested against.
"""

from qvit_jax.config import resolve


def get_config():
  """Returns the defaults of all sections."""
  config = resolve.defaults()
  config.model.name = 'vit'
  return config
