"""What `--mode=ptq` runs: every row, packed, measured beside float. Row 9."""

import copy
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import artifacts, files, models, tree
from qvit_jax import config as config_lib
from qvit_jax.data import preprocess
from qvit_jax.errors import ConfigError
from qvit_jax.evaluation import benchmark as timing
from qvit_jax.evaluation import report
from qvit_jax.evaluation.metrics import EvalSums, summarize
from qvit_jax.experiment import Experiment
from qvit_jax.quantization import calibrate, ptq
from qvit_jax.quantization.rows import Row, parse_row

_CALIBRATION_BATCH = 32
# A row this far below float, or that names this few classes, has collapsed.
_COLLAPSE_POINTS = 0.2
_COLLAPSE_CLASSES = 0.25
_BASELINE = 'fp32'


@dataclasses.dataclass
class _Measured:
  """Logits of every evaluated image, and how long a batch takes."""

  logits: np.ndarray
  run: Callable[[], Any]
  memory: dict[str, int | None]


class Table:
  """The rows of one float model."""

  def __init__(
    self,
    experiment: Experiment,
    params: dict[str, Any],
    place: pathlib.Path,
    say: Callable[[str], None],
  ):
    """Takes the model's float parameters, as host arrays by path."""
    config = experiment.config
    self.experiment, self.config, self.say = experiment, config, say
    self.params, self.place = params, place
    self.rows = [parse_row(name) for name in config.ptq.rows]
    if not self.rows:
      raise ConfigError("ptq.rows is empty; set it to rows such as ('w8a8',)")
    self.sites = experiment.model.plan.sites
    self.stream = models.stream(config)
    self._stats: dict[bool, dict[str, calibrate.SiteStats]] = {}
    self._check_calibration()
    # Rows of an earlier run count only if they are of the same weights.
    digest = hashlib.sha256()
    for name, values in sorted(params.items()):
      digest.update(name.encode() + values.tobytes())
    self._digest = digest.hexdigest()

  def _check_calibration(self) -> None:
    asked = self.config.ptq.calibration_examples
    there = self.experiment.data.train.size
    if asked > there:
      raise ConfigError(
        f'ptq.calibration_examples={asked}, but the training split has only '
        f'{there} images; set --config.ptq.calibration_examples={there}'
      )

  def run(self) -> list[dict[str, Any]]:
    """Runs every row that results.json does not hold yet; returns all."""
    done = self._done_rows()
    base = self._measure(self._pack(parse_row(_BASELINE)))
    baseline = self._row(parse_row(_BASELINE), base, base, {'seconds': 0.0})
    finished = []
    for index, row in enumerate(self.rows):
      if row.name in done:
        finished.append(done[row.name])
        self.say(f'row {index + 1}/{len(self.rows)}  {row.name}: done before')
        continue
      started = time.monotonic()
      packed = self._pack(row)
      seconds = time.monotonic() - started
      found = self._measure(packed)
      finished.append(self._row(row, found, base, {'seconds': seconds}))
      self._write(baseline, finished)
      self.say(self._line(index, finished[-1], baseline))
    self._write(baseline, finished)
    return finished

  def _done_rows(self) -> dict[str, dict[str, Any]]:
    """Returns the rows of an earlier run of the same config."""
    path = self.place / 'results.json'
    if not path.is_file():
      return {}
    old = json.loads(path.read_text(encoding='utf-8'))
    digest = report.config_digest(config_lib.to_json(self.config))
    if old.get('config_digest') != digest:
      return {}
    if old.get('weights_digest') != self._digest:  # trained further since
      return {}
    return {row['name']: row for row in old['rows']}

  def _write(self, baseline, rows) -> None:
    resolved = config_lib.to_json(self.config)
    content = report.results(resolved, baseline, rows)
    content['weights_digest'] = self._digest
    files.write_json(self.place / 'results.json', content)

  # One row.

  def _pack(self, row: Row) -> ptq.Packed:
    """Returns the row's model as it comes back from its file."""
    seed = self.config.seed
    params = ptq.transform(row, self.params, self.stream, seed=seed)
    stats = self._statistics(row, params) if row.needs_calibration else None
    packed = ptq.apply_row(
      row, params, self.sites, stats, range_method=self.config.ptq.range
    )
    path = self._artifact(row)
    architecture = models.architecture(self.config)
    artifacts.save(packed, path, architecture)
    return artifacts.load(path, self.sites, architecture)

  def _artifact(self, row: Row) -> pathlib.Path:
    return self.place / 'artifacts' / f'{row.name}.safetensors'

  def _statistics(self, row: Row, params) -> dict[str, calibrate.SiteStats]:
    key = 'rotate' in row.solvers
    if key not in self._stats:
      rows = [r for r in self.rows if ('rotate' in r.solvers) == key]
      variables = {'params': tree.nest(params)}
      self._stats[key] = calibrate.collect(
        lambda ops: models.build_model(self._float_config('float32'), ops),
        jax.tree.map(jnp.asarray, variables),
        self._calibration_batches,
        self.sites,
        hessians=any('gptq' in r.solvers for r in rows),
        histograms=any(r.is_static for r in rows),
        progress=self.say,
      )
    return self._stats[key]

  def _float_config(self, dtype: str):
    config = copy.deepcopy(self.config)
    config.model.dtype = dtype
    return config

  def _calibration_batches(self) -> Iterator[jax.Array]:
    """Yields the first images of the seeded order, as evaluation sees them."""
    left = self.config.ptq.calibration_examples
    batch = min(_CALIBRATION_BATCH, left)
    data, size = self.config.data, self.config.model.image_size
    train = self.experiment.data.train
    hosts = train.train_batches(
      seed=self.config.seed, batch=batch, rows=slice(0, batch), first=1,
      last=-(-left // batch),
    )  # fmt: skip
    prepare = jax.jit(
      lambda images: preprocess.prepare_eval(images, data=data, size=size)
    )
    for host in hosts:
      images, _ = preprocess.gather(train.source, host)
      images = prepare(images)[: min(batch, left)]
      left -= len(images)
      yield images

  def _measure(self, packed: ptq.Packed) -> _Measured:
    config = self.config
    model = models.build_model(self._float_config(packed.dtype), packed.ops)
    data, size = config.data, config.model.image_size
    split = self.experiment.data.eval
    source = jax.tree.map(jnp.asarray, split.source)

    @jax.jit
    def forward(variables, source, batch):
      images, _ = preprocess.gather(source, batch)
      return model.apply(
        variables, preprocess.prepare_eval(images, data=data, size=size)
      )

    batch = min(config.eval.batch_size, split.size)
    parts = []
    for host in split.eval_batches(batch=batch, rows=slice(0, batch)):
      logits = np.asarray(forward(packed.variables, source, host))
      parts.append(logits[np.asarray(host['mask']) > 0])
    images = jax.random.normal(
      jax.random.key(0), (config.ptq.latency_batch, size, size, 3)
    )
    compiled, _ = timing.compile_timed(
      jax.jit(model.apply), packed.variables, images
    )
    return _Measured(
      np.concatenate(parts),
      lambda: compiled(packed.variables, images),
      timing.memory(compiled),
    )

  def _labels(self) -> np.ndarray:
    split = self.experiment.data.eval
    batch = min(self.config.eval.batch_size, split.size)
    labels = []
    for host in split.eval_batches(batch=batch, rows=slice(0, batch)):
      _, found = preprocess.gather(split.source, host)
      labels.append(np.asarray(found)[np.asarray(host['mask']) > 0])
    return np.concatenate(labels)

  def _row(self, row: Row, found: _Measured, base: _Measured, more):
    packed_path = self._artifact(row)
    packed = artifacts.load(
      packed_path, self.sites, models.architecture(self.config)
    )
    sums = EvalSums.zeros(self.config.model.num_classes).add(
      jnp.asarray(found.logits),
      jnp.asarray(self._labels()),
      jnp.ones(len(found.logits)),
    )
    seconds = timing.interleave(
      {'row': found.run, 'float': base.run}, rounds=self.config.ptq.rounds
    )
    spread = timing.spread(seconds['row'])
    size, full = (
      packed.num_bytes(),
      4 * sum(x.size for x in self.params.values()),
    )
    return report.make_row(
      name=row.name,
      method=row.method,
      weight_bits=row.weights or 8 * jnp.dtype(row.dtype).itemsize,
      act_bits=row.acts or 8 * jnp.dtype(row.dtype).itemsize,
      size_bytes=size,
      artifact_bytes=packed_path.stat().st_size,
      compression=full / size,
      bops=packed.plan.bops(),
      macs=packed.plan.macs(),
      latency_ms={k: 1e3 * v for k, v in spread.items()},
      images_per_second=self.config.ptq.latency_batch / spread['median'],
      speedup=timing.ratio(seconds['float'], seconds['row'])['median'],
      peak_memory_bytes=found.memory['peak'],
      execution=packed.execution,
      why=packed.why,
      **summarize(jax.device_get(sums)),
      **_compare(found.logits, base.logits),
      **more,
    )

  def _line(self, index: int, row: dict[str, Any], baseline) -> str:
    predicted = sum(
      any(column) for column in zip(*row['confusion'], strict=True)
    )
    fallen = row['top1'] < baseline[
      'top1'
    ] - _COLLAPSE_POINTS or predicted < _COLLAPSE_CLASSES * len(
      row['confusion']
    )
    sqnr = '-' if row['sqnr_db'] is None else f'{row["sqnr_db"]:.1f}'
    return (
      f'row {index + 1}/{len(self.rows)}  {row["name"]:22} top1 '
      f'{row["top1"]:.4f}  agreement {row["agreement"]:.4f}  SQNR {sqnr} dB  '
      f'{row["artifact_bytes"] / 1e6:.2f} MB ({row["compression"]:.2f}x)  '
      f'{row["latency_ms"]["median"]:.1f} ms ({row["speedup"]:.2f}x)  '
      f'{row["execution"]}' + ('  COLLAPSED' if fallen else '')
    )


def _compare(logits: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
  """Returns agreement and signal-to-noise ratio of logits beside float's."""
  noise = float(np.square(logits - base, dtype=np.float64).sum())
  signal = float(np.square(base, dtype=np.float64).sum())
  same = logits.argmax(axis=1) == base.argmax(axis=1)
  return {
    'agreement': float(same.mean()),
    'sqnr_db': 10 * float(np.log10(signal / noise)) if noise else None,
  }
