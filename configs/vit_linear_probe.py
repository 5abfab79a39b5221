"""A linear probe: a head on a frozen backbone, CIFAR-100.

  python main.py --config=configs/vit_linear_probe.py --workdir=runs/probe

Judges what a backbone knows: only the head is trained, on features that are
computed once, as no image is augmented. Starts from DINOv2's ViT-S/14 (timm's
layout, fetched from the Hugging Face hub) or from any vision transformer that
--config.weights.path= names: a file, a folder or a workdir.
Smaller images than the backbone's own: add --config.model.image_size=98
The head of DINOv2's own probes sees the mean of the patches too:
  add --config.model.pool=token_mean
A rate chosen on held-out training images:
  add --config.data.train_split='train[:90%]'
  --config.data.eval_split='train[90%:]' --config.optim.lr=1e-4
What it saves a step: add --mode=benchmark
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  # The weights say what the backbone is.
  config.model.size = 'auto'
  config.weights.path = 'hf://timm/vit_small_patch14_dinov2.lvd142m'
  config.data.update(source='tfds', name='cifar100')
  config.train.update(trainable=('params/head',), epochs=30, batch_size=256)
  config.optim.lr = 3e-4
  config.eval.update(batch_size=250)
  return config
