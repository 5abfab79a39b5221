"""VGG-11 on CIFAR-100, in float; then --mode=ptq writes the whole table.

  python main.py --config=configs/vgg11_cifar100.py --workdir=runs/vgg

224 px, 10 epochs from ImageNet's weights (torchvision's, which
--config.weights.path= names: a file or hf://...). At 32 px with BatchNorm, from
scratch, in 41 minutes on two CPU cores:
  python main.py --config=configs/vgg11_cifar100.py:32 --workdir=runs/vgg
The table of post-training quantization, with its report:
  add --mode=ptq --config.checkpoint.path=runs/vgg, and another --workdir
Quantization-aware training from that run: add --config.quant.recipe=lsq
  --config.quant.default=w8a8 --config.checkpoint.path=runs/vgg
  --config.train.epochs=2 --config.optim.lr=1e-5
At 4 bits from the row of that table: add --config.quant.recipe=lsq
  --config.quant.default=w4a4 --config.quant.act_granularity=per_token
  "--config.quant.rules=(('conv1_1', 'w4a8'),)" --config.model.batch_norm=none
  --config.checkpoint.path=PTQ/artifacts/w4a4.safetensors
  --config.train.teacher=runs/vgg --config.train.steps=300
  --config.optim.lr=5e-3 --config.optim.warmup_steps=20
"""

from configs import common


def get_config(image_size='224'):
  """Returns the config for images of that many pixels."""
  config = common.get_config()
  small = image_size == '32'
  config.model.update(
      name='vgg', size='11', image_size=int(image_size), num_classes=100,
      dtype='float32',
  )  # fmt: skip
  config.data.update(source='tfds', name='cifar100', flip=True)
  config.eval.update(batch_size=250)
  config.ptq.calibration_examples = 4 * 64
  config.optim.clip_norm = 1.0
  if small:
    config.model.update(batch_norm='train', classifier='linear')
    config.data.update(
        pad=4, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
    )  # fmt: skip
    config.optim.update(
        name='sgd', lr=0.1, momentum=0.9, warmup_epochs=1.0, weight_decay=5e-4,
    )  # fmt: skip
    config.train.update(epochs=10, batch_size=128, label_smoothing=0.1)
  else:
    config.model.update(batch_norm='none', head_dropout=0.5)
    config.optim.update(lr=1e-3, weight_decay=0.0)
    config.train.update(epochs=10, batch_size=64)
  return config
