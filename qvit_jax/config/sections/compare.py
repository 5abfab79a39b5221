"""Fields of the section `compare`."""

from qvit_jax.config.fields import Field, names

FIELDS = (
  Field(
    'compare.runs', (), names('a tuple of paths'),
    '--mode=compare: workdirs, steps, packed files or adapters that stand side '
    'by side on one page; the first one is what the others are tested against.',
    is_path=True,
  ),
)  # fmt: skip
