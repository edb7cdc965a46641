"""All settings, typed, each with its default, range and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from ml2o_dist.plugins import find_loaded, loaded
from ml2o_dist.problems import FamilyMember, ProblemFamily, ProblemSpec
from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.names import ExperimentName, ModelName
from ml2o_dist.runtime.registry import Registry, modules_of

Scalar = bool | int | float | str


LONGEST_TEXT = 4096
"""Most characters of a text: those of the longest path that Linux accepts."""
LARGEST_SEED = 2**63 - 1
MOST_STEPS = 10_000_000
"""Most inner steps of a run or an episode: the losses of each stay in memory."""
MOST_META_STEPS = 10**9
MOST_SEEDS = 10_000
MOST_NAMES = 10_000
"""Most entries of a list of problems, optimizers or values."""
MOST_CELLS = 1_000_000
"""Most cells of an evaluation (optimizers times problems times seeds); each is a Ray task."""
LONGEST_WAIT_S = 1e7
"""Longest time in seconds, some four months; clocks may not accept much more."""

MOST_WORKERS, MOST_SLOTS = 100_000, 100_000

_Name = Annotated[str, Field(max_length=250, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""The name of a run, an experiment or a file: one line, as long as a file's name may be."""


RENAMED = {"slots": "meta_batch_size", "begin": "init_from", "count": "num_objectives"}
"""Keys of older versions, and their present names."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=LONGEST_TEXT)

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, given: Any) -> Any:
        """Accept the keys of older versions, which stored settings and cards still have."""
        if not isinstance(given, Mapping):
            return given
        known = {old: new for old, new in RENAMED.items() if new in cls.model_fields and old not in cls.model_fields}
        return {known.get(key, key): value for key, value in given.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        """Refuse texts that cannot name a file, run or server."""
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and "\0" in each:
                raise ValueError(f"a text cannot have a NUL character, as {each!r}")
        return value


class PluginSettings(_Settings):
    """A plug-in that a run used, identified by its name and content."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def _loaded_plugins() -> tuple[PluginSettings, ...]:
    return tuple(PluginSettings(name=each.name, sha256=each.sha256) for each in loaded())


def _found_plugins(given: Any) -> Any:
    """Return the plug-ins that settings name; raises UserError where one is not loaded.

    A plug-in that is given by name only is loaded by the code that reads the user's configuration.
    """
    if isinstance(given, list | tuple):
        for each in given:
            if isinstance(each, str):
                raise UserError(f"{each!r} is not loaded here: give it by --plugin {each}")
            if isinstance(each, Mapping) and isinstance(each.get("name"), str):
                find_loaded(each["name"], str(each.get("sha256")))
    return given


Plugins = Annotated[tuple[PluginSettings, ...], BeforeValidator(_found_plugins), Field(max_length=1000)]


def plugins_field() -> Any:
    """Return the field `plugins`, which is first in all settings: later fields may name what plug-ins register."""
    return Field(
        default_factory=_loaded_plugins,
        description="files NAME.py (beside this one) or installed modules that bring problems, rules, optimizers ...",
    )


class GuardSettings(_Settings):
    """How GML2O decides between the learned and the fallback's candidate (rules/guarded.py has the theorem)."""

    fallback: str = Field("dssmg", description="dssmg, smg, or without a theorem AGGREGATOR[+OPTIMIZER]@LR")
    eps: float = Field(
        0.0, ge=0, description="eps_0: how much worse than the fallback the first step may be; decays as (t + 1)^(-2p)"
    )
    p: float = Field(0.55, gt=0.5, le=1, description="decay of the fallback's steps, alpha_t = alpha_0 / (t + 1)^p")
    budget: float = Field(
        5.0,
        ge=0,
        description="how much worse accepted steps may be in total, in units of the decrease of the objectives so far; "
        "0: each step must pass by itself",
    )
    margin: float = Field(3.0, ge=0, description="standard errors of the paired differences to spare")
    batches: int = Field(1, ge=1, le=10_000, description="guard batches a step, each of the problem's batch size")
    growth: float = Field(0.0, ge=0, le=2, description="guard batches grow as (t + 1)^growth")
    every: int = Field(1, ge=1, le=MOST_META_STEPS, description="check every so many steps; above 1 without a theorem")
    criterion: Literal["each", "sum"] = Field(
        "each", description="every objective must pass, or (without a theorem) their sum"
    )

    @property
    def fewest_samples(self) -> int:
        """How many samples are needed to estimate an error; a budget needs them twice, as it halves the samples."""
        return 4 if self.budget else 2


class LearnedRuleSettings(_Settings):
    """The settings that all learned rules have; each kind adds its own.

    A user's own kind declares `kind: Literal["NAME"] = "NAME"` (see rules/learned.py).
    """

    kind: str
    guard: GuardSettings | None = Field(None, description="GML2O: every step is checked against a fallback's")

    @classmethod
    def own_kind(cls) -> str:
        """Return the kind of these settings; raises UserError where they name none."""
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise UserError(f'{cls.__name__} needs a line `kind: Literal["NAME"] = "NAME"`')
        return kind


class RuleSettings(LearnedRuleSettings):
    """The coordinatewise network, and how its output becomes a step (formulas: rules/coordinatewise/rule.py)."""

    kind: Literal["coordinatewise"] = Field(
        "coordinatewise", description="the learned rule: this one, or one that a plug-in registers"
    )
    features: Literal["adam", "alignment", "log_sign"] = Field(
        "adam",
        description="what the network sees: Adam's averages, also the alignment, or log and sign",
    )
    output: Literal["residual", "controlled", "scaled"] = Field(
        "residual", description="residual and controlled start as Adam on the sum; controlled adapts the step size"
    )
    objectives: Literal["tied", "per_objective"] = Field(
        "tied", description="one module for every objective, or one each as the paper has it"
    )
    num_objectives: int = Field(
        2, ge=1, le=1000, description="m of a per_objective network; a tied network takes any m"
    )
    hidden: int = Field(16, ge=1, le=1024, description="H, width of every LSTM")
    lr: float = Field(0.01, gt=0, description="scale of a residual or controlled step: Adam's learning rate")
    scale: float = Field(0.01, gt=0, description="scale of a `scaled` step, u = scale * out")
    warmup: float = Field(
        0.0, ge=0, description="output=controlled: the log step size starts at -warmup and recovers as 0.9^t"
    )

    @model_validator(mode="after")
    def _warmup_needs_a_controller(self) -> RuleSettings:
        if self.warmup and self.output != "controlled":
            raise ValueError(f"warmup={self.warmup} needs output=controlled, not {self.output}")
        if self.objectives == "per_objective" and self.num_objectives * self.hidden**2 > 2**24:
            raise ValueError(
                f"num_objectives={self.num_objectives}, hidden={self.hidden}: num_objectives * hidden^2 is above 2^24"
            )
        return self

    @field_validator("features", mode="before")
    @classmethod
    def _current_feature(cls, given: Any) -> Any:
        """Accept the name of an older version, which stored settings and cards still have."""
        return "alignment" if given == "agreement" else given


RULES: Registry[Any] = Registry("rule.kind", lambda: modules_of("ml2o_dist.rules", packages=True))
"""Learned rules by kind (`rules/learned.py`)."""

ESTIMATORS: Registry[Any] = Registry("estimator.kind", lambda: modules_of("ml2o_dist.metatrain.estimators"))
"""Estimators of the meta-gradient (`metatrain/estimators/base.py`)."""

RULE_SETTINGS: dict[str, type[LearnedRuleSettings]] = {"coordinatewise": RuleSettings}
"""The settings of each `rule.kind`; `register_rule` adds to it."""


def rule_settings(given: Any) -> Any:
    """Return the settings of a learned rule from a mapping, by its `kind`; return other values unchanged.

    Raises:
        UserError: an unknown kind.
    """
    if not isinstance(given, Mapping):
        return given
    kind = given.get("kind", "coordinatewise")
    if kind not in RULE_SETTINGS and kind not in RULES:
        raise unknown("setting rule.kind", str(kind), RULES, extensible=True)
    return RULE_SETTINGS[kind].model_validate(given)


AnyRule = Annotated[SerializeAsAny[LearnedRuleSettings], BeforeValidator(rule_settings)]
"""A learned rule of any kind."""


_ESTIMATORS = ("replay", "exact", "es")


class EstimatorSettings(_Settings):
    """How an episode becomes a meta-gradient."""

    kind: str = Field("replay", description="replay, exact, es, or what a plug-in registers")
    gamma: float = Field(0.95, ge=0, le=1, description="discount of later losses, a window of 1 / (1 - gamma) steps")
    step_weights: Literal["linear", "uniform", "quadratic"] = Field(
        "linear", description="how the weight of a step's loss grows with the step"
    )
    coordinates: float = Field(1.0, gt=0, le=1, description="share of the parameters that is replayed")
    truncated: bool = Field(False, description="a step answers only for the losses of its own chunk of `unroll` steps")
    meta_loss: Literal["auto", "log_sum", "normalised", "log_gap"] = Field(
        "auto", description="auto: log_sum where losses are positive by construction, else normalised"
    )
    sigma: float = Field(0.01, gt=0, description="es: standard deviation of the weights' perturbation")
    pairs: int = Field(1, ge=1, le=10_000, description="es: antithetic pairs of episodes")
    clip: float = Field(1.0, gt=0, description="largest norm of one slot's meta-gradient")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in _ESTIMATORS and kind not in ESTIMATORS:
            raise unknown("estimator.kind", kind, ESTIMATORS, extensible=True)
        return kind


class ShareSettings(_Settings):
    """The resources that one process requests from Ray."""

    num_cpus: float = Field(1.0, gt=0, le=1e6, description="CPUs of one process")
    num_gpus: float = Field(0.0, ge=0, le=1e6, description="GPUs of one process; a fraction shares a GPU")


class PlacementSettings(ShareSettings):
    """The resources that one process requests from Ray, and from its node."""

    custom: dict[str, Annotated[float, Field(gt=0, le=1e12)]] = Field(
        default_factory=dict, description="custom Ray resources of one process, as {big_memory: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="labels that the node must have, by Ray's selectors: {market-type: '!spot'}"
    )


class LearnerSettings(_Settings):
    """The meta-optimizer: Adam with a cosine schedule, and an exponential moving average of its weights."""

    lr: float = Field(3e-3, gt=0, description="learning rate at the first meta-step")
    final_lr: float = Field(3e-4, ge=0, description="learning rate at the last meta-step")
    clip: float = Field(1.0, gt=0, description="largest norm of the reduced meta-gradient")
    ema: float = Field(0.9, ge=0, lt=1, description="decay of the average that is validated and shipped; 0: none")
    rollouts: int = Field(
        16,
        ge=1,
        le=100_000,
        description="backward=learner: how many rollouts may wait for their replay before workers pause",
    )
    resources: PlacementSettings = Field(
        PlacementSettings(), description="backward=learner: resources of the process that replays"
    )


class MemberSettings(_Settings):
    """One member of a training family: a problem and the values its settings are drawn from."""

    problem: str
    weight: float = Field(1.0, gt=0, description="how often this member is drawn, relative to the others")
    choices: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)

    def member(self) -> FamilyMember:
        """Return the checked member; raises UserError for an unknown problem or setting."""
        base = ProblemSpec.parse(self.problem)
        choices: dict[str, tuple[Scalar, ...]] = {key: (value,) for key, value in base.settings}
        choices.update(self.choices)
        for key, values in choices.items():
            if not 0 < len(values) <= MOST_NAMES:
                raise UserError(
                    f"family.train: {self.problem}: choices.{key} has {len(values)} values; give 1 to {MOST_NAMES}"
                    if values
                    else f"family.train: {self.problem}: choices.{key} is empty; give at least one value"
                )
        ProblemSpec.of(base.name, {key: values[0] for key, values in choices.items()})
        return FamilyMember(base.name, self.weight, tuple(sorted(choices.items())))


class FamilySettings(_Settings):
    """Which problems serve training, validation (to choose the weights) and comparison (used by neither)."""

    train: tuple[MemberSettings, ...] = Field(
        min_length=1, max_length=MOST_NAMES, description="problems to train on: {problem, weight, choices} each"
    )
    validation: tuple[str, ...] = Field(
        min_length=1, max_length=MOST_NAMES, description="problems that choose the best weights"
    )
    test: tuple[str, ...] = Field(
        min_length=1, max_length=MOST_NAMES, description="problems of the comparison at the end"
    )
    rescale: float = Field(
        1.0,
        ge=1,
        description="training problems get their parameters scaled by up to this, or 1 / this",
    )
    objective_rescale: float = Field(
        1.0,
        ge=1,
        description="each objective gets scaled by up to this, or 1 / this",
    )

    def training(self) -> ProblemFamily:
        """Return the training distribution; raises UserError for an unknown problem or setting."""
        return ProblemFamily(tuple(member.member() for member in self.train))

    @field_validator("validation", "test")
    @classmethod
    def _known(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            ProblemSpec.parse(text)
        return texts

    @field_validator("train")
    @classmethod
    def _members(cls, members: tuple[MemberSettings, ...]) -> tuple[MemberSettings, ...]:
        for member in members:
            member.member()
        return members


class ValidationSettings(_Settings):
    """When and how candidates are scored on `family.validation`."""

    every: int = Field(10, ge=1, le=MOST_META_STEPS, description="meta-steps between two validations")
    horizon: int = Field(200, ge=1, le=MOST_STEPS, description="inner steps of a validation episode")
    instances: int = Field(2, ge=1, le=100_000, description="paired instances of each validation problem")


Grid = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=1000)]
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
"""The learning rates that a hand-designed method is tuned over."""


class ComparisonSettings(_Settings):
    """The comparison at the end of a run: a suite's baselines, seeds and budget on the problems of `family.test`."""

    suite: str = Field("quick", description="name of a suite, or a YAML file")
    steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="inner steps; null, here and below: as in the suite"
    )
    seeds: int | None = Field(None, ge=1, le=MOST_SEEDS, description="paired seeds of each cell")
    tuning_seeds: int | None = Field(None, ge=1, le=MOST_SEEDS, description="seeds that choose learning rates")
    learning_rates: Grid | None = Field(None, description="grid that baselines are tuned over")
    baselines: tuple[str, ...] | None = Field(
        None, description="AGGREGATOR[+sgd|+momentum|+adam][@LR], tuned without @LR, and all that `ml2o evaluate` takes"
    )


class ResourceSettings(PlacementSettings):
    """The resources of each rollout worker, and what happens while Ray cannot provide them."""

    start_timeout_s: float = Field(
        60.0, gt=0, le=LONGEST_WAIT_S, description="how long to wait for the workers to be placed"
    )
    max_restarts: int = Field(20, ge=0, le=10**9, description="how many workers may be replaced within an hour")
    min_workers: int = Field(
        1,
        ge=1,
        le=MOST_WORKERS,
        description="with fewer workers the run waits start_timeout_s, then aborts",
    )
    start_workers: int | None = Field(
        None,
        ge=1,
        le=MOST_WORKERS,
        description="with so many workers up the run starts, the others join when there is room; null: all",
    )

    def at_start(self, workers: int) -> int:
        """Return how many of the `workers` must be up before a run begins."""
        return workers if self.start_workers is None else min(self.start_workers, workers)


class FaultSettings(_Settings):
    """How an episode that does not end or that raises is handled."""

    deadline_factor: float = Field(
        20.0,
        ge=2,
        le=1e6,
        description="deadline of an episode, as a multiple of what such episodes took; doubled after each miss",
    )
    shortest_deadline_s: float = Field(30.0, gt=0, le=LONGEST_WAIT_S, description="shortest deadline of an episode")
    first_deadline_s: float = Field(
        600.0, gt=0, le=LONGEST_WAIT_S, description="deadline of an episode of a kind that was not measured yet"
    )
    on_error: Literal["abort", "skip"] = Field(
        "abort", description="after an episode raised twice: abort with a checkpoint, or skip the episode"
    )


class TrajectorySettings(_Settings):
    """Which training episodes are saved step by step, in `trajectories/`.

    There are at most min(meta_steps, the run's) * min(slots, the run's) * instances * max(horizon) rows.
    """

    meta_steps: int = Field(
        20,
        ge=0,
        le=100_000,
        description="how many meta-steps are recorded, evenly spaced; 0: none",
    )
    slots: int = Field(8, ge=1, le=MOST_SLOTS, description="how many episodes of each recorded meta-step")


class DataSettings(_Settings):
    """Where the image data is."""

    root: str = Field("", description='folder laid out as torchvision lays it out; "": ML2O_DATA')


class ExperimentSettings(_Settings):
    """Where MLflow keeps runs."""

    uri: str = Field("", description='MLflow tracking URI; "": MLFLOW_TRACKING_URI, else sqlite in ML2O_HOME')
    experiment: ExperimentName = Field("ml2o/evaluate", description="name of the experiment")


class TrackingSettings(ExperimentSettings):
    """Where MLflow keeps runs and versions."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, str_max_length=LONGEST_TEXT)

    experiment: ExperimentName = Field("ml2o/meta-train", description="name of the experiment")
    model: ModelName = Field("ml2o", description="name of the registered model")
    register_version: bool = Field(True, alias="register", description="register the result as a version")


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
"""auto, cpu, cuda or cuda:N; auto means cuda if a share of a GPU is requested."""


class MetaTrainSettings(_Settings):
    """All settings of one meta-training run."""

    plugins: Plugins = plugins_field()
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="names all randomness of the run")
    meta_steps: int = Field(100, ge=1, le=MOST_META_STEPS, description="updates of the meta-parameters")
    workers: int = Field(2, ge=1, le=MOST_WORKERS, description="Ray actors that run episodes")
    meta_batch_size: int = Field(8, ge=1, le=MOST_SLOTS, description="episodes per meta-step")
    instances: int = Field(1, ge=1, le=100_000, description="P, problem instances that one episode advances together")
    horizon: tuple[int, ...] = Field(
        (50, 100, 200),
        min_length=1,
        max_length=MOST_NAMES,
        description="K, inner steps; of a list one is drawn for each meta-step",
    )
    unroll: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="chunk of back-propagation in steps; 0: the whole episode",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="S: rollouts run beside updates, with meta-parameters that are S updates old; 0: synchronous",
    )
    backward: Literal["worker", "learner"] = Field(
        "worker",
        description="where rollouts are replayed: on the worker that ran them, or in one process of its own",
    )
    checkpoint_every: int = Field(
        0, ge=0, le=MOST_META_STEPS, description="meta-steps between two checkpoints; 0: about half a minute"
    )
    keep_checkpoints: int = Field(3, ge=1, le=100_000, description="how many checkpoints are kept")
    compare: bool = Field(True, description="compare with baselines at the end")
    init_from: str = Field("", description="weights to start from: a run directory, a file, a name, models:/NAME@ALIAS")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto: cuda where a GPU is asked for")
    family: FamilySettings
    rule: AnyRule = RuleSettings()
    estimator: EstimatorSettings = EstimatorSettings()
    learner: LearnerSettings = LearnerSettings()
    validation: ValidationSettings = ValidationSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    resources: ResourceSettings = ResourceSettings()
    faults: FaultSettings = FaultSettings()
    trajectories: TrajectorySettings = TrajectorySettings()
    data: DataSettings = DataSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("horizon", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("horizon")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or max(value) > MOST_STEPS:
            wrong = next(each for each in value if not 1 <= each <= MOST_STEPS)
            raise ValueError(f"every horizon must be at least 1 and at most {MOST_STEPS}, not {wrong}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> MetaTrainSettings:
        if self.estimator.truncated and not self.unroll:
            raise ValueError("estimator.truncated needs unroll >= 1")
        replayed = self.estimator.truncated or self.unroll or self.estimator.coordinates < 1
        kind = self.estimator.kind
        if self.estimator.coordinates < 1 and not RULES[self.rule.kind].separable:
            raise ValueError(
                f"estimator.coordinates={self.estimator.coordinates:g} needs a rule that can be replayed on some "
                f"parameters without the others; rule.kind={self.rule.kind} cannot"
            )
        if kind != "replay" and replayed:
            raise ValueError(f"estimator.kind={kind} takes no unroll, estimator.truncated or estimator.coordinates < 1")
        if kind == "exact" and self.rule.guard is not None:
            raise ValueError("estimator.kind=exact cannot differentiate what rule.guard decides; use replay or es")
        if self.backward == "learner" and kind != "replay":
            raise ValueError(f"backward=learner replays rollouts: it needs estimator.kind=replay, not {kind}")
        check_device(self.device, self.resources)
        if self.resources.min_workers > self.workers:
            raise ValueError(f"resources.min_workers={self.resources.min_workers} is more than workers={self.workers}")
        if self.resources.min_workers > self.resources.at_start(self.workers):
            raise ValueError(
                f"resources.start_workers={self.resources.start_workers} is less than "
                f"resources.min_workers={self.resources.min_workers}"
            )
        return self


class EvaluateSettings(_Settings):
    """All settings of one evaluation: every optimizer on every problem, once for each seed, all paired.

    A suite is a YAML file of these settings without `optimizers`, which its user adds.
    """

    plugins: Plugins = plugins_field()
    suite: _Name = Field("", description="name of the suite that this is")
    about: str = Field("", description="what the suite is for, in a sentence")
    optimizers: tuple[str, ...] = Field(
        (), max_length=MOST_NAMES, description="names as evaluation/optimizer_names.py reads them"
    )
    baselines: tuple[str, ...] = Field(
        (), max_length=MOST_NAMES, description="what the optimizers are measured against; names of the same kind"
    )
    reference: str = Field("mean+adam", description="the baseline whose losses all ratios are of, where it takes part")
    problems: tuple[str, ...] = Field(
        (), max_length=MOST_NAMES, description="NAME[key=value,...], with @STEPS where a problem has its own"
    )
    seed: int = Field(0, ge=0, le=2**62, description="the first of the `seeds` consecutive seeds")
    seeds: int = Field(5, ge=1, le=MOST_SEEDS, description="paired seeds of each cell")
    steps: int = Field(200, ge=1, le=MOST_STEPS, description="inner steps of each cell")
    tuning_seeds: int = Field(1, ge=1, le=MOST_SEEDS, description="seeds that choose learning rates; never reported")
    learning_rates: Grid = Field(GRID, description="grid that baselines are tuned over")
    criticality_batches: int = Field(
        64, ge=1, le=100_000, description="batches that are averaged to measure an end point"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto: cuda where a GPU is asked for")
    rule: AnyRule = Field(RuleSettings(), description="the network of `initial`")
    guard: GuardSettings = Field(GuardSettings(), description="of gml2o:NAME; its p is also that of dssmg and smg")
    resources: ShareSettings = Field(ShareSettings(), description="of one task: an optimizer, a problem, a seed")
    data: DataSettings = DataSettings()
    tracking: ExperimentSettings = ExperimentSettings()

    @field_validator("problems")
    @classmethod
    def _known(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            split_steps(text)
        return texts

    @model_validator(mode="after")
    def _fits(self) -> EvaluateSettings:
        if self.rule.guard is not None:
            raise ValueError("rule.guard is for meta-training; evaluate gml2o:initial, whose settings are guard.*")
        entered = len(self.optimizers) + len(self.baselines)
        cells = entered * len(self.problems) * (self.seeds + self.tuning_seeds * len(self.learning_rates))
        if cells > MOST_CELLS:
            raise ValueError(
                f"{entered} optimizers on {len(self.problems)} problems with seeds={self.seeds}, tuning_seeds="
                f"{self.tuning_seeds} and {len(self.learning_rates)} learning_rates are up to {cells} cells; "
                f"at most {MOST_CELLS}"
            )
        check_device(self.device, self.resources)
        return self


def split_steps(text: str) -> tuple[ProblemSpec, int | None]:
    """Read `PROBLEM` or `PROBLEM@STEPS`; raises UserError."""
    problem, at, steps = text.rpartition("@")
    if not at:
        return ProblemSpec.parse(text), None
    if not (steps.isascii() and steps.isdecimal() and len(steps) < 20 and 1 <= int(steps) <= MOST_STEPS):
        raise UserError(
            f"problem {text!r}: after @ stands how many steps are taken, from 1 to {MOST_STEPS}, not {steps!r}"
        )
    return ProblemSpec.parse(problem), int(steps)


def check_device(device: str, resources: ShareSettings) -> None:
    """Raise ValueError for a device of which no share is requested."""
    if device.startswith("cuda") and not resources.num_gpus:
        raise ValueError(f"device={device} needs resources.num_gpus > 0")
