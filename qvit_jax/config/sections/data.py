"""Weights to start from, and images. A row a field."""

from qvit_jax.config.fields import (
  ANY,
  BELOW_ONE,
  BOOL,
  IMPORTS,
  READS_FILES,
  RESIDENT,
  SHARE,
  STREAMS,
  ZERO_UP,
  Field,
  channels,
  number,
  one_of,
  randaugment,
)

FIELDS = (
  Field(
    'weights.path', '', ANY,
    'What to start from: a .safetensors, .pth, .bin or .npz file, a folder as '
    'on the Hugging Face hub, hf://OWNER/NAME[@REVISION], or the workdir of '
    "another run; '' = from scratch. A head of another class count is "
    'replaced by a fresh one.',
    is_path=True,
  ),
  Field(
    'weights.required', True, BOOL,
    'False: where the hub cannot be reached and its cache is empty, say so '
    'and start from random weights. A path on the command line is required.',
    needs=(IMPORTS,),
  ),
  Field(
    'data.source', 'digits', one_of('digits', 'tfds', 'folder'),
    "'digits' (ships with scikit-learn) | 'tfds' | 'folder' (of images: "
    'DIR/SPLIT/CLASS/FILE, or Tiny-ImageNet or Food-101 as distributed)',
  ),
  Field(
    'data.name', '', ANY,
    "TFDS name, e.g. 'cifar100'; '' with the other sources.",
  ),
  Field(
    'data.dir', '', ANY,
    "tfds: data_dir; '' = TFDS_DATA_DIR, else TFDS's own. folder: DIR.",
    is_path=True,
  ),
  Field(
    'data.train_split', 'train', ANY,
    "TFDS split syntax works: 'train[:90%]'; folder: the name of a folder, or "
    'such a share of it in percent, stratified, the same for every seed.',
  ),
  Field(
    'data.eval_split', 'test', ANY,
    'Split that is evaluated, in the same syntax.',
  ),
  Field(
    'data.holdout', 0.1, BELOW_ONE,
    'folder: share of the training images that is evaluated instead where '
    'eval_split has no folder; [0, 1), 0 = that is an error.',
    needs=(READS_FILES,),
  ),
  Field(
    'data.bad_files', 10, ZERO_UP,
    'folder: files that cannot be decoded are skipped and named, up to this '
    'many; 0 = the first one is an error. --mode=predict skips all.',
    needs=(READS_FILES,),
  ),
  Field(
    'data.max_pixels', 2**26, number(1, 89_478_486),
    'folder, predict: pixels (width x height) that a file may have, more '
    "count as bad; 1 to 89,478,485, where Pillow's own limit lies.",
    needs=(READS_FILES,),
  ),
  Field(
    'data.mean', (0.485, 0.456, 0.406), channels(positive=False),
    'Of the RGB channels in 0..1.',
  ),
  Field(
    'data.std', (0.229, 0.224, 0.225), channels(positive=True),
    'Of the RGB channels in 0..1; > 0.',
  ),
  Field(
    'data.resize', 'bicubic', one_of('bicubic', 'bilinear'),
    "'bicubic' | 'bilinear', both with antialias",
  ),
  Field(
    'data.crop', 0.0, SHARE,
    'Train on windows of random size and place, resized to the model: the '
    'smallest share of the area of the image, e.g. 0.08; the aspect is 3/4 to '
    '4/3; 0 = off.',
  ),
  Field(
    'data.jitter', 0.0, SHARE,
    'Change brightness, contrast and saturation in a random order, each by a '
    'factor from 1 - jitter to 1 + jitter; [0, 1], 0 = off.',
  ),
  Field(
    'data.randaugment', (), randaugment(),
    'RandAugment: (operations an image, magnitude of 0 to 30), e.g. (2, 9); '
    '() = off.',
  ),
  Field(
    'data.pad', 0, ZERO_UP,
    'Pixels: pad by this many, crop at random; >= 0.',
  ),
  Field(
    'data.flip', False, BOOL,
    'Mirror left-right with probability 1/2.',
  ),
  Field(
    'data.erase', 0.0, SHARE,
    'Chance to erase a rectangle of an image; [0, 1].',
  ),
  Field(
    'data.mixup', 0.0, ZERO_UP,
    'Beta parameter of mixup; 0 = off.',
  ),
  Field(
    'data.cutmix', 0.0, ZERO_UP,
    'Beta parameter of CutMix; 0 = off.',
  ),
  Field(
    'data.resident_mib', 2048, ZERO_UP,
    'MiB of uint8 images (train + eval) kept on the device; larger sets '
    'stream from the host, as folders always do. Also the most that features '
    'which are computed once may take (see train.trainable).',
    needs=(RESIDENT,),
  ),
  Field(
    'data.workers', 0, ZERO_UP,
    'Decoding processes when streaming; 0 = threads.',
    needs=(STREAMS,),
  ),
)  # fmt: skip
