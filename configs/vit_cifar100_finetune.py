"""A pretrained ViT-S/14 fine-tuned on CIFAR-100 at 98 px, in float.

  python main.py --config=configs/vit_cifar100_finetune.py --workdir=runs/tuned

Starts from DINOv2's ViT-S/14 (timm's layout, fetched from the Hugging Face hub)
or from any ViT-S/14 that --config.weights.path= names: a file, a folder or a
workdir. Evaluate a file as it is:
  add --mode=eval --config.weights.path=FILE
With 4-bit weights and activations: add --config.quant.recipe=aqt
Another size: --config=configs/vit_cifar100_finetune.py:B/16 (from scratch, or
with --config.weights.path=)
"""

from configs import common


def get_config(size='S/14'):
  """Returns the config of a size such as 'B/16'."""
  config = common.get_config()
  patch = size.partition('/')[2]
  if not patch.isdigit():
    raise ValueError(f"the size {size!r} names no patch; write it as 'B/16'")
  patch = int(patch)
  config.model.update(size=size, image_size=7 * patch, num_classes=100)
  if size == 'S/14':
    config.model.layer_scale = 1e-5
    config.weights.path = 'hf://timm/vit_small_patch14_dinov2.lvd142m'
  config.data.update(source='tfds', name='cifar100', pad=4, flip=True)
  config.optim.update(
      lr=3e-5, warmup_epochs=0.5, warmup_from=0.0, weight_decay=0.05,
      clip_norm=1.0,
  )  # fmt: skip
  config.train.update(epochs=10, batch_size=128, label_smoothing=0.1)
  config.eval.update(batch_size=250)
  return config
