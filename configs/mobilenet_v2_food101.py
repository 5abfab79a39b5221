"""MobileNetV2 on Food-101, in float; then --mode=ptq writes the whole table.

  python main.py --config=configs/mobilenet_v2_food101.py --workdir=runs/food
    --config.data.dir=food-101 --config.weights.path=FILE

224 px, 5 epochs from ImageNet's weights (torchvision's, which
--config.weights.path= names: a file or hf://...), Food-101 as distributed in
--config.data.dir; from TFDS: add --config.data.source=tfds
  --config.data.name=food101 --config.data.dir=
  --config.data.eval_split=validation
Weights of TensorFlow: add --config.model.padding=same
At 160 px, a recipe for two CPU cores:
  --config=configs/mobilenet_v2_food101.py:160
The table of post-training quantization, with its report:
  add --mode=ptq --config.checkpoint.path=runs/food, and another --workdir
Quantization-aware training from that run: add --config.quant.recipe=lsq
  --config.quant.default=w8a8 --config.checkpoint.path=runs/food
  --config.train.epochs=2 --config.optim.lr=1e-5
At 4 bits from the row of that table: add --config.quant.recipe=lsq
  --config.quant.default=w4a4 --config.quant.act_granularity=per_token
  "--config.quant.rules=(('stem', 'w4a8'),)" --config.model.batch_norm=none
  --config.checkpoint.path=PTQ/artifacts/w4a4.safetensors
  --config.train.teacher=runs/food --config.train.steps=300
  --config.optim.lr=1e-4 --config.optim.warmup_steps=20
"""

from configs import common


def get_config(image_size='224'):
  """Returns the config for images of that many pixels."""
  config = common.get_config()
  config.model.update(
      name='mobilenet_v2', size='1.0', image_size=int(image_size),
      num_classes=101, head_dropout=0.2, dtype='float32',
  )  # fmt: skip
  config.data.update(source='folder', flip=True)
  config.eval.update(batch_size=125)
  config.ptq.calibration_examples = 4 * 64
  config.optim.clip_norm = 1.0
  if image_size == '160':
    config.data.update(crop=0.35)
    config.optim.update(lr=1e-3, warmup_steps=20, weight_decay=0.01)
    config.train.update(steps=400, batch_size=32, label_smoothing=0.1)
  else:
    config.optim.update(lr=1e-3, weight_decay=0.0)
    config.train.update(epochs=5, batch_size=64)
  return config
