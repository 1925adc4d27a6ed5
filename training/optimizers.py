"""The sections [optim], [optim.roles.<role>] and [baseline]: the optimizer and its settings."""

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal, cast

from optim import Dualized, EscapeVelocity
from optim.baselines import BASELINES, Recipe
from optim.errors import require
from optim.polar import Polar
from optim.roles import RoleMasses, RoleNorms
from optim.settings import (
    Help,
    OneOf,
    Range,
    StepSettings,
    by_role,
    extended,
    help_texts,
    hints_of,
    settings_class,
)

from .errors import ConfigError
from .sections import flat, set_it


@dataclass(kw_only=True)
class HalfLives:
    """Decays by their half-lives in tokens, which can stay when the batch changes."""

    beta_half_life: Annotated[float, Range(0, above=True)] | None = None
    """Half-life of the average of gradients in tokens, instead of beta, which is then
    0.5 ** (tokens of a step / half-life). A step has train.batch_size · model.block_size tokens."""

    beta2_half_life: Annotated[float, Range(0, above=True)] | None = None
    """Half-life of the average of squares in tokens, instead of beta2. Kept in tokens, it carries
    over batch sizes (Marek et al., arXiv 2507.07101)."""


RoleSettings = settings_class(
    "RoleSettings",
    "Settings for the weights of one role alone. What is left out is as [optim] says.",
    {
        key: (hints_of(cls)[key] | None, None, help_texts(cls)[key])
        for cls, keys in ((StepSettings, by_role()), (HalfLives, hints_of(HalfLives)))
        for key in keys
    },
    module=__name__,
)


class _Roles:
    """The methods of Roles, whose fields are made from the roles below."""

    def given(self) -> dict[str, dict[str, Any]]:
        """Return {role: {setting: value}} of what is set of a step's settings."""
        given = {
            role: {key: v for key in by_role() if (v := getattr(settings, key)) is not None}
            for role, settings in vars(self).items()
        }
        return {role: settings for role, settings in given.items() if settings}


Roles = make_dataclass(
    "Roles",
    [(f.name, RoleSettings, field(default_factory=RoleSettings)) for f in fields(RoleMasses)],
    bases=(_Roles,),
    namespace={
        "__doc__": "Settings for the weights of one role, [optim.roles.<role>].",
        "__module__": __name__,
    },
)


def own_settings(recipes: Iterable[Recipe]) -> dict[str, tuple[Any, Any, str]]:
    """Return {setting: (type, default, help text)} of the settings that baselines alone have."""
    declared = {key: row for recipe in recipes for key, row in recipe.own.items()}
    return {
        key: (hint, default, next(m.text for m in hint.__metadata__ if isinstance(m, Help)))
        for key, (hint, default) in declared.items()
    }


BaselineSettings = settings_class(
    "BaselineSettings",
    "Settings of the baselines, the optimizers we are compared with. Each says whose it is.",
    own_settings(BASELINES.values()),
    module=__name__,
)


@cache
def baseline_settings(recipes: tuple[Recipe, ...]) -> type:
    """Return BaselineSettings, with the settings of baselines that were registered later."""
    return extended(BaselineSettings, own_settings(recipes))


def own_settings_of(name: str) -> dict[str, Any]:
    """Return {setting: …} of the section [baseline] that an optimizer takes."""
    return BASELINES[name].own if name in BASELINES else {}


# A file may set these for every optimizer, so that the entries of a comparison can share it: most
# take them, and the loop itself clips to max_grad_norm.
SHARED = ("lr", "beta", "beta2", "weight_decay", "max_grad_norm")

OPTIMIZERS = cast(Mapping[str, Any], ChainMap(cast(dict, BASELINES), {"dualized": Dualized}))


@dataclass(kw_only=True)
class Chosen:
    """Which optimizer."""

    name: Annotated[str, OneOf(OPTIMIZERS)] = "dualized"
    """The optimizer. All but "dualized" are baselines, torch's own (optim/baselines.py) or those of
    a library (training/published.py), and take few of these settings; normalized_adam and
    normalized_sgd step in the modular norm."""


@dataclass(kw_only=True)
class OptimConfig(HalfLives, StepSettings, Chosen):
    """The optimizer. Settings of a step are those of Dualized; lr is at the top of the schedule."""

    composition: Literal["modular", "max"] = "modular"
    """How the norms of weights make one norm: the network's modular norm, or the plain maximum."""

    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights in memory; float64 is for checks."""

    auto: EscapeVelocity = field(default_factory=EscapeVelocity)
    polar: Polar = field(default_factory=Polar)
    norms: RoleNorms = field(default_factory=RoleNorms)
    masses: RoleMasses = field(default_factory=RoleMasses)
    roles: Roles = field(default_factory=Roles)  # type: ignore[valid-type]  # which is made

    def step_settings(self) -> dict[str, Any]:
        """Return {setting: value} of a step, without lr."""
        return {f.name: getattr(self, f.name) for f in fields(StepSettings) if f.name != "lr"}

    def check(self) -> None:
        """Raise ConfigError for values that cannot be together, Refusal where all masses are 0."""
        if self.name != "dualized":
            self._check_baseline()
        require(
            self.scale == "unit" or self.lr != "auto",
            "optim.scale",
            got=repr(self.scale),
            allowed='"unit" where lr is "auto"',
            fix=set_it("optim.scale"),
            error=ConfigError,
        )
        self.masses.check()

    def _check_baseline(self) -> None:
        """Raise ConfigError for a setting that this baseline does not take.

        Those that are SHARED may stay.
        """
        taken = (*SHARED, *BASELINES[self.name].hints)
        untaken = [f.name for f in fields(StepSettings) if f.name not in taken]
        defaults = flat(OptimConfig())
        # Half-lives before the decays that they give: those are what was stated.
        for key, value in sorted(flat(self).items(), key=lambda item: "half_life" not in item[0]):
            if key in untaken or key.startswith(("auto.", "roles.")):
                require_default(f"optim.{key}", value, defaults[key], self.name)
        require(
            not isinstance(self.lr, str),
            "optim.lr",
            got=repr(self.lr),
            allowed=f"a number for {self.name}",
            fix=set_it("optim.lr"),
            error=ConfigError,
        )


def require_default(key: str, value: Any, default: Any, name: str) -> None:
    """Raise ConfigError unless a setting that this optimizer does not take is at its default."""
    only = "left out" if default is None else repr(default)
    require(
        value == default,
        key,
        got=repr(value),
        allowed=f"{only} with optim.name = {name!r}, which does not take it",
        fix=set_it(key),
        error=ConfigError,
    )
