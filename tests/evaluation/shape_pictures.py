"""Pictures for the tests of the shapes world."""

import numpy as np

from iomm.evaluation.shapes.scene import Scene, Thing, render


def thing(shape: str, colour: str = "red", x: float = 0.5, y: float = 0.5, radius: float = 0.2) -> Thing:
    return Thing(shape=shape, colour=colour, x=x, y=y, radius=radius)


def picture(*things: Thing, background: str = "white", side_px: int = 64) -> np.ndarray:
    return render(Scene(things=things, background=background), side_px)


def in_a_row(*kinds: tuple[str, str], radius: float = 0.15) -> list[Thing]:
    """Up to three things from left to right."""
    spots = (0.2, 0.5, 0.8) if len(kinds) == 3 else (0.28, 0.72)
    return [
        thing(shape, colour, x=x, radius=radius) for (shape, colour), x in zip(kinds, spots, strict=False)
    ]
