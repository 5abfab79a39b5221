"""Builds everything that one config describes; the only assembler."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qvit_jax import models, tree
from qvit_jax.config import resolve as config_lib
from qvit_jax.data import Data, find_data, open_data, preprocess
from qvit_jax.errors import ConfigError, DataError
from qvit_jax.evaluation import evaluate as evaluate_lib
from qvit_jax.evaluation import fixed
from qvit_jax.evaluation.metrics import EvalSums
from qvit_jax.evaluation.timing import compile_timed
from qvit_jax.experiment import norms
from qvit_jax.experiment.model import Model
from qvit_jax.models import batch_norm
from qvit_jax.quantization.methods import oscillation
from qvit_jax.quantization.packed import Packed
from qvit_jax.store import digest
from qvit_jax.training import optimizer, sharding
from qvit_jax.training import stages as stages_lib
from qvit_jax.training.state import TrainState, make_state, split_collections
from qvit_jax.training.step import TICK, learned_paths, make_train_step

# Images that learned steps are fitted to before the first update.
_FITTED = 32


def _length(config: Any, size: int) -> tuple[int, int, int]:
  """Returns (updates, updates an epoch, updates of warm-up) of a training."""
  train, batch = config.train, config.train.batch_size
  epoch = max(1, size // batch)
  total = train.steps or -(-round(train.epochs * size) // batch)
  return total, epoch, optimizer.warmup_steps(config, total, epoch)


def schedule_line(config: Any, size: int) -> str:
  """Returns one line: how long a training is, with which learning rate.

  Args:
    config: Of the training.
    size: Images of the training split.
  """
  optim, batch = config.optim, config.train.batch_size
  total, _, warmup = _length(config, size)
  return (
    f'{total} steps of {batch} images ({total * batch / size:.2f} epochs), '
    f'{optim.name}, lr {optim.lr:g} {optim.schedule} after {warmup} warm-up '
    'steps'
  )


class Experiment:
  """A model on its mesh with its data, optimizer and compiled functions."""

  def __init__(
    self,
    config,
    *,
    training: bool,
    calibrating: bool = False,
    data: Data | None = None,
    packed: Packed | None = None,
  ):
    """Builds everything up to, but without, the first array.

    Args:
      config: A validated config.
      training: False builds only what evaluation needs.
      calibrating: Whether training images are looked at without training.
      data: An opened data set to share; by default it is opened here.
      packed: The model of an artifact; see `Model`.

    Raises:
      QvitError: Some part of the config cannot be.
    """
    self.teacher: Any = None  # set by whoever loads one: a `teacher.Teacher`
    # Set by whoever computes them: `features.Features`, which the train step
    # then takes in place of images.
    self.features: Any = None
    # Of the parameters that adapters leave as they are, once they are there.
    self.base_digest = ''
    if data is None:
      find_data(config)
    self.model = Model(config, packed)
    # With what 'auto' stands for; a frozen config, as the one it is made of.
    self.config = config = self.model.config
    self.mesh = sharding.make_mesh(config, training=training)
    self.data = data or open_data(config, training=training or calibrating)
    # Else they would count other steps and wait for each other for ever.
    if not sharding.is_same_everywhere(self.data.digest):
      raise DataError(
        f'the processes of this run find other files in data.dir='
        f'{config.data.dir!r}; give all of them the same folder'
      )
    if training:
      self._plan_training()

  def pin(self, fields: Mapping[str, Any]) -> None:
    """Replaces the config by one that says where arrays came from.

    Args:
      fields: {'section.field': value}, such as an address with its commit.
    """
    self.config = self.model.config = config_lib.with_fields(
      self.config, fields
    )

  def _plan_training(self) -> None:
    config, train = self.config, self.config.train
    self.total_steps, self.steps_per_epoch, self.warmup = _length(
      config, self.data.train.size
    )
    self.schedule = optimizer.make_schedule(
      config, self.total_steps, self.warmup
    )
    norms.check(config, self.mesh, self.model.changing, self.model.held)
    self._trained, _ = split_collections(self.model.shapes, train.trainable)
    self.tx = optimizer.make_optimizer(config, self.schedule, self._trained)
    self._make_state = functools.partial(
      make_state,
      tx=self.tx,
      trainable=train.trainable,
      ema=train.ema_decay > 0,
      changing=self.model.changing,
    )
    self.state_shapes: TrainState = jax.eval_shape(
      self._make_state, self.model.shapes
    )
    self.state_shardings, self.whole = self._shardings(self.state_shapes)

  def _shardings(self, shapes: Any) -> tuple[Any, list[str]]:
    rules = models.tensor_rules(self.config)
    least = self.config.mesh.fsdp_min_mib
    return sharding.infer(shapes, self.mesh, rules, least)

  @property
  def batch_sharding(self) -> NamedSharding:
    """Where the images of a batch lie."""
    return NamedSharding(self.mesh, sharding.BATCH)

  @property
  def whole_sharding(self) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(self.mesh, jax.sharding.PartitionSpec())

  @functools.cached_property
  def stages(self) -> tuple[stages_lib.Stage, ...]:
    """The stages of the training; a bad list raises ConfigError."""
    stages = stages_lib.resolve(self.config.train.stages, self.total_steps)
    changing = self.model.changing
    stages_lib.check(stages, self._trained, self.model.plan.specs, changing)
    freezes = [s for s in stages if stages_lib.KINDS[s.name].freezes]
    if freezes and not self.model.method.freezes:
      raise ConfigError(
        f"train.stages[{freezes[0].place[0] - 1}]='freeze' holds kernels of "
        f'recipe statsq, but quant.recipe is {self.config.quant.recipe!r}; set '
        '--config.quant.recipe=statsq or leave the stage out'
      )
    return stages

  def precision_lines(self) -> list[str]:
    """One line about loss scaling where it is on."""
    optim = self.config.optim
    if self.config.model.dtype != 'float16':
      return []
    return [
      f'float16 with loss scale {optim.loss_scale:g}, halved at an overflow, '
      f'doubled after {optim.loss_scale_growth} finite updates'
    ]

  # Arrays and their places.

  def abstract_variables(self) -> dict[str, Any]:
    """Returns shapes and places of the model's collections."""
    shardings, _ = self._shardings(self.model.shapes)
    return sharding.abstract(self.model.shapes, shardings)

  def abstract_state(self) -> TrainState:
    """Returns shapes and places of the training state."""
    return sharding.abstract(self.state_shapes, self.state_shardings)

  def state_of(self, variables: dict[str, Any]) -> TrainState:
    """Returns the state before the first update of given variables."""
    make = jax.jit(self._make_state, out_shardings=self.state_shardings)
    return make(variables)

  def _init(
    self, key: jax.Array, imported: dict[str, Any], images: jax.Array
  ) -> dict[str, Any]:
    variables = self.model.init(key, images[:1])
    return tree.unflatten({**tree.flatten(variables), **imported}, variables)

  def _fit(
    self, variables: dict[str, Any], images: jax.Array, *, known: bool = True
  ) -> dict[str, Any]:
    """Returns variables with learned steps that go with the images.

    Args:
      variables: Of the model.
      images: As evaluation sees them.
      known: Whether statistics of norms are known, so that they can be used.
    """
    learned, changing = self.model.fitted, self.model.changing
    if not learned:
      return variables
    # Steps follow from what the layers see with the weights that count; where
    # nothing was trained yet, norms go by these images, as in the first update.
    batch = {} if known or not changing else {
      'train': True, 'rngs': {'dropout': jax.random.key(0)}
    }  # fmt: skip
    _, fitted = self.model.module.apply(
      variables, images, mutable=(*learned, *changing), **batch
    )
    return {**variables, **{name: fitted[name] for name in learned}}

  def _fresh(
    self, key: jax.Array, imported: dict[str, Any], images: jax.Array
  ) -> dict[str, Any]:
    variables = self._init(key, imported, images)
    return self._fit(
      variables, images, known=bool(batch_norm.norms(imported))
    )

  def _first_images(self) -> jax.Array:
    """Returns what learned steps are fitted to, as evaluation sees it.

    The first images of the seeded training order; zeros where nothing is
    learned of them.

    Raises:
      ConfigError: There is no training split.
    """
    size, data = self.config.model.image_size, self.config.data
    if not self.model.fitted:
      return jnp.zeros((1, size, size, 3), jnp.float32)
    split = self.data.train
    if split is None:
      recipe = self.config.quant.recipe
      raise ConfigError(
        f'quant.recipe={recipe!r} fits its steps to training images, which '
        'this mode does not read; train first (--mode=train) and give the run '
        'by --config.checkpoint.path=, or set --config.quant.recipe=none'
      )
    batch = min(_FITTED, split.size)
    host = next(
      split.train_batches(
        seed=self.config.seed, batch=batch, rows=slice(0, batch),
        first=1, last=1,
      )
    )  # fmt: skip
    images, _ = preprocess.gather(split.source, host)
    return preprocess.prepare_eval(images, data=data, size=size)

  def fresh_variables(
    self, key: jax.Array, imported: dict[str, Any], *, fitted: bool = True
  ) -> dict[str, Any]:
    """Returns random variables, some replaced by path.

    Where adapters are trained, the parameters that they leave alone are then
    packed, or lose what the adapters start with.

    Args:
      key: Of what is random.
      imported: {path: parameter}.
      fitted: False leaves learned steps at values that mean nothing, for
        callers that have others.
    """
    size = self.config.model.image_size
    frozen, images = self.model.frozen, jnp.zeros((1, size, size, 3))
    if fitted:
      images = self._first_images()
    shardings, _ = self._shardings(self.model.shapes)
    if not frozen:
      make = jax.jit(self._fresh, out_shardings=shardings)
      return make(key, imported, images)
    before, _ = self._shardings(self.model.float_shapes)
    make = jax.jit(self._init, out_shardings=before)
    variables = make(key, imported, images)
    _, base = split_collections(variables, self.config.train.trainable)
    held = {n: x for n, x in base.items() if n == batch_norm.COLLECTION}
    if self.model.changing:
      held = {}
    self.base_digest = digest.combined(base['params'] | held)
    fit = jax.jit(self._fit, out_shardings=shardings)
    return fit(frozen.settle(variables), images)

  def fresh_state(
    self, key: jax.Array, imported: dict[str, Any] | None = None
  ) -> TrainState:
    """Returns a state with random weights, some replaced by path."""
    if self.model.frozen:
      return self.state_of(self.fresh_variables(key, imported or {}))
    make = lambda *given: self._make_state(self._fresh(*given))
    return jax.jit(make, out_shardings=self.state_shardings)(
      key, imported or {}, self._first_images()
    )

  def open_training_split(self) -> str:
    """Opens the training split where only the other is; returns a line."""
    if self.data.train is None:
      train = open_data(self.config, training=True).train
      self.data = dataclasses.replace(self.data, train=train)
    count = min(_FITTED, self.data.train.size)
    return (
      f'learned steps are fitted to the first {count} images of '
      f'{self.config.data.train_split}'
    )

  def missing_parameters(self, imported: dict[str, Any]) -> set[str]:
    """Returns the paths of parameters that `imported` does not hold.

    And of statistics of norms, without which nothing can be evaluated.
    """
    names = ('params', batch_norm.COLLECTION)
    shapes = self.model.float_shapes
    wanted = {name: shapes[name] for name in names if name in shapes}
    return set(tree.flatten(wanted)) - set(imported)

  def metadata(self) -> dict[str, Any]:
    """Returns what every checkpoint of this experiment says of itself."""
    facts = {
      'config': config_lib.to_json(self.config),
      'architecture': models.architecture(self.config),
      'plan': self.model.plan.digest_lines(),
      'class_names': list(self.data.class_names),
      'data_digest': self.data.digest,
    }
    return facts | ({'base': self.base_digest} if self.model.frozen else {})

  # Compiled functions.

  def train_step_function(self, stage: str = 'all') -> Callable:
    """Returns step(state, source, batch, given) of a stage, not yet jitted."""
    data, model, teacher = self.config.data, self.config.model, self.teacher
    kind, changing = stages_lib.KINDS[stage], self.model.changing
    module = self.model.rounding(kind.operand, holds=kind.holds)
    apply = module.apply
    prepare = functools.partial(
      preprocess.prepare_train,
      data=preprocess.for_step(data, is_resident=bool(self.data.train.source)),
      size=model.image_size,
      num_classes=model.num_classes,
    )
    if teacher:
      apply = teacher.tapped(self.config, module.ops)
    if self.features:
      apply = self.features.behind(self.config, module.ops)
      prepare = functools.partial(
        self.features.prepare, classes=model.num_classes
      )
    frozen = stages_lib.frozen(stage, self._trained)
    apply = stages_lib.stop_gradients(apply, frozen)
    tx, penalty = stages_lib.hold(self.tx, frozen), None
    if kind.freezes:
      movable = functools.partial(
        oscillation.movable_weights, module.ops.core.plan,
        reach=self.config.quant.freeze,
      )  # fmt: skip
      apply = stages_lib.stop_elements(apply, movable)
      tx = stages_lib.hold_elements(tx, movable)
    if self._dampens:
      damped = functools.partial(
        oscillation.total_dampening, module.ops.core.plan
      )
      damped = stages_lib.stop_gradients(damped, frozen)
      penalty = self.config.quant.dampen, damped
    return make_train_step(
      apply=apply,
      tx=tx,
      gather=preprocess.gather,
      prepare=prepare,
      batch_sharding=self.batch_sharding,
      train=self.config.train,
      seed=self.config.seed,
      teacher=teacher,
      penalty=penalty,
      changing=() if kind.holds else changing,
    )

  @property
  def _dampens(self) -> bool:
    """Whether kernels with learned steps are drawn to their levels."""
    return self.config.quant.dampen > 0 and self.model.method.dampens

  @property
  def tick(self) -> tuple[str, ...]:
    """Names of the numbers that a step reports."""
    names = TICK + (self.teacher.names if self.teacher else ())
    return names + (('dampen_loss',) if self._dampens else ())

  @property
  def learned(self) -> tuple[str, ...]:
    """Paths of what is trained beside parameters."""
    return learned_paths(self._trained)

  @property
  def given(self) -> Any:
    """The arrays of the teacher, the step's last argument."""
    return self.teacher.given if self.teacher else None

  def compile_train_step(
    self, state, source, batch, *, stage: str = 'all'
  ) -> tuple[Callable, float]:
    """Returns the compiled step and the seconds that took.

    It is called with (state, source, batch, self.given).
    """
    step = jax.jit(
      self.train_step_function(stage),
      donate_argnums=0,
      out_shardings=(self.state_shardings, self.whole_sharding),
    )
    return compile_timed(step, state, source, batch, self.given)

  def train_batches(
    self, first: int, last: int, *, augmented: bool = True
  ) -> Generator[Any, None, None]:
    """Yields the placed batches of updates `first` .. `last`.

    Args:
      first: Update, counted from 1.
      last: Update.
      augmented: False leaves streamed images as evaluation sees them.
    """
    batch = self.config.train.batch_size
    rows = sharding.local_rows(self.mesh, batch)
    hosts = self.data.train.train_batches(
      seed=self.config.seed, batch=batch, rows=rows, first=first, last=last,
      augmented=augmented,
    )  # fmt: skip
    for host in hosts:
      yield sharding.place_batch(host, self.mesh, batch, rows)

  def make_evaluator(self) -> Callable[..., dict[str, Any]]:
    """Returns evaluate(variables, poll) -> metrics over the whole split.

    They name what they are of: `split` and `data`.
    """
    data, size = self.config.data, self.config.model.image_size

    def make(whole):
      return jax.jit(
        evaluate_lib.make_eval_step(
          apply=lambda given, x: self.model.module.apply(whole(given), x),
          gather=preprocess.gather,
          prepare=functools.partial(
            preprocess.prepare_eval, data=data, size=size
          ),
          batch_sharding=self.batch_sharding,
        ),
        out_shardings=self.whole_sharding,
      )

    step = make(lambda variables: variables)
    source = self.replicate(self.data.eval.source)

    def evaluate(variables, poll=lambda: None):
      nonlocal step
      if self.model.packed:  # nothing changes them between evaluations
        whole, variables = fixed.split(variables)
        step = make(whole)
      sums = EvalSums.zeros(self.config.model.num_classes)
      metrics = evaluate_lib.evaluate(
          step, variables, source, self.eval_batches(), self.replicate(sums),
          poll=poll,
      )  # fmt: skip
      return self.data.evaluated | metrics

    return evaluate

  def eval_batches(self, split: Any = None) -> Iterator[Any]:
    """Yields the placed batches of a split, in its order.

    Args:
      split: By default that of the evaluation.
    """
    split = split or self.data.eval
    # A split smaller than a batch is not padded to a whole one.
    parts = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    most = -(-split.size // parts) * parts
    batch = min(self.config.eval.batch_size, most)
    rows = sharding.local_rows(self.mesh, batch)
    for host in split.eval_batches(batch=batch, rows=rows):
      yield sharding.place_batch(host, self.mesh, batch, rows)

  def replicate(self, host: Any) -> Any:
    """Returns host arrays as one copy on every device."""
    return sharding.replicate(jax.device_get(host), self.mesh)
