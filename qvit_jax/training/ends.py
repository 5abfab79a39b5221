"""Why a run that is started again has nothing left to train."""

from typing import Any

UNFINISHED = (
  'statistics of norms were not estimated anew (train.reestimate_batches): '
  'that comes after the last step alone'
)


def is_stale(train: Any, stale: int) -> bool:
  """Returns whether `stale` evaluations without a new best end a run.

  Args:
    train: The section of the config.
    stale: Evaluations since the best one.
  """
  return bool(train.patience) and stale >= train.patience


def why_over(train: Any, *, done: int, total: int, stale: int) -> str:
  """Returns why a run trains nothing more and how it would; '' if it does.

  Args:
    train: The section of the config.
    done: Updates done.
    total: Updates of the whole run.
    stale: Evaluations since the best one.
  """
  is_early, is_done = is_stale(train, stale), done >= total
  if not is_early and not is_done:
    return ''
  length = 'steps' if train.steps else 'epochs'
  wanted = []
  if is_done:
    reason = f'stopped at step {done}: all {total} steps (train.{length}) are '
    reason += 'done'
    wanted.append(f'set --config.train.steps to more than {done}')
  else:
    reason = early_stop(done, stale)
  if is_early:
    wanted.append(
      f'set --config.train.patience={stale + 1} or more, or 0 for no early stop'
    )
  return f'{reason}; nothing is trained. To go on, {" and ".join(wanted)}'


def early_stop(done: int, stale: int) -> str:
  """Returns that, and why, a run stopped before its last step.

  Args:
    done: Updates done.
    stale: Evaluations since the best one.
  """
  return (
    f'stopped early at step {done}: no better top1 in {stale} evaluations '
    '(train.patience)'
  )
