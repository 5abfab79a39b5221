"""What the package needs: the lines of the requirements files, not a copy."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
TESTS = '# Tests and style'


def lines(name: str) -> list[str]:
  """Returns the requirements of a file, up to those of tests."""
  found: list[str] = []
  text = (HERE / name).read_text(encoding='utf-8').partition(TESTS)[0]
  for line in text.splitlines():
    line = line.partition(' #')[0].strip()
    if line.startswith('-r '):
      found += lines(line.removeprefix('-r '))
    elif line and not line.startswith('#'):
      found.append(line)
  return found


setuptools.setup(
  packages=[
    # Some folders have no __init__.py.
    *setuptools.find_namespace_packages(
      include=['qvit_jax', 'qvit_jax.*'], exclude=['*.__pycache__']
    ),
    'qvit_jax.configs',
  ],
  package_dir={'qvit_jax': 'qvit_jax', 'qvit_jax.configs': 'configs'},
  package_data={'qvit_jax': ['report/*.jinja']},
  install_requires=lines('requirements.txt'),
  extras_require={
    'onnx': lines('requirements-onnx.txt'),
    'openvino': lines('requirements-openvino.txt'),
    'wandb': lines('requirements-wandb.txt'),
    'cuda13': [
      line.replace('jax', 'jax[cuda13]', 1)
      for line in lines('requirements.txt')
      if line.startswith('jax>')
    ],
  },
)
