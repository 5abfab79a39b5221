"""Any pretrained vision transformer fine-tuned on any data, in float.

  python main.py --config=configs/vit_finetune.py --workdir=runs/tuned
    --config.weights.path=hf://timm/vit_small_patch14_dinov2.lvd142m

The weights say what the model is (model.size='auto'): a file, a folder or an
address of the Hugging Face hub, in the names of timm, transformers and others.
Data are CIFAR-100 unless flags say otherwise, such as a folder of images:
  --config.data.source=folder --config.data.name= --config.data.dir=DIR
At another size in pixels than the file's: add --config.model.image_size=
A file that nothing tells the attention heads of: add --config.model.heads=
Afterwards, from the run alone: add --mode=eval, or --mode=ptq
  --config.checkpoint.path=runs/tuned and another --workdir
With 4-bit weights and activations: add --config.quant.recipe=aqt
"""

from configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.model.size = 'auto'
  config.data.update(source='tfds', name='cifar100', flip=True)
  config.optim.update(
      lr=3e-5, warmup_epochs=0.5, warmup_from=0.0, weight_decay=0.05,
      clip_norm=1.0,
  )  # fmt: skip
  config.train.update(epochs=10, batch_size=128, label_smoothing=0.1)
  config.eval.update(batch_size=250)
  return config
