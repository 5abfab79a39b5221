"""A ViT on your own folder of images, from scratch: ViT-B/16 at 224 px.

  python main.py --config=configs/vit_folder.py --workdir=runs/mine
      --config.data.dir=DIR

DIR holds train/CLASS/FILE and val/CLASS/FILE; without val/ a tenth of each
class is held out. Size, patch, width, depth, heads and classes are fields:
  add --config.model.image_size=64 --config.model.patch=8
      --config.model.width=192 --config.model.heads=3
      --config.model.mlp_dim=768 --config.model.num_classes=200
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.model.update(
      image_size=224, patch=16, width=768, depth=12, heads=12, mlp_dim=3072,
      num_classes=1000,
  )  # fmt: skip
  config.data.update(
    source='folder', train_split='train', eval_split='val', workers=4, flip=True
  )
  config.optim.update(
      lr=1e-3, warmup_epochs=5, weight_decay=0.05, clip_norm=1.0,
  )  # fmt: skip
  config.train.update(epochs=90, batch_size=128)
  return config
