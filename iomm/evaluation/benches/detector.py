"""GenEval's judge: Mask2Former finds things, CLIP says their colours.

Both come from local folders in the Hugging Face layout (facebook/mask2former-swin-small-coco-instance,
openai/clip-vit-large-patch14). The published scores are of mmdet's Mask2Former (swin-s, COCO, 2022-05-04) and
open_clip's ViT-L-14 of OpenAI. These are their ports; how far their verdicts agree was not measured. The
steps are the official ones: the 100 surest (query, class) pairs, score = class probability * mean mask
probability, boxes around the masks, colours on the crop of a thing with grey around its mask.

Q queries, K classes without "no object", N things, D channels of CLIP.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from iomm.errors import first_line
from iomm.evaluation.benches.judges import model_identity
from iomm.evaluation.benches.layout import BenchError, named
from iomm.evaluation.benches.rules import COLORS, Thing

TOP = 100
_GREY = "#999"
_NAMES = {  # of COCO, as checkpoints have them -> as GenEval says
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}
_SENTENCES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class Detector:
    """Mask2Former and CLIP."""

    def __init__(self, detector: Path, clip: Path, device: torch.device) -> None:
        """
        Args:
            detector: folder of a `Mask2FormerForUniversalSegmentation`, trained on COCO's things.
            clip: folder of a `CLIPModel` with its tokenizer.
        Raises:
            BenchError: a folder without the model.
        """
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            CLIPModel,
            Mask2FormerForUniversalSegmentation,
        )

        def load(kind: Any, folder: Path, **settings: Any) -> Any:
            try:
                return kind.from_pretrained(folder, local_files_only=True, **settings)
            except (OSError, ValueError) as error:
                raise BenchError(
                    f"no {kind.__name__} in {folder} ({first_line(error)}). Give a folder in the "
                    "Hugging Face layout."
                ) from error

        self.device = device
        self._processor = load(AutoImageProcessor, detector, backend="pil")
        self._detector = load(Mask2FormerForUniversalSegmentation, detector).to(device).eval()
        self._clip_processor = load(AutoImageProcessor, clip, backend="pil")
        self._tokenizer, self._clip = load(AutoTokenizer, clip), load(CLIPModel, clip).to(device).eval()
        labels: dict[int, str] = self._detector.config.id2label
        self._labels = [_NAMES.get(labels[k].lower(), labels[k].lower()) for k in range(len(labels))]
        self._texts: dict[str, Tensor] = {}
        self.name = f"Mask2Former {model_identity(detector)}, CLIP {model_identity(clip)}"

    def require(self, classes: set[str]) -> None:
        """Raises:
        BenchError: things that the detector has no class for.
        """
        lacking = sorted(classes - set(self._labels))
        if lacking:
            raise BenchError(
                f"the detector knows no {named(lacking)}. Give one that was trained on COCO's 80 things."
            )

    @torch.no_grad()
    def find(self, image: Image.Image) -> dict[str, list[Thing]]:
        """All things in a picture, by class, however unsure."""
        inputs = self._processor(images=image, return_tensors="pt").to(self.device)
        out = self._detector(**inputs)
        valid = (
            inputs["pixel_mask"][0]
            if "pixel_mask" in inputs
            else torch.ones(inputs["pixel_values"].shape[-2:])
        )
        shown = (int(valid.any(1).sum()), int(valid.any(0).sum()))
        masks_QHW = functional.interpolate(out.masks_queries_logits, tuple(valid.shape), mode="bilinear")[0]
        masks_QHW = masks_QHW[:, : shown[0], : shown[1]]
        size = (image.height, image.width)
        masks_QHW = functional.interpolate(masks_QHW[None], size, mode="bilinear")[0]
        return _things(out.class_queries_logits[0], masks_QHW, self._labels)

    @torch.no_grad()
    def colors(self, image: Image.Image, things: Sequence[Thing], name: str) -> list[str]:
        """The likeliest colour of each thing."""
        crops = [_crop(image, thing) for thing in things]
        pixels = self._clip_processor(images=crops, return_tensors="pt").to(self.device)
        seen_ND = functional.normalize(self._clip.get_image_features(**pixels).pooler_output, dim=-1)
        best_N = (seen_ND @ self._of_colors(name).T).argmax(1)
        return [COLORS[int(n)] for n in best_N]

    def _of_colors(self, name: str) -> Tensor:
        """One direction a colour: the mean of its sentences'."""
        if name not in self._texts:
            texts = [text.format(color=color, name=name) for color in COLORS for text in _SENTENCES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            said = functional.normalize(self._clip.get_text_features(**tokens).pooler_output, dim=-1)
            mean = said.unflatten(0, (len(COLORS), len(_SENTENCES))).mean(1)
            self._texts[name] = functional.normalize(mean, dim=-1)
        return self._texts[name]


def _things(classes_QK1: Tensor, masks_QHW: Tensor, labels: Sequence[str]) -> dict[str, list[Thing]]:
    """The surest (query, class) pairs as things; a query may be several classes.

    Args:
        classes_QK1: logits, "no object" last.
        masks_QHW: logits, at the picture's size.
    """
    scores_QK = classes_QK1.softmax(-1)[:, :-1]
    top, places = scores_QK.flatten().topk(min(TOP, scores_QK.numel()))
    found: dict[str, list[Thing]] = {}
    for score, place in zip(top.tolist(), places.tolist(), strict=True):
        query, label = divmod(int(place), scores_QK.shape[1])
        mask_HW = masks_QHW[query] > 0
        if not mask_HW.any():
            continue
        sure = masks_QHW[query].sigmoid()[mask_HW].mean().item()
        thing = Thing(box=_box(mask_HW), score=score * sure, mask_HW=mask_HW.cpu().numpy())
        found.setdefault(str(labels[label]), []).append(thing)
    return found


def _box(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """Around what is True: left, top, and behind the last column and row."""
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    return (
        float(columns[0].item()),
        float(rows[0].item()),
        float(columns[-1].item() + 1),
        float(rows[-1].item() + 1),
    )


def _crop(image: Image.Image, thing: Thing) -> Image.Image:
    grey = Image.new("RGB", image.size, _GREY)
    alone = Image.composite(image, grey, Image.fromarray(thing.mask_HW.astype(np.uint8) * 255))
    left, top, right, bottom = (int(side) for side in thing.box)
    return alone.crop((left, top, right, bottom))
