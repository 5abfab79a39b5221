"""Errors that a user can cause and mend; imports nothing of ours.

Every message is one line of three parts: what was given, what is allowed, what
to do. `main.py` prints it without a traceback and exits with 2.
"""


class QvitError(Exception):
  """Base of all errors below."""


class ConfigError(QvitError):
  """A config field, a flag or the workdir is wrong."""


class RuleError(ConfigError):
  """A path rule is malformed, matches nothing or is hidden by another."""


class QuantError(ConfigError):
  """A quantization spec is malformed or not supported."""


class DataError(QvitError):
  """A data set is missing, unreadable or does not fit the model."""


class CheckpointError(QvitError):
  """A checkpoint is missing, damaged, or of another model."""


class WeightsError(QvitError):
  """Foreign weights are unsafe, damaged, or do not fit the model."""


class ExportError(QvitError):
  """A model cannot be written in the form asked for."""


class DivergedError(QvitError):
  """Loss or gradient became infinite or NaN."""


class Preempted(Exception):  # noqa: N818 - a state of the run, not an error
  """A signal asked the run to stop; everything is saved (exit code 75)."""
