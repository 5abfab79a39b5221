"""An attentive probe: pooling and head on a frozen backbone, CIFAR-100.

  python main.py --config=configs/vit_attentive_probe.py --workdir=runs/probe

A learned token asks all tokens of the last layer (an attention of its own with
an MLP behind it, then the head); only these are trained, on tokens that are
computed once. Starts from DINOv2's ViT-S/14 (timm's layout, fetched from the
Hugging Face hub) or from any vision transformer that --config.weights.path=
names: a file, a folder or a workdir.
Smaller images than the backbone's own: add --config.model.image_size=98
Backbones without a class token, whose own pooling then goes on (SigLIP):
  add --config.model.pool=attention
What it saves a step: add --mode=benchmark
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  # The weights say what the backbone is.
  config.model.size = 'auto'
  config.model.pool = 'token_attention'
  config.weights.path = 'hf://timm/vit_small_patch14_dinov2.lvd142m'
  config.data.update(source='tfds', name='cifar100')
  config.train.update(
    trainable=('params/pool', 'params/head'), epochs=10, batch_size=256
  )
  config.optim.update(lr=3e-4, warmup_epochs=0.5, warmup_from=0.0)
  config.eval.update(batch_size=250)
  return config
