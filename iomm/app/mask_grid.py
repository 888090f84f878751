"""The token grid on which a mask is painted: a Gradio component of a few cells over the image.

Its value is {"image": a data URL, "side": tokens a side, "hidden": a `Studio` mask}. What the browser sends
back is the same with other cells hidden.
"""

import base64
import io
from typing import Any

import gradio as gr
from PIL import Image

_TEMPLATE = """<div class="mask-grid" style="grid-template-columns: repeat(${value.side}, 1fr);
  background-image: url('${value.image}')">${[...value.hidden].map((hidden, i) =>
  '<i data-token="' + i + '" class="' + (hidden === '1' ? 'hidden-token' : '') + '"></i>').join('')}</div>"""

_STYLE = """
.mask-grid { display: grid; width: 100%; max-width: 384px; aspect-ratio: 1; background-size: cover;
  touch-action: none; user-select: none; cursor: crosshair; border-radius: 4px; overflow: hidden; }
.mask-grid i { box-shadow: inset 0 0 0 0.5px rgb(255 255 255 / 45%); }
.mask-grid i.hidden-token { background: rgb(20 20 20 / 88%); }
"""

# One stroke hides, or shows, what it touches; which of the two the first token says.
_STROKES = """
let hides = null;
const tokenAt = (event) => {
  const found = document.elementFromPoint(event.clientX, event.clientY);
  return found && found.dataset.token !== undefined && element.contains(found) ? found : null;
};
element.addEventListener('pointerdown', (event) => {
  const token = tokenAt(event);
  if (!token) return;
  event.preventDefault();
  hides = !token.classList.contains('hidden-token');
  token.classList.toggle('hidden-token', hides);
});
element.addEventListener('pointermove', (event) => {
  const token = hides === null ? null : tokenAt(event);
  if (token) token.classList.toggle('hidden-token', hides);
});
document.addEventListener('pointerup', () => {
  if (hides === null) return;
  hides = null;
  const tokens = [...element.querySelectorAll('i[data-token]')];
  const hidden = tokens.map((token) => token.classList.contains('hidden-token') ? '1' : '0').join('');
  props.value = { ...props.value, hidden };
});
"""


def mask_grid(elem_id: str, side_tokens: int) -> gr.HTML:
    """An empty grid; within `gr.Blocks`."""
    blank = Image.new("RGB", (1, 1), "#888")
    return gr.HTML(
        value=grid_value(blank, side_tokens, "0" * side_tokens**2),
        html_template=_TEMPLATE,
        css_template=_STYLE,
        js_on_load=_STROKES,
        elem_id=elem_id,
    )


def grid_value(image: Image.Image, side_tokens: int, hidden: str) -> Any:
    """A value that shows an image under a mask."""
    data = io.BytesIO()
    image.save(data, "WEBP", quality=85)
    url = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"image": url, "side": side_tokens, "hidden": hidden}
