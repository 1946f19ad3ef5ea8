"""Commands, their options, and gin, which no other package imports.

`python -m pruning` searches the current directory for modules first. A user's package `models`
there would be imported in place of Winnow's; this is refused before any other import.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

for _name in ("models", "evaluation"):
    _spec = find_spec(_name)
    if (
        _spec is not None
        and _spec.origin
        and not Path(_spec.origin).resolve().is_relative_to(_ROOT)
    ):
        sys.exit(
            f"error: {_spec.origin} hides Winnow's module {_name!r}: run the command in another "
            "directory, or as `winnow COMMAND`"
        )
