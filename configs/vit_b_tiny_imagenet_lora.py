"""LoRA of rank 4 on a pretrained ViT-B/16, Tiny-ImageNet from its folder.

  unzip tiny-imagenet-200.zip -d DIR
  python main.py --config=configs/vit_b_tiny_imagenet_lora.py --workdir=runs/b \
      --config.data.dir=DIR/tiny-imagenet-200

Starts from Google's ViT-B/16 (fetched from the Hugging Face hub). torchvision's
vit_b_16 instead: --config.weights.path=FILE --config.model.norm_eps=1e-6
--config.data.mean="(0.485, 0.456, 0.406)"
--config.data.std="(0.229, 0.224, 0.225)"
Fold the adapters in: the same command with --mode=merge_lora.
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  # Epsilon, mean and std are those the weights were trained with.
  config.model.update(
    size='B/16', image_size=224, num_classes=200, norm_eps=1e-12,
    head_dropout=0.1,
  )  # fmt: skip
  config.lora.update(rank=4, alpha=32.0, targets=('attn', 'mlp'))
  config.weights.update(path='hf://google/vit-base-patch16-224', required=False)
  config.data.update(source='folder', eval_split='val', workers=4, flip=True)
  config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.optim.update(
      lr=1e-3, schedule='linear', weight_decay=0.03,
      decay_rules=('kernel$|/[ab]$',),
  )  # fmt: skip
  config.train.update(epochs=5, batch_size=64)
  config.eval.update(batch_size=64)
  return config
