"""Problems by name, and families to draw them from.

Nothing here needs torch: the settings of the package's own problems are read from its source, which takes a hundredth
of the time of importing them.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml2o_dist.runtime.errors import UserError, unknown
from ml2o_dist.runtime.registry import Registry, modules_of
from ml2o_dist.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from ml2o_dist.problems.base import Problem, ProblemContext

Scalar = str | int | float | bool

Factory = Callable[..., "Problem"]

FACTORIES: Registry[Factory] = Registry("problem", lambda: modules_of("ml2o_dist.problems"))


def register_problem(name: str, about: str = "", **fixed: Scalar) -> Callable[[Factory], Factory]:
    """Register a factory `(context: ProblemContext, *, key=default, ...) -> Problem` under `name` (a decorator).

    Its keyword-only parameters are the problem's settings. The first line of its docstring describes the problem;
    `about`, if given, is put before it. One factory may serve several names, each with `fixed` values for some
    parameters.
    """

    def register(factory: Factory) -> Factory:
        def make(context: ProblemContext, **settings: Scalar) -> Problem:
            return factory(context, **fixed, **settings)

        make.__signature__ = _without(inspect.signature(factory), fixed)  # type: ignore[attr-defined]
        make.__doc__ = "\n\n".join(filter(None, (about, inspect.getdoc(factory))))
        FACTORIES.register(name, factory)(make)
        return factory

    return register


@dataclass(frozen=True)
class Description:
    """A problem's settings with their defaults, and its description."""

    settings: dict[str, Scalar]
    text: str


def problem_names() -> list[str]:
    """Return the names of all registered problems, sorted."""
    return sorted({*_built_in(), *FACTORIES.registered()})


def problem_settings(name: str) -> dict[str, Scalar]:
    """Return the settings of problem `name` with their defaults; raises UserError for an unknown name."""
    return dict(_described(name).settings)


def problem_description(name: str) -> str:
    """Return the description of problem `name`; raises UserError for an unknown name."""
    return _described(name).text


def _described(name: str) -> Description:
    if (found := _built_in().get(name)) is not None:
        return found
    if name not in FACTORIES.registered():
        raise unknown("problem", name, problem_names(), extensible=True)
    factory = FACTORIES[name]
    parameters = inspect.signature(factory).parameters.values()
    settings = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return Description(settings, inspect.getdoc(factory) or "")


@cache
def _built_in() -> dict[str, Description]:
    """Return the package's own problems, as the decorated definitions in its source describe them."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register_problem":
                    name, *about = (ast.literal_eval(word) for word in call.args)
                    fixed = {keyword.arg for keyword in call.keywords}
                    text = "\n\n".join(filter(None, (*about, ast.get_docstring(node))))  # type: ignore[arg-type]
                    found[name] = Description(
                        {key: value for key, value in _keywords(node).items() if key not in fixed}, text
                    )
    return found


def _keywords(node: ast.AST) -> dict[str, Scalar]:
    """Return the keyword-only parameters of a function, or of a class's own `__init__`, with their defaults."""
    if isinstance(node, ast.ClassDef):
        node = next(each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    assert isinstance(node, ast.FunctionDef)
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {each.arg: ast.literal_eval(value) for each, value in pairs if value is not None}


def _without(signature: inspect.Signature, names: Mapping[str, Any]) -> inspect.Signature:
    kept = [each for each in signature.parameters.values() if each.name not in names]
    return signature.replace(parameters=kept)


@dataclass(frozen=True)
class ProblemSpec:
    """A problem by name with its settings: `multimnist[net=lenet5,batch=64]`. Hashable, picklable, printable."""

    name: str
    settings: tuple[tuple[str, Scalar], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{key}={_written(value)}" for key, value in self.settings)
        return f"{self.name}[{inside}]" if inside else self.name

    @classmethod
    def parse(cls, text: str) -> ProblemSpec:
        """Read `name` or `name[key=value,...]`; raises UserError on bad syntax, an unknown name or setting."""
        match = re.fullmatch(r"\s*([A-Za-z0-9_\-+]+)\s*(?:\[(.*)\])?\s*", text)
        if match is None:
            raise UserError(f"problem {text!r} is not of the form name or name[key=value,...]")
        name, inside = match.group(1), match.group(2)
        pairs: dict[str, Scalar] = {}
        for item in filter(None, (part.strip() for part in (inside or "").split(","))):
            key, equals, value = item.partition("=")
            if not equals or not key.strip() or not value.strip():
                raise UserError(f"problem {text!r}: {item!r} is not of the form key=value")
            pairs[key.strip()] = _scalar(value.strip())
        return cls.of(name, pairs)

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Scalar]) -> ProblemSpec:
        """Build a spec, checked against what the problem `name` accepts; settings are kept in name order."""
        allowed = problem_settings(name)
        for key, value in settings.items():
            if key not in allowed:
                raise unknown(f"setting of problem {name!r}", key, allowed)
            if isinstance(value, str) and isinstance(allowed[key], int | float):
                what = "true or false" if isinstance(allowed[key], bool) else "a number"
                raise UserError(
                    f"problem {name!r}: {key} must be {what} (default {_written(allowed[key])}), not {value!r}"
                )
        return cls(name, tuple(sorted(settings.items())))

    def build(self, context: ProblemContext) -> Problem:
        """Construct the problem; raises UserError for a wrong value or missing data."""
        try:
            return FACTORIES[self.name](context, **dict(self.settings))
        except TypeError as error:
            raise UserError(f"problem {self}: {error}") from error


@dataclass(frozen=True)
class FamilyMember:
    """One line of a family: a problem, how often it is drawn, and the values each setting is drawn from."""

    name: str
    weight: float
    choices: tuple[tuple[str, tuple[Scalar, ...]], ...]

    def specs(self) -> Iterator[ProblemSpec]:
        """Yield every problem that can be drawn from this member."""
        keys = [key for key, _ in self.choices]
        for values in itertools.product(*(values for _, values in self.choices)):
            yield ProblemSpec.of(self.name, dict(zip(keys, values, strict=True)))


@dataclass(frozen=True)
class ProblemFamily:
    """A distribution over problems: a member by weight, then each of its settings uniformly from its choices."""

    members: tuple[FamilyMember, ...]

    def sample(self, seed: int) -> ProblemSpec:
        """Return the problem drawn with `seed`: a pure function of the family and the seed."""
        if not self.members:
            raise UserError("the problem family is empty: give it at least one member")
        total = sum(member.weight for member in self.members)
        left = (derive_seed("member", seed) / 2**63) * total
        for member in self.members:
            left -= member.weight
            if left < 0:
                break
        picked = {key: values[derive_seed("choice", seed, key) % len(values)] for key, values in member.choices}
        return ProblemSpec.of(member.name, picked)


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
