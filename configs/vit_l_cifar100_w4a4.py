"""ViT-L/16 at 224 px on CIFAR-100, 4-bit weights and activations (AQT).

  python main.py --config=configs/vit_l_cifar100_w4a4.py --workdir=runs/l_w4a4

Starts from Google's ViT-L/16 of ImageNet, fetched from the Hugging Face hub,
with a fresh classifier; without network and cache it says so and starts from
random weights (--config.weights.required=true makes that an error). Every layer
is quantized, patch embedding and classifier included; this raises those two to
8 bits:
  --config.quant.rules="(('patch_embed|head', 'w8a8'),)"
One rehearsal of everything on a CPU (3 updates, 8 test images):
  add --config.train.steps=3 --config.train.batch_size=2
      --config.eval.num_examples=8 --config.eval.batch_size=8
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  # Epsilon, mean and std are those the weights were trained with.
  config.model.update(
    size='L/16', image_size=224, num_classes=100, norm_eps=1e-12
  )
  config.weights.update(
    path='hf://google/vit-large-patch16-224', required=False
  )
  config.quant.update(recipe='aqt', default='w4a4')
  config.data.update(source='tfds', name='cifar100', pad=4, flip=True)
  config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.optim.update(
    lr=3e-4, warmup_epochs=5, weight_decay=0.05, clip_norm=1.0
  )
  config.train.update(epochs=300, batch_size=128, label_smoothing=0.1)
  config.eval.update(batch_size=128)
  return config
