"""A judge in a local folder: here the tiny MLLM, which was trained to say what a picture shows."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

from examples.tiny.mllm_data import heldout_scenes
from examples.tiny.mllm_model import AUX_PROMPTS
from examples.tiny.mllm_report import describe, load_tiny_mllm
from iomm.evaluation.benches.journal import Journal
from iomm.evaluation.benches.judges import Ask, ask_all
from iomm.evaluation.benches.layout import BenchError
from iomm.evaluation.benches.local_judge import LocalJudge

SHIPPED = Path(__file__).parents[3] / "examples" / "tiny" / "mllm"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM with a processor and a chat template, as folders of larger ones have them."""
    folder = tmp_path_factory.mktemp("judges") / "tiny-judge"
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(SHIPPED, local_files_only=True, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True),
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token="<IMG_CONTEXT>",
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(SHIPPED / name, folder / name)
    return folder


def test_it_looks_at_the_picture_and_answers_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    judge = LocalJudge(folder, torch.device("cpu"))
    scenes = heldout_scenes(8, seed=6)
    pngs = []
    for scene in scenes:
        data = io.BytesIO()
        scene.image.save(data, "PNG")
        pngs.append(data.getvalue())
    asks = {f"{n}": lambda n=n: Ask(text=AUX_PROMPTS[0], pngs=(pngs[n],)) for n in range(len(pngs))}
    answers = ask_all(judge, asks, Journal(tmp_path / "answers.jsonl"), workers=4)
    known = describe(load_tiny_mllm(SHIPPED), [scene.image for scene in scenes])
    assert [answers[f"{n}"] for n in range(len(pngs))] == known
    assert len(set(known)) > 4
    assert judge.ask(asks["0"]()) == answers["0"]
    assert judge.name.startswith("tiny-judge ") and len(judge.name) == len("tiny-judge ") + 12


def test_a_folder_without_a_model_or_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no processor can be had from --judge-folder"):
        LocalJudge(tmp_path, torch.device("cpu"))
    silent = tmp_path / "silent"
    shutil.copytree(folder, silent)
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(BenchError, match="no chat template"):
        LocalJudge(silent, torch.device("cpu"))
