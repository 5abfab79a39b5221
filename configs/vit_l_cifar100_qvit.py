"""ViT-L/16 at 224 px on CIFAR-100, W4A4 by Q-ViT from a float teacher.

  python main.py --config=configs/vit_l_cifar100_w4a4.py \
      --workdir=runs/l_float --config.quant.recipe=none
  python main.py --config=configs/vit_l_cifar100_qvit.py --workdir=runs/l_qvit

Learned steps and zero points (LSQ+), rectified queries and keys (IRM), clipped
GELUs, and distillation from the float run, of its logits and of its similarity
maps (DGD). Starts from the float run's weights; patch embedding and classifier
have 8 bits, as in the paper. Without a teacher:
  add --config.train.teacher= --config.quant.dgd=0
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.model.update(
    size='L/16', image_size=224, num_classes=100, norm_eps=1e-12
  )
  config.weights.path = 'runs/l_float'
  config.quant.update(
      recipe='qvit', attention='a4', rules=(('patch_embed|head', 'w8a8'),),
      dgd=1.0,
  )  # fmt: skip
  config.data.update(source='tfds', name='cifar100', pad=4, flip=True)
  config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  config.optim.update(lr=1e-4, clip_norm=1.0)
  config.train.update(
    epochs=100, batch_size=128, label_smoothing=0.1,
    teacher='runs/l_float', distill='hard', distill_weight=0.5,
  )  # fmt: skip
  config.eval.update(batch_size=128)
  return config
