"""What is refused or said of rows before anything is calibrated."""

from collections.abc import Sequence

from qvit_jax.errors import ConfigError, QuantError
from qvit_jax.ops import Pair, Site, Stream
from qvit_jax.quantization.ptq.inputs import parts_of
from qvit_jax.quantization.ptq.rows import Row
from qvit_jax.quantization.ptq.solvers import SOLVERS
from qvit_jax.quantization.spec import granularity_of


def check_model(
  rows: Sequence[Row],
  sites: Sequence[Site],
  stream: Stream | None,
  pairs: Sequence[Pair] = (),
) -> None:
  """Refuses rows whose solvers need what the model has not.

  Args:
    rows: What is asked for.
    sites: All products.
    stream: The residual stream; None: the model has none.
    pairs: Layers between which channels can be scaled.

  Raises:
    ConfigError: Such a row; another without these solvers is named.
  """
  has_attention = any(site.kind == 'av' for site in sites)
  for there, needs, what in (
    (stream, lambda solver: solver.needs_stream, 'a residual stream'),
    (pairs, lambda solver: solver.needs_pairs,
     'layers between which channels can be scaled'),
    (has_attention, lambda solver: solver.softmax, 'attention products'),
  ):  # fmt: skip
    for row in () if there else rows:
      wrong = [s for s in row.solvers if needs(SOLVERS[s])]
      if wrong:
        rest = [s for s in row.solvers if s not in wrong] or ['plain']
        raise ConfigError(
          f'ptq.rows: {row.name!r} uses {" and ".join(wrong)}, which need '
          f'{what}; this model has none. Write '
          f'{"+".join([row.name.split("+")[0], *rest])!r}'
        )


def check_groups(rows: Sequence[Row], sites: Sequence[Site]) -> list[str]:
  """Returns lines for rows whose groups do not divide or fill some layer.

  Raises:
    QuantError: No layer has as many inputs as a group.
  """
  layers = {s.path: s.rhs_shape[0] for s in sites if s.is_layer}
  lines = []
  for row in rows:
    small = [path for path, size in layers.items() if size < row.group]
    if small and len(small) == len(layers):
      raise QuantError(
        f'row {row.name!r} shares scales among {row.group} inputs, but '
        f'{small[0]} has only {layers[small[0]]}, and no layer has more than '
        f'{max(layers.values())}; take smaller groups or int4_weight_only'
      )
    if small:
      lines.append(
        f'{row.name}: {_some(small)} {"have" if len(small) > 1 else "has"} '
        f'fewer than {row.group} inputs and one scale for each output channel'
      )
    cut = [n for n, size in layers.items() if row.group and size % row.group]
    cut = [path for path in cut if path not in small]
    if cut:
      lines.append(
        f'{row.name}: groups of {row.group} do not divide the inputs of '
        f'{_some(cut)}; the last group there is shorter'
      )
  return lines


def scale_notes(
  rows: Sequence[Row], sites: Sequence[Site], scales: str
) -> list[str]:
  """Returns a line where convolutions have other ranges than was asked for.

  Args:
    rows: What is asked for.
    sites: All products.
    scales: Of static rows, `config.ptq.scales`.
  """
  windows = [site for site in sites if site.window]
  kinds = {row.is_static for row in rows if row.default.acts}
  lines = []
  for is_static, name, asked in (
    (False, 'dynamic', 'per_token'), (True, 'static', scales)
  ):  # fmt: skip
    for other in {granularity_of(site, asked) for site in windows} - {asked}:
      if is_static in kinds:
        lines.append(
          f'{name} ranges of {len(windows)} convolutions are {other}, not '
          f'{asked}: their windows overlap'
        )
  return lines


def solver_notes(
  rows: Sequence[Row], sites: Sequence[Site], stream: Stream | None
) -> list[str]:
  """Returns a line for each thing that a solver cannot do whole in this model.

  Args:
    rows: What is asked for.
    sites: All products.
    stream: See `check_model`.
  """
  turned = [row.name for row in rows if 'rotate' in row.solvers]
  notes = []
  if turned and stream and not stream.writers:
    notes.append(
      f'{", ".join(turned)}: rotate turns the heads alone: where a norm stands '
      'before the blocks, or none behind them, the residual stream stays'
    )
  solvers = dict.fromkeys(row.rounding for row in rows if row.rounding)
  return notes + [
    f'{site.path} has {site.rhs_shape[0]:,} inputs, which {name} rounds in '
    f'{parts} parts'
    for site in sites
    for name in solvers
    if site.is_layer and (parts := parts_of(site.rhs_shape[0])) > 1
  ]


def _some(paths: Sequence[str]) -> str:
  """Returns the first three paths, and whether there are more."""
  return f'{", ".join(paths[:3])}{" ..." if len(paths) > 3 else ""}'
