"""ViT-Ti blocks on scikit-learn's 8 x 8 digits, 4-bit weights and activations.

  python main.py --config=configs/vit_ti_digits_w4a4.py --workdir=runs/digits

Real images that ship with scikit-learn: no download. About a minute on two CPU
cores. The same in float: --config.quant.recipe=none
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.model.update(
      patch=4, width=192, depth=4, heads=3, mlp_dim=768, image_size=8,
      num_classes=10, dtype='float32',
  )  # fmt: skip
  config.quant.update(recipe='aqt', default='w4a4')
  config.data.update(
    source='digits', mean=(0.3,) * 3, std=(0.38,) * 3, mixup=0.2
  )
  config.optim.update(lr=5e-4, weight_decay=0.05, clip_norm=1.0)
  config.train.update(
    steps=1200, batch_size=64, label_smoothing=0.1, ema_decay=0.99
  )
  config.eval.update(batch_size=360, every=300)
  config.log.every = 100
  return config
