"""What the model is. A row a field."""

from qvit_jax.config.fields import (
  ANY,
  BELOW_ONE,
  BOOL,
  NO_SIZE,
  ONE_UP,
  ZERO_UP,
  Field,
  number,
  one_of,
)

FIELDS = (
  Field(
    'seed', 0, number(0, 2**32),
    'Of init, data order, augmentation and dropout; 0 to 2**32 - 1.',
  ),
  Field(
    'model.name', '', ANY,
    'The family of models.',
    choices=True,
  ),
  Field(
    'model.size', '', ANY,
    "ViT: 'Ti', 'S', 'B' or 'L', a slash and the patch in pixels: 'L/16'; '' "
    "takes the five numbers below instead, 'auto' the whole model from the "
    'weights or the run that is named, and says which from where. VGG: '
    "'11', '13', '16' or '19' layers. MobileNetV2: a factor of all channels "
    "from '0.35' to '1.4'.",
  ),
  Field(
    'model.patch', 16, ONE_UP,
    'Side of a patch in pixels; divides image_size.',
    needs=(NO_SIZE,), of_family=True,
  ),
  Field(
    'model.width', 192, ONE_UP,
    'Channels of a token; heads divides it.',
    needs=(NO_SIZE,), of_family=True,
  ),
  Field(
    'model.depth', 12, ONE_UP,
    'Transformer blocks; >= 1.',
    needs=(NO_SIZE,), of_family=True,
  ),
  Field(
    'model.heads', 3, ONE_UP,
    'Attention heads; >= 1.',
    needs=(NO_SIZE,), of_family=True,
  ),
  Field(
    'model.mlp_dim', 768, ONE_UP,
    'Hidden channels of the MLP; >= 1.',
    needs=(NO_SIZE,), of_family=True,
  ),
  Field(
    'model.image_size', 224, ONE_UP,
    'Side of the square input in pixels; >= 1.',
  ),
  Field(
    'model.num_classes', 1000, number(2),
    'Outputs of the head; >= 2.',
  ),
  Field(
    'model.position', 'learned', one_of('learned', 'rope'),
    "Of patches: 'learned' (added to them) | 'rope' (turns queries and keys by "
    'row and column, no parameters, DINOv3).',
    of_family=True,
  ),
  Field(
    'model.pool', 'token',
    one_of(
      'token', 'mean', 'patch_mean', 'token_mean', 'attention',
      'token_attention',
    ),
    "What the head sees: 'token' (class token) | 'mean' (of the patches; no "
    "class token) | 'patch_mean' (of the patches, beside a class token, as "
    "MAE) | 'token_mean' (token and mean side by side, as DINOv2) | "
    "'attention' (a learned token asks the patches, no class token, SigLIP) | "
    "'token_attention' (a learned token asks all tokens, beside a class token: "
    'an attentive probe).',
    of_family=True,
  ),
  Field(
    'model.norm_after_pool', False, BOOL,
    "The last norm stands behind the pooling (MAE's fc_norm); not with "
    "'token_mean', 'attention' or 'token_attention'.",
    of_family=True,
  ),
  Field(
    'model.last_norm', True, BOOL,
    'There is a norm behind the blocks, or behind the pooling; not in RADIO.',
    of_family=True,
  ),
  Field(
    'model.pre_norm', False, BOOL,
    'A norm stands before the blocks, behind the positions (CLIP).',
    of_family=True,
  ),
  Field(
    'model.activation', 'gelu',
    one_of('gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'),
    "Between the layers of an MLP: 'gelu' (exact) | 'gelu_tanh' (SigLIP) | "
    "'quick_gelu' (x sigmoid(1.702 x), of OpenAI's CLIP) | 'swiglu' (SiLU of a "
    "second layer times the first, DINOv3's larger ones). No tensor shows "
    'which GELU.',
    of_family=True,
  ),
  Field(
    'model.registers', 0, ZERO_UP,
    'Tokens after the class token that no patch fills: registers, or the '
    'distillation token of DeiT; >= 0.',
    of_family=True,
  ),
  Field(
    'model.layer_scale', 0.0, ZERO_UP,
    'Initial value of LayerScale; 0 = none.',
    of_family=True,
  ),
  Field(
    'model.qk_norm', False, BOOL,
    'LayerNorm on queries and keys of each head.',
    of_family=True,
  ),
  Field(
    'model.norm_eps', 1e-06, number(0, open_low=True),
    'Epsilon of every LayerNorm; > 0.',
    of_family=True,
  ),
  Field(
    'model.channels', 64, ONE_UP,
    "Of VGG's first stage; others have 2, 4 and 8 times as many, hidden layers "
    'of the classifier 64 times; 64 in the paper.',
    of_family=True,
  ),
  Field(
    'model.classifier', 'paper', one_of('paper', 'linear'),
    "Of VGG: 'paper' (mean of 7 x 7 windows, two hidden layers, head) | "
    "'linear' (mean of the image, head), for small images.",
    of_family=True,
  ),
  Field(
    'model.padding', '', one_of('', 'torch', 'same'),
    "Where a stride skips pixels: 'torch' (as many zeros on both sides) | "
    "'same' (TensorFlow's: as few as the image size allows, the odd one below "
    "and on the right). Trained weights know one of them; '' = 'torch', and an "
    'error where weights do not say that they mean it.',
    of_family=True,
  ),
  Field(
    'model.batch_norm', 'train', one_of('train', 'held', 'none'),
    "BatchNorm behind convolutions: 'train' (training normalises by the batch "
    "and averages its statistics) | 'held' (training too normalises by the "
    "averages, which stay as they are) | 'none' (there is none, or it is "
    'folded into kernels and biases).',
    of_family=True,
  ),
  Field(
    'model.dropout', 0.0, BELOW_ONE,
    'After attention and in the MLP; [0, 1).',
    of_family=True,
  ),
  Field(
    'model.attention_dropout', 0.0, BELOW_ONE,
    'On attention weights; [0, 1).',
    of_family=True,
  ),
  Field(
    'model.embedding_dropout', 0.0, BELOW_ONE,
    'After the position embedding; [0, 1).',
    of_family=True,
  ),
  Field(
    'model.head_dropout', 0.0, BELOW_ONE,
    "Before the head, and between the hidden layers of vgg's classifier; "
    '[0, 1).',
    of_family=True,
  ),
  Field(
    'model.stochastic_depth', 0.0, BELOW_ONE,
    "Chance to skip the last block's branches, growing linearly from 0 at the "
    'first block; [0, 1).',
    of_family=True,
  ),
  Field(
    'model.dtype', 'bfloat16', one_of('bfloat16', 'float16', 'float32'),
    "Of products: 'bfloat16' | 'float16' (with loss scaling) | 'float32'; "
    'parameters, norms and softmax are float32.',
    of_method=True,
  ),
  Field(
    'model.remat', False, BOOL,
    'Recompute blocks (stages of vgg) in the backward pass: less memory.',
    of_family=True,
  ),
)  # fmt: skip
