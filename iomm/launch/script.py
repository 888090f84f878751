"""examples/slurm/train.sbatch, the one source of a launch, filled in for one run.

Nothing is generated: the script's `#SBATCH` lines get other values, lines are added behind them, and the rest
stays as it is. So `iomm launch slurm` and `sbatch examples/slurm/train.sbatch` do the same.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=.*)?$")


def find_script(name: str) -> Path:
    """The launch script `name`: examples/slurm/NAME in a checkout, beside this file when installed."""
    here = Path(__file__).resolve()
    places = (here.parents[2] / "examples" / "slurm" / name, here.parent / "scripts" / name)
    found = next((place for place in places if place.is_file()), None)
    assert found is not None, (
        f"{name} is at none of {', '.join(map(str, places))}: the installation is damaged"
    )
    return found


def render(
    script: str, options: Mapping[str, str | None], variables: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """The text of a batch script with these values in it.

    Args:
        script: the text to fill in; it has #SBATCH lines, and passes its arguments on as "$@".
        options: of sbatch, by their long name without dashes; None for one without a value. They replace the
            script's or are added behind its last one.
        variables: exported for the script's own `${NAME:-default}`.
        arguments: what stands behind the script's name on sbatch's command line.
    """
    lines = script.splitlines()
    directives = {match[1]: n for n, line in enumerate(lines) if (match := _DIRECTIVE.match(line))}
    assert directives, "the script has no #SBATCH line"
    added: list[str] = []
    for name, value in options.items():
        line = f"#SBATCH --{name}" + ("" if value is None else f"={value}")
        if name in directives:
            lines[directives[name]] = line
        else:
            added.append(line)
    last = max(directives.values()) + 1
    filled_in = ["", "# Filled in by `iomm launch slurm`."]
    filled_in += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    filled_in.append(f"set -- {shlex.join(arguments)}")
    return "\n".join([*lines[:last], *added, *filled_in, *lines[last:]]) + "\n"
