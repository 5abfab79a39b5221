"""A ViT trained on CIFAR-100 from scratch, at 32 px with patches of 4 px.

  python main.py --config=configs/vit_cifar100_scratch.py --workdir=runs/scratch

ViT-B's width and depth; stops when 5 evaluations (one an epoch) bring nothing
better. A smaller one:
  add --config.model.width=192 --config.model.heads=3 --config.model.mlp_dim=768
With 4-bit weights and activations: add --config.quant.recipe=aqt
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.model.update(
      patch=4, width=768, depth=12, heads=12, mlp_dim=3072, image_size=32,
      num_classes=100, dropout=0.1, embedding_dropout=0.1,
  )  # fmt: skip
  config.data.update(
      source='tfds', name='cifar100', pad=4, flip=True,
      mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
  )  # fmt: skip
  config.optim.update(
      lr=1e-3, warmup_epochs=5, warmup_from=1e-5, weight_decay=0.05,
      clip_norm=1.0,
  )  # fmt: skip
  config.train.update(epochs=100, batch_size=128, patience=5)
  config.eval.update(batch_size=500)
  return config
