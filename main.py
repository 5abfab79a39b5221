"""The command line of a checkout; see `qvit_jax/api/cli.py`."""

from qvit_jax.api import cli

if __name__ == '__main__':
  cli.run()
