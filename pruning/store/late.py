"""Recovery of a process whose work was finished by another process of the same command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from models.terminal import say
from pruning.store.build import tidy
from pruning.store.manifest import FinishedElsewhere

Given = ParamSpec("Given")
Result = TypeVar("Result")

_ATTEMPTS = 8  # a stage may make several artifacts


def stage(run: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorate the `run` of a stage: rerun it where another process finished its artifact.

    When rerun, a stage returns the finished artifact. It raises FinishedElsewhere only if this
    happens time and again.
    """

    @functools.wraps(run)
    def again(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for _ in range(_ATTEMPTS):
            try:
                return run(*args, **kwargs)
            except FinishedElsewhere as late:
                tidy(late.args[0])
                say(f"{late} Nothing of it is left to do.", error=True)
        return run(*args, **kwargs)

    return again
