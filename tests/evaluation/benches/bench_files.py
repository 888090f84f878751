"""Small benchmarks in their official formats, and a fake painter."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from iomm.evaluation.benches.generate import Generation
from iomm.evaluation.benches.layout import Bench, Item

SIDE = 8
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def geneval_prompts(path: Path, count: int = 7, word: str = "bench") -> Path:
    lines = [
        {
            "tag": TAGS[n % 6],
            "include": [{"class": "bench", "count": 1}],
            "prompt": f"a photo of {word} {n}",
        }
        for n in range(count)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def dpg_prompts(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for n in range(count):
        (folder / f"COCOval{n}.txt").write_text(f"A long prompt, number {n}.\n")
    return folder


def dpg_questions(path: Path) -> Path:
    """Three prompts; the first one's second question depends on its first, which is the first row."""
    rows = [
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language"
    ]
    for n in range(3):
        rows.append(f'COCOval{n},"a dog, brown",,1,0,entity,whole,entity - whole (dog),Is there a dog?')
        color = '"attribute - color (dog, brown)"'
        rows.append(f'COCOval{n},"a dog, brown",,2,1,attribute,color,{color},Is the dog brown?')
    path.write_text("\n".join(rows) + "\n")
    return path


def wise_prompts(folder: Path, ids: Sequence[int] = (1, 401, 568, 701, 801, 901), suffix: str = "") -> Path:
    folder.mkdir()
    names = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    for n, name in enumerate(names):
        mine = [i for i in ids if (i > 400) + (i > 700) == n]
        records = [
            {"Prompt": f"prompt {i}", "Explanation": f"thing {i}", "Subcategory": "s", "prompt_id": i}
            for i in mine
        ]
        (folder / f"{name}{suffix}.json").write_text(json.dumps(records))
    return folder


def imgedit_prompts(path: Path) -> Path:
    edits = {
        "1082": {"id": "animal/1.jpg", "prompt": "smooth the shell", "edit_type": "adjust"},
        "1068": {"id": "animal/2.jpg", "prompt": "darken the fur", "edit_type": "adjust"},
        "673": {"id": "style/3.jpg", "prompt": "as a woodblock print", "edit_type": "style"},
    }
    path.write_text(json.dumps(edits))
    return path


def fake_paint(bench: Bench, calls: list[int] | None = None) -> Any:
    """A painter whose picture says its number: the first pixel is (number // 256, number % 256, 7)."""

    def paint(items: Sequence[Item], first: int) -> Tensor:
        if calls is not None:
            calls.append(first)
        pictures = torch.full((len(items) * bench.images_per_prompt, 3, SIDE, SIDE), 7, dtype=torch.uint8)
        numbers = torch.arange(first, first + len(pictures))
        pictures[:, 0], pictures[:, 1] = (numbers // 256)[:, None, None], (numbers % 256)[:, None, None]
        return pictures

    return paint


def settings(**about: Any) -> Generation:
    return Generation(side_px=SIDE, batch_prompts=2, about={"checkpoint": {"step": 1}, **about})


def one_rank() -> Any:
    """A mesh of one process that starts nothing."""
    return SimpleNamespace(rank=0, world_size=1, broadcast_object=lambda value: value, barrier=lambda: None)
