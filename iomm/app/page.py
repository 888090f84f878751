"""The page: three tabs over a `Studio`.

Pictures are made one at a time; who comes later waits in a short queue and sees how long. Nothing is sent
anywhere but to the browser that asked: Gradio's telemetry and share links are off, fonts are the system's.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from PIL import Image

from iomm.app.mask_grid import grid_value, mask_grid
from iomm.app.studio import Preview, Sampling, Studio, shown

WAITING = 16  # requests; more are refused
MAX_UPLOAD = "64mb"
MAX_STEPS = 250
MAX_SEED = 2**32 - 1
_FILES_S = (600, 3600)  # every so often, uploaded and shown pictures older than that are deleted

Shown = tuple[Image.Image, str]


@dataclass(frozen=True, kw_only=True)
class _Controls:
    """What every tab has."""

    run: gr.Button
    stop: gr.Button
    steps: gr.Slider
    seed: gr.Number
    method: gr.Radio
    picture: gr.Image
    status: gr.Markdown

    @property
    def sampling(self) -> list[Any]:
        return [self.steps, self.seed, self.method]

    def on_run(self, make: Callable[..., Iterator[Shown]], inputs: list[Any]) -> None:
        """Show what `make` yields when the button is pressed, until it is stopped: before it begins, or at
        the next preview, for a step that runs cannot be interrupted."""
        stopped: set[str] = set()  # sessions

        def pressed(request: gr.Request) -> None:
            stopped.discard(str(request.session_hash))

        def run(request: gr.Request, *values: Any) -> Iterator[Shown | tuple[Any, str]]:
            session = str(request.session_hash)
            if session in stopped:
                yield gr.skip(), "stopped while it waited"
                return
            for image, said in make(*values):
                if session in stopped:
                    yield image, f"{said}; stopped"
                    return
                yield image, said

        def stop(request: gr.Request) -> None:
            stopped.add(str(request.session_hash))

        self.run.click(pressed, queue=False, api_visibility="private").then(
            run,
            [*inputs, *self.sampling],
            [self.picture, self.status],
            concurrency_limit=1,
            concurrency_id="generator",
            show_progress="minimal",
            api_visibility="private",
        )
        self.stop.click(stop, queue=False, api_visibility="private")


def build_page(studio: Studio, title: str) -> gr.Blocks:
    """The page, not yet served.

    Args:
        title: which run, which step.
    """
    with gr.Blocks(analytics_enabled=False, title=f"iomm: {title}", delete_cache=_FILES_S) as page:
        gr.Markdown(f"### {title}")
        with gr.Tab("Prompt"):
            _prompt_tab(studio)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(studio)
        with gr.Tab("Edit"):
            _edit_tab(studio)
    return page.queue(max_size=WAITING, default_concurrency_limit=2, api_open=False)


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Serve a page until `page.close()`; its address.

    Args:
        port: 0: any that is free.
    Raises:
        OSError: the port is taken, or no address of this machine has that name.
    """
    with socket.socket() as probe:  # Gradio looks at the loopback only, and says neither host nor port
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port}: {error}. Choose another --host or --port."
            ) from error
        port = probe.getsockname()[1]
    system = ["system-ui", "sans-serif"]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
        run_history=False,
        theme=Default(font=system, font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
    )
    return address


def _prompt_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=4000, elem_id="prompt")
            guidance = _guidance("Guidance scale", 3.0)
            controls_ = _controls("prompt", "Generate")
        _picture_column(controls_)

    def paint(prompt: str, guidance: float, steps: int, seed: float, method: Any) -> Iterator[Shown]:
        yield from _told(studio.paint, prompt, guidance, _sampling(steps, seed, method))

    controls_.on_run(paint, [prompt, guidance])


def _reconstruct_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            upload, ratio, grid = _masked_image(studio, "reconstruct")
            guidance = _guidance("Guidance scale", 1.0)
            controls_ = _controls("reconstruct", "Reconstruct")
        _picture_column(controls_)

    def reconstruct(
        file: str | None, grid: Any, guidance: float, steps: int, seed: float, method: Any
    ) -> Iterator[Shown]:
        sampling = _sampling(steps, seed, method)
        yield from _told(studio.reconstruct, _uploaded(file), _hidden(grid), guidance, sampling)

    controls_.on_run(reconstruct, [upload, grid, guidance])
    _follow_mask(studio, upload, ratio, grid, controls_)


def _edit_tab(studio: Studio) -> None:
    with gr.Row():
        with gr.Column():
            upload, ratio, grid = _masked_image(studio, "edit")
            instruction = gr.Textbox(label="Instruction", max_length=4000, elem_id="edit-instruction")
            with gr.Row():
                image_guidance = _guidance("Image guidance scale", 1.5)
                text_guidance = _guidance("Text guidance scale", 3.0)
            controls_ = _controls("edit", "Edit")
        _picture_column(controls_)

    def edit(
        file: str | None,
        instruction: str,
        grid: Any,
        image_guidance: float,
        text_guidance: float,
        steps: int,
        seed: float,
        method: Any,
    ) -> Iterator[Shown]:
        image, sampling = _uploaded(file), _sampling(steps, seed, method)
        scales = image_guidance, text_guidance
        yield from _told(studio.edit, image, instruction, _hidden(grid), *scales, sampling)

    controls_.on_run(edit, [upload, instruction, grid, image_guidance, text_guidance])
    _follow_mask(studio, upload, ratio, grid, controls_)


def _masked_image(studio: Studio, name: str) -> tuple[gr.Image, gr.Slider, gr.HTML]:
    with gr.Row():
        upload = gr.Image(
            label="Image",
            type="filepath",
            image_mode=None,  # the file as it is: the project's own decoder reads it
            sources=["upload", "clipboard"],
            buttons=["fullscreen"],
            height=260,
            min_width=200,
            elem_id=f"{name}-upload",
        )
        with gr.Column(min_width=200):
            grid = mask_grid(f"{name}-grid", studio.side_tokens)
    gr.Markdown("Paint on the grid to hide patch tokens or show them again.")
    ratio = gr.Slider(0, 1, 0.5, step=0.05, label="Mask ratio", elem_id=f"{name}-mask-ratio")
    return upload, ratio, grid


def _follow_mask(
    studio: Studio, upload: gr.Image, ratio: gr.Slider, grid: gr.HTML, controls_: _Controls
) -> None:
    """The grid shows the image as the model sees it, under a mask drawn anew with image, ratio and seed."""

    def draw(file: str | None, mask_ratio: float, seed: float | None) -> Any:
        hidden = studio.draw_mask(mask_ratio, _seed(seed))
        image = Image.new("RGB", (1, 1), "#888")
        if file is not None:
            image = shown(_or_message(studio.open, Path(file)))
        return grid_value(image, studio.side_tokens, hidden)

    gr.on(
        [upload.change, ratio.change, controls_.seed.change],
        draw,
        [upload, ratio, controls_.seed],
        grid,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )


def _controls(name: str, action: str) -> _Controls:
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", elem_id=f"{name}-steps")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id=f"{name}-seed")
        method = gr.Radio(["euler", "heun"], value="euler", label="Method")
    with gr.Row():
        run = gr.Button(action, variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop", elem_id=f"{name}-stop")
    picture = gr.Image(
        label="Picture",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],  # Gradio's "share" uploads the picture
        elem_id=f"{name}-picture",
        render=False,
    )
    status = gr.Markdown(elem_id=f"{name}-status", render=False)
    return _Controls(
        run=run, stop=stop, steps=steps, seed=seed, method=method, picture=picture, status=status
    )


def _picture_column(controls_: _Controls) -> None:
    with gr.Column():
        controls_.picture.render()
        controls_.status.render()


def _guidance(label: str, default: float) -> gr.Slider:
    return gr.Slider(0, 15, default, step=0.1, label=label)


def _sampling(steps: int, seed: float | None, method: Any) -> Sampling:
    return Sampling(seed=_seed(seed), steps=int(steps), method=method)


def _seed(value: float | None) -> int:
    if value is None:
        raise gr.Error("The seed is empty. Give a whole number.", print_exception=False)
    return int(value)


def _uploaded(file: str | None) -> Path:
    if file is None:
        raise gr.Error("There is no image yet. Upload one.")
    return Path(file)


def _hidden(grid: Any) -> str:
    """The mask in what a browser sent, whatever that is; `Studio` judges it."""
    return str(grid.get("hidden", "")) if isinstance(grid, dict) else ""


def _told(make: Callable[..., Iterator[Preview]], *arguments: Any) -> Iterator[Shown]:
    """Previews with what is said of them."""
    for preview in _or_message(make, *arguments):
        on_its_way = f"step {preview.step} of {preview.steps}, as estimated so far"
        said = "done" if preview.step == preview.steps else on_its_way
        yield preview.image, f"picture {preview.number}: {said}"


def _or_message[T](call: Callable[..., T], *arguments: Any) -> T:
    """What a call returns; of what the user gave wrongly a message on the page."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
