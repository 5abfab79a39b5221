"""Small convolutional models, for tests: 32 px, few channels, 10 classes."""

from configs import common
from qvit_jax.models import mobilenet

# Strides 2 and 1, an expansion of 1, and a residual block.
FEW_STAGES = ((1, 16, 1, 1), (2, 16, 2, 2))


def vgg_config(**fields):
  """VGG-11 with 8 channels where the paper has 512."""
  config = common.get_config()
  config.model.update(
    name='vgg', size='11', channels=1, classifier='linear', image_size=32,
    num_classes=10, dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config


def mobilenet_config(monkeypatch, **fields):
  """MobileNetV2 0.5 with three blocks of 8 channels, for 16 px."""
  monkeypatch.setattr(mobilenet, 'STAGES', FEW_STAGES)
  monkeypatch.setattr(mobilenet, 'LAST', 16)
  config = common.get_config()
  config.model.update(
    name='mobilenet_v2', size='0.5', image_size=16, num_classes=10,
    dtype='float32',
  )  # fmt: skip
  config.model.update(fields)
  return config
