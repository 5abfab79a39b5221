"""QLoRA: a pretrained ViT-L/16 packed in 4 bits, adapters on CIFAR-100.

  python main.py --config=configs/vit_l_cifar100_qlora.py --workdir=runs/qlora

Starts from Google's ViT-L/16 (fetched from the Hugging Face hub). Its kernels
stay packed in memory; adapters of rank 16 and the head are trained. On float
kernels: add --config.lora.base=float
Fold the adapters in and round again: add --mode=merge_lora
--config.lora.requantize=gptq
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  # Epsilon, mean and std are those the weights were trained with.
  config.model.update(
    size='L/16', image_size=224, num_classes=100, norm_eps=1e-12
  )
  config.lora.update(
    rank=16, alpha=32.0, targets=('attn', 'mlp'), base='int4', group=64
  )
  config.weights.update(
    path='hf://google/vit-large-patch16-224', required=False
  )
  config.data.update(source='tfds', name='cifar100', pad=4, flip=True)
  config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.optim.update(lr=5e-4, warmup_epochs=0.5, clip_norm=1.0)
  config.train.update(epochs=10, batch_size=128, label_smoothing=0.1)
  config.eval.update(batch_size=128)
  return config
