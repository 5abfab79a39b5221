"""Evaluation, checkpoints, files, devices and logs. A row a field."""

from qvit_jax.config.fields import (
  ANY,
  BOOL,
  HAS_LAYOUT,
  ONE_UP,
  PROFILES,
  SPLITS,
  TIMES_PACKED,
  WRITES_EVENTS,
  WRITES_ONNX,
  ZERO_UP,
  Field,
  names,
  one_of,
)

FIELDS = (
  Field(
    'eval.batch_size', 256, ONE_UP,
    'Images a step, over all devices.',
  ),
  Field(
    'eval.num_examples', 0, ZERO_UP,
    'Evaluate the first N images (folder: N spread over the classes); 0 = '
    'all.',
  ),
  Field(
    'eval.engine', 'jax', ANY,
    "What runs the model in eval, predict and benchmark: 'jax' | 'onnxruntime' "
    "| 'openvino', on the CPU.",
    choices=True,
  ),
  Field(
    'eval.rivals', (), names('a tuple of files .safetensors, .onnx or .xml'),
    '--mode=benchmark of a packed file: other packed files of the same model, '
    'ONNX files and those of OpenVINO that take turns with it.',
    is_path=True, needs=(TIMES_PACKED,),
  ),
  Field(
    'eval.every', 0, ZERO_UP,
    'Updates between evaluations; 0 = once an epoch.',
  ),
  Field(
    'eval.images', '', ANY,
    '--mode=predict: a folder, searched with those below it, or one file.',
    is_path=True,
  ),
  Field(
    'eval.top_k', 5, ONE_UP,
    '--mode=predict: likeliest classes that are named; >= 1.',
  ),
  Field(
    'checkpoint.path', '', ANY,
    "Another run's workdir, or WORKDIR/checkpoints/STEP: what `eval` "
    "evaluates and what a new `train` run starts from. '' = own workdir. With "
    "quant.recipe='ptq': the file of a packed model.",
    is_path=True,
  ),
  Field(
    'checkpoint.every', 0, ZERO_UP,
    'Updates between saves; 0 = at each evaluation.',
  ),
  Field(
    'export.format', 'safetensors',
    one_of('safetensors', 'npz', 'packed', 'onnx', 'stablehlo'),
    "'safetensors' | 'npz' (weights in a layout) | 'packed' (the integers of a "
    "run with any quant.recipe but 'none') | 'onnx' (for onnxruntime, OpenVINO "
    "and others) | 'stablehlo' (the program of jax.export with its weights); "
    'both of a run or a packed file',
  ),
  Field(
    'export.profile', '', one_of('', *PROFILES),
    "Form of an ONNX file: 'qdq' (calibrated ranges; onnxruntime, OpenVINO, "
    "TensorRT) | 'dynamic' (each row finds its range; onnxruntime) | "
    "'weight_only' | 'float'; '' = that of the model's bits.",
    needs=(WRITES_ONNX,),
  ),
  Field(
    'export.preprocess', False, BOOL,
    'Whether the ONNX file takes uint8 pixels of any size and resizes and '
    'normalises them itself.',
    needs=(WRITES_ONNX,),
  ),
  Field(
    'export.layout', 'timm', ANY,
    'Whose names and axes.',
    needs=(HAS_LAYOUT,), choices=True,
  ),
  # Devices along each axis of the mesh; their product is the device count.
  Field(
    'mesh.data', 0, ZERO_UP,
    'Copies of the model; 0 = all devices that are left.',
  ),
  Field(
    'mesh.fsdp', 1, ONE_UP,
    'Parts that parameters and batch are split into.',
  ),
  Field(
    'mesh.fsdp_min_mib', 0.25, ZERO_UP,
    'Smaller arrays, in MiB, lie whole on every device; 0 splits all. '
    'From 4 on, kernels of a ViT-S are not split at all.',
    needs=(SPLITS,),
  ),
  Field(
    'mesh.tensor', 1, ONE_UP,
    'Parts that heads and MLP channels are split into.',
  ),
  Field(
    'mesh.timeout', 300, ONE_UP,
    'Seconds that a process waits for the others of its run to start.',
  ),
  Field(
    'log.every', 50, ONE_UP,
    'Updates between two lines of metrics; >= 1.',
  ),
  Field(
    'log.tensorboard', True, BOOL,
    'Event files through CLU (needs TensorFlow).',
  ),
  Field(
    'log.histograms', True, BOOL,
    'Of the weights, at each evaluation.',
    needs=(WRITES_EVENTS,),
  ),
  Field(
    'log.tracker', '', one_of('', 'wandb'),
    "'wandb': scalars, confusion matrix and config go to Weights & Biases too "
    '(needs requirements-wandb.txt; WANDB_MODE=offline keeps them here); a '
    "resumed run goes on there; '' = none.",
  ),
)  # fmt: skip
