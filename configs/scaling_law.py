"""Accuracy against bits on digits: PTQ and QAT from one float checkpoint.

  python main.py --config=configs/vit_ti_digits_w4a4.py --workdir=runs/float --config.quant.recipe=none
  python main.py --config=configs/scaling_law.py --workdir=runs/curve --mode=ptq --config.checkpoint.path=runs/float

The model of vit_ti_digits_w4a4.py. Fifteen short trainings (five widths, three
seeds) lie in runs/curve/qat; the same command goes on where it stopped.
"""  # noqa: E501 - commands to copy

from configs import common


def get_config():
  """Returns the config; optim and train are those of the short trainings."""
  config = common.get_config()
  config.model.update(
      patch=4, width=192, depth=4, heads=3, mlp_dim=768, image_size=8,
      num_classes=10, dtype='float32',
  )  # fmt: skip
  config.data.update(
    source='digits', mean=(0.3,) * 3, std=(0.38,) * 3, mixup=0.2
  )
  config.quant.recipe = 'lsq'  # of the trainings; rows start from float
  config.optim.update(lr=5e-5, quant_lr=1e-3, weight_decay=0.05, clip_norm=1.0)
  config.train.update(
    steps=400, batch_size=64, label_smoothing=0.1, ema_decay=0.99
  )
  config.eval.update(batch_size=360, every=100)
  config.log.update(every=100, tensorboard=False)
  config.ptq.update(
      rows=(
          'fp32', 'bf16', 'w8a8', 'w8a8+plain', 'w6a6', 'w6a6+plain', 'w4a4',
          'w4a4+plain', 'w3a3', 'w3a3+plain', 'w2a2', 'w2a2+plain',
      ),
      qat_specs=('w8a8', 'w6a6', 'w4a4', 'w3a3', 'w2a2'), qat_seeds=3,
  )  # fmt: skip
  return config
