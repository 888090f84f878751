"""Our names and shapes of the generator's weights against those of the diffusers class that it equals.

    family_table(config)     the table: ours <-> theirs, tensor by tensor (`name_table`)
    their_config(config)     config.json of the stock class
    our_config(theirs)       back

One file a family holds its rows: `names_flux`, `names_z_image`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from iomm.checkpoint import names_flux, names_z_image
from iomm.checkpoint.name_table import Row, Table
from iomm.config import GeneratorConfig


@dataclass(frozen=True)
class Family:
    """An architecture that ours shares with a class of diffusers."""

    their_class: str
    rows: Callable[[GeneratorConfig], tuple[Row, ...]]
    their_config: Callable[[GeneratorConfig], dict[str, Any]]
    our_config: Callable[[Mapping[str, Any]], GeneratorConfig]


FAMILIES = {  # by `GeneratorConfig.family`
    "flux": Family(names_flux.THEIR_CLASS, names_flux.rows, names_flux.their_config, names_flux.our_config),
    "z_image": Family(
        names_z_image.THEIR_CLASS, names_z_image.rows, names_z_image.their_config, names_z_image.our_config
    ),
}


def family_table(config: GeneratorConfig) -> Table:
    """All names and shapes of a generator of this shape."""
    return Table(FAMILIES[config.family].rows(config))


def their_config(config: GeneratorConfig) -> dict[str, Any]:
    """config.json of the stock class, with what that class has no place for under a key it passes over.

    Raises:
        ValueError: a setting that the stock class fixes at another value.
    """
    return FAMILIES[config.family].their_config(config)


def our_config(theirs: Mapping[str, Any]) -> GeneratorConfig:
    """The generator of a config.json.

    Raises:
        ValueError: another class, or settings that our model does not have.
    """
    families = {family.their_class: family for family in FAMILIES.values()}
    name = theirs.get("_class_name")
    if name not in families:
        raise ValueError(f"config.json is of the class {name}; a generator is one of {', '.join(families)}.")
    return families[name].our_config(theirs)
