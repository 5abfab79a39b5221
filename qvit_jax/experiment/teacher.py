"""The model that a student learns from: loaded, placed, asked."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvit_jax import models, tree, weights
from qvit_jax.config import resolve as config_lib
from qvit_jax.errors import CheckpointError, ConfigError, WeightsError
from qvit_jax.experiment import calibration, checks, foreign, sources
from qvit_jax.experiment.experiment import Experiment
from qvit_jax.ops import Ops
from qvit_jax.quantization.methods.dgd import dgd_loss
from qvit_jax.store import runs
from qvit_jax.training import losses, sharding
from qvit_jax.training.pca import principal_directions

_IMAGES = 512  # training images whose features give the main directions
_SEEN = 'taps'  # the collection of what the taps see


class Teacher:
  """A teacher beside its student; the train step calls it.

  Attributes:
    given: Its arrays on the devices: 'variables', and 'directions' of its
      features where they count.
    names: Of the parts of its loss.
    lines: What it is, for a person.
    identity: By which a run that goes on knows it again: its 'path' in the
      config, 'origin' and the 'digest' of its weights.
  """

  def __init__(
    self,
    student: Experiment,
    own: Experiment,
    variables: Any,
    *,
    origin: str,
    digest: str,
  ):
    """Checks that they go together and finds the directions of features.

    Args:
      student: Who learns.
      own: The teacher's own experiment, on the student's data and mesh.
      variables: Of the teacher, placed.
      origin: Whence they are.
      digest: Of their content.

    Raises:
      ConfigError: They do not go together.
    """
    config = student.config
    self._train, self._dgd = config.train, config.quant.dgd
    self.identity = {
      'path': config.train.teacher,
      'origin': origin,
      'digest': digest,
    }
    self._features = config.train.feature_weight > 0
    self.names = tuple(
      name
      for name, on in (
        ('distill_loss', self._train.distill != 'none'),
        ('feature_loss', self._features),
        ('dgd_loss', self._dgd > 0),
      )
      if on
    )
    self._check(student, own)
    # (of the student, of the teacher): their layers may have other names.
    self._heads = tuple(models.family(x.config).head for x in (student, own))
    self._pairs = tuple(_pairs(x) for x in (student, own))
    self._apply = self.tapped(own.config, own.model.ops)
    self.given: dict[str, Any] = {'variables': variables}
    self.lines = [f'{own.model.title}; {origin}', own.model.bits]
    if self._features:
      features = self._features_of(student)
      found = principal_directions(features, self._train.feature_variance)
      self.given['directions'] = student.replicate(found)
      self.lines.append(
        f'features: {found.shape[1]} of {found.shape[0]} directions hold '
        f'{self._train.feature_variance:.0%} of the variance of '
        f'{len(features)} training images'
      )
    self.lines.append(f'loss: {self._losses()}')

  def __call__(
    self,
    given: dict[str, Any],
    images: jax.Array,
    logits: jax.Array,
    seen: dict[str, Any],
    label_loss: jax.Array,
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the student's loss and its parts, in the order of `names`.

    Args:
      given: `self.given`, or a trace of it.
      images: The augmented images that the student saw.
      logits: Of the student.
      seen: What its `tapped` apply saw.
      label_loss: The loss of the labels.
    """
    train, parts = self._train, []
    answer, known = jax.lax.stop_gradient(
      self._apply(given['variables'], images, train=False)
    )
    seen, known = tree.flatten(seen), tree.flatten(known)
    loss = label_loss
    if train.distill != 'none':
      parts.append(
        losses.hard_distillation(logits, answer)
        if train.distill == 'hard'
        else losses.soft_distillation(logits, answer, train.temperature)
      )
      share = train.distill_weight
      loss = (1 - share) * label_loss + share * parts[-1]
    if self._features:
      ours, theirs = (f'{_SEEN}/{head}/lhs' for head in self._heads)
      parts.append(
        losses.feature_distance(seen[ours], known[theirs], given['directions'])
      )
      loss = loss + train.feature_weight * parts[-1]
    if self._dgd:
      ours, theirs = self._pairs
      here = _queries_and_keys(seen, ours)
      parts.append(dgd_loss(here, _queries_and_keys(known, theirs)))
      loss = loss + self._dgd * parts[-1]
    return loss, tuple(parts)

  def tapped(self, config: Any, ops: Ops) -> Callable[..., Any]:
    """Returns a model's `apply`, giving (logits, what the losses need)."""

    def keep(module, name, value):
      module.sow(
        _SEEN, name, value, reduce_fn=lambda old, new: new, init_fn=tuple
      )

    head = models.family(config).head

    def tap(module, site, lhs, rhs, dims):
      del dims
      if site.path == head and self._features:
        keep(module, 'lhs', lhs)
      if site.kind == 'qk' and self._dgd:
        keep(module, 'lhs', lhs)
        keep(module, 'rhs', rhs)

    module = models.build_model(config, dataclasses.replace(ops, tap=tap))

    def apply(*args, mutable=(), **kwargs):
      return module.apply(*args, mutable=[*mutable, _SEEN], **kwargs)

    return apply

  def _check(self, student: Experiment, own: Experiment) -> None:
    """Raises ConfigError where a loss compares what cannot be compared."""
    ours, theirs = (
      {site.path: site for site in experiment.model.plan.sites}
      for experiment in (student, own)
    )
    width, there = (
      sites[models.family(experiment.config).head].lhs_shape[-1]
      for experiment, sites in ((student, ours), (own, theirs))
    )
    if self._features and width != there:
      raise ConfigError(
        'train.feature_weight compares the features before both heads, but '
        f'the teacher has {there} of them, the student {width}; give a teacher '
        'of the same width or set --config.train.feature_weight=0'
      )
    # Tokens and heads of every layer; channels of a head may differ.
    here, there = (
      [s.lhs_shape[:2] for s in sites.values() if s.kind == 'qk']
      for sites in (ours, theirs)
    )
    if self._dgd and not here:
      raise ConfigError(
        f'quant.dgd={self._dgd:g} compares queries and keys of attention, of '
        'which the student has none; set --config.quant.dgd=0'
      )
    if self._dgd and not there:
      raise ConfigError(
        f'quant.dgd={self._dgd:g} compares queries and keys of attention, of '
        'which the teacher has none; give a teacher with the same layers and '
        'heads or set --config.quant.dgd=0'
      )
    if self._dgd and here != there:
      shapes = (
        f'{len(maps)} layers, {maps[0][1]} heads, {maps[0][0]} tokens'
        for maps in (there, here)
      )
      raise ConfigError(
        'quant.dgd compares the similarity maps of every layer and head, but '
        f'the teacher has {next(shapes)}, the student {next(shapes)}; give a '
        'teacher with the same or set --config.quant.dgd=0'
      )

  def _features_of(self, student: Experiment) -> np.ndarray:
    """Returns the teacher's features of training images, [m, d]."""
    name = f'{_SEEN}/{self._heads[1]}/lhs'

    def features(variables, images):
      _, seen = self._apply(variables, images, train=False)
      return tree.flatten(seen)[name].astype(jnp.float32)

    features = jax.jit(features, out_shardings=student.whole_sharding)
    count = min(_IMAGES, student.data.train.size)
    return np.concatenate([
        np.asarray(
            features(self.given['variables'], student.replicate(images))
        )
        for images, _ in calibration.prepared(student, count)
    ])  # fmt: skip

  def _losses(self) -> str:
    train, said = self._train, []
    if train.distill != 'none':
      heat = f' at T={train.temperature:g}' if train.distill == 'soft' else ''
      said.append(
        f'{1 - train.distill_weight:g} labels + {train.distill_weight:g} '
        f'{train.distill} distillation{heat}'
      )
    else:
      said.append('labels')
    if self._features:
      said.append(f'{train.feature_weight:g} features')
    if self._dgd:
      said.append(f'{self._dgd:g} DGD')
    return ' + '.join(said)


def _pairs(experiment: Experiment) -> tuple[str, ...]:
  """Returns the paths of products of queries and keys, first layer first."""
  return tuple(s.path for s in experiment.model.plan.sites if s.kind == 'qk')


def _queries_and_keys(
  seen: dict[str, Any], paths: Sequence[str]
) -> list[tuple[Any, Any]]:
  return [
    (seen[f'{_SEEN}/{path}/lhs'], seen[f'{_SEEN}/{path}/rhs']) for path in paths
  ]


def load_teacher(experiment: Experiment) -> Teacher:
  """Returns the teacher that `train.teacher` names, placed as the student is.

  An address on the hub is pinned to its commit in the config.

  Raises:
    ConfigError: It does not go with the student or with a loss.
    CheckpointError: There is no checkpoint, or it is damaged.
    WeightsError: The weights do not fit, or bring no head for these classes.
  """
  path = experiment.config.train.teacher
  try:
    if runs.kind_of(path) == 'run':
      own, variables, digest, notes = _of_run(experiment, path)
    else:
      own, variables, digest, notes = _of_weights(experiment, path)
  except (ConfigError, CheckpointError, WeightsError) as error:
    text = str(error).removeprefix('train.teacher: ')
    raise type(error)(f'train.teacher={path!r}: {text}') from error
  teacher = Teacher(experiment, own, variables, origin=notes[0], digest=digest)
  rules = models.tensor_rules(own.config)
  least = own.config.mesh.fsdp_min_mib
  _, whole = sharding.infer(own.model.shapes, own.mesh, rules, least)
  teacher.lines += [*notes[1:], *whole]
  return teacher


def _own_experiment(student: Experiment, fields: dict[str, Any]) -> Experiment:
  """Returns an experiment with some fields of its own, on the same data."""
  known = config_lib.flatten(student.config)
  own = {n: _as_tuple(value) for n, value in fields.items() if n in known}
  # A teacher is a whole model, of which nothing is kept for a backward pass.
  own |= {'lora.rank': 0, 'lora.targets': (), 'model.remat': False}
  config = config_lib.with_fields(student.config, own)
  return Experiment(config, training=False, data=student.data)


def _as_tuple(value: Any) -> Any:
  """Returns a value from JSON as configs hold it."""
  if isinstance(value, list):
    return tuple(_as_tuple(x) for x in value)
  return value


def _of_run(student: Experiment, path: str):
  """Returns (experiment, variables, digest, lines) of a run of ours."""
  if student.config.train.teacher_size:
    raise ConfigError(
      f'train.teacher_size={student.config.train.teacher_size!r} would have no '
      'effect: this is a run of ours, which knows its size; leave it out'
    )
  run = runs.open_run(path, field='train.teacher')
  there = config_lib.flatten(run.config)
  fields = {
    name: value
    for name, value in there.items()
    if name.split('.')[0] in ('model', 'quant')
  }
  model = student.config.model
  for name, what in (('num_classes', 'classes'), ('image_size', 'px')):
    if there[f'model.{name}'] != model[name]:
      raise ConfigError(
        f'it has {there[f"model.{name}"]} {what}, the student '
        f'{model[name]}; give a teacher with the same model.{name}'
      )
  own = _own_experiment(student, fields)
  variables = sources.trained(own, run)
  evaluated = [run.facts['arrays'].get(x) for x in ('variables', 'ema')]
  text = json.dumps(evaluated, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  notes = [
    f'note: it saw images with data.{name}={there[f"data.{name}"]}, here they '
    f'have {list(student.config.data[name])}'
    for name in ('mean', 'std')
    if there[f'data.{name}'] != list(student.config.data[name])
  ]
  notes += _compare_classes(run.class_names, student.data.class_names)
  return own, variables, digest, [f'{run.origin}, digests verified', *notes]


def _compare_classes(there: Sequence[str], here: Sequence[str]) -> list[str]:
  """Returns a note where a teacher's classes have other names.

  Raises:
    ConfigError: They are the student's in another order.
  """
  there, here = (
    [weights.one_form(name) for name in names] for names in (there, here)
  )
  if there == here:
    return []
  if weights.is_reordered(there, here):
    raise ConfigError(
      'it knows the same classes in another order, so its outputs would '
      'teach the wrong ones; give a teacher trained on this data set'
    )
  return ['note: its classes have other names than those here']


def _of_weights(student: Experiment, path: str):
  """Returns (experiment, variables, digest, lines) of weights of others."""
  local, pinned = weights.resolve(path)
  student.pin({'train.teacher': pinned})
  config = student.config
  fields = {'quant.recipe': 'none'}
  if config.train.teacher_size:
    fields['model.size'] = config.train.teacher_size
  own = _own_experiment(student, fields)
  taken, report = weights.read_weights(local, own.model.shapes)
  report.notes += checks.compare_facts(report, own.config)
  foreign.put_classes_in_order(
    taken, report, config, student.data.class_names,
    must_agree=config.train.distill != 'none',
  )  # fmt: skip
  if report.reinitialised:
    raise WeightsError(
      f'it brings no {", ".join(report.reinitialised)} for '
      f'{config.model.num_classes} classes: '
      f'{next(iter(report.reinitialised.values()))}; give a teacher with the '
      "student's classes"
    )
  imported = {weights.full_path(name): x for name, x in taken.items()}
  variables = own.fresh_variables(jax.random.key(config.seed), imported)
  return own, variables, calibration.digest(taken), report.lines()
