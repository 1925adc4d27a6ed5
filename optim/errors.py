"""The one way to refuse what a user asked for, and the errors of the optimizer.

Every message has the same four lines, so that a reader finds the remedy in the same place:

    optim.lr
      got: -1.0
      allowed: a finite number >= 0
      fix: --optim.lr 0.1
"""

import difflib
from collections.abc import Iterable
from typing import Any


class Refusal(ValueError):
    """Something that a user can get wrong: what was got, what is allowed, how to fix it.

    what: the setting, the parameter or the file, in the user's words. got, allowed, fix: their
    lines, as they are printed; None leaves a line out.
    """

    def __init__(
        self, what: object, *, got: object = None, allowed: object = None, fix: object = None
    ) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        lines = {"got": got, "allowed": allowed, "fix": fix}
        super().__init__(
            "\n".join([str(what), *(f"  {k}: {v}" for k, v in lines.items() if v is not None)])
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes; by default only positional arguments would.
        return _again, (type(self), self.what, self.got, self.allowed, self.fix)


def _again(cls: type[Refusal], what: object, got: object, allowed: object, fix: object) -> Refusal:
    return cls(what, got=got, allowed=allowed, fix=fix)


def require(
    fine: object,
    what: object,
    *,
    got: object = None,
    allowed: object = None,
    fix: object = None,
    error: type[Refusal] = Refusal,
) -> None:
    """Raise `error` with these lines unless `fine` holds."""
    if not fine:
        raise error(what, got=got, allowed=allowed, fix=fix)


def nearest(name: str, names: Iterable[str], *, otherwise: str, prefix: str = "") -> str:
    """Return how to fix a name that is none of these: the nearest of them, or what else to do."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"nearest valid name: {prefix}{close[0]}" if close else otherwise


class CoverageError(Refusal):
    """A parameter that has no norm, two of them, or one that does not fit it."""


class PlacementError(Refusal):
    """A distribution over processes that is not supported."""


class BackwardError(Refusal, RuntimeError):
    """A backward pass at a time at which its gradients would be lost."""


class CopyError(Refusal, TypeError):
    """A copy or a pickle of what cannot be copied."""


class NonFiniteError(ValueError):
    """A NaN or an infinity, with the name of its tensor."""


class GuessWarning(UserWarning):
    """A guess at a weight's place, in a model that declares no structure."""
