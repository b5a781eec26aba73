"""A page to draw on, or to drop a picture on: what the model answers, and how its blocks come to believe that, step by step.

    python -m noprop_dist.demo [MODEL] [--port 7860]

MODEL is a run's or a model's folder, or a model that comes with the program: digits, mnist (the default). The page is for this
machine alone, asks nothing of any other, and needs the extra: pip install 'noprop_dist[demo]'. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from noprop_dist import command
from noprop_dist.config import LOCAL_METHODS, UserError
from noprop_dist.data.picture import INKS, read_picture, to_pixels
from noprop_dist.model import NoPropModel
from noprop_dist.trained import load, settle

HOST = "127.0.0.1"
SHOWN = 10
"""Classes that are shown, at most: those most believed in."""
PACE = 0.25
"""Seconds that a step stays when they are played."""
LETTERS = 24
"""That fit above the steps, on a phone; names of some steps are left out where there are more."""
LARGEST = "64mb"
"""Of a picture that is dropped."""


class Beliefs(NamedTuple):
    """What is believed of an image in K steps; shares of the m classes."""

    heading: str
    """Of the steps."""
    steps: list[str]
    """K names: a block of DT, else a time. None for a baseline, which has the answer alone."""
    told: list[list[float]]
    """K + 1: what z tells at first, and after each step; the last is the answer."""
    said: list[list[float]]
    """K: what each step's û says."""


def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    parser = command.Parser("-m noprop_dist.demo", __doc__)
    parser.add_argument(
        "model", nargs="?", default="mnist", help="a run's or a model's folder, or a model's name (default: mnist)"
    )
    parser.add_argument("--port", type=port, help="where the page is served (default: the first that is free from 7860 on)")
    arguments = parser.parse_args(argv)
    model = settle(load(arguments.model))
    with tempfile.TemporaryDirectory() as scratch:
        # before gradio is imported: it tells nobody and keeps nothing; no proxy comes between it and its own page
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch, "NO_PROXY": "*", "no_proxy": "*"}
        try:
            import gradio
        except ImportError:
            raise UserError("demo: it needs gradio; pip install 'noprop_dist[demo]'") from None
        page = build(gradio, model)
        try:
            _, url, _ = page.launch(
                server_name=HOST, server_port=arguments.port, share=False, prevent_thread_lock=True, quiet=True,
                max_file_size=LARGEST, run_history=False, footer_links=[], css=CSS,
                theme=gradio.themes.Default(primary_hue="blue", font=FONT, font_mono=FONT),
            )  # fmt: skip
        except OSError:
            taken = f"{arguments.port} is taken" if arguments.port else "all from 7860 on are taken"
            raise UserError(f"--port: {taken}; name another one") from None
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)


def port(text: str) -> int:
    """A port that anyone may open, for argparse."""
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1024 to 65535")
    return int(text)


def build(gr: Any, model: NoPropModel) -> Any:
    """The page, as gradio's Blocks; ``gr`` is gradio."""
    classes = model.info.classes
    with gr.Blocks(title="NoProp: from noise to a label", analytics_enabled=False) as page:
        course, playing = gr.State(), gr.Timer(PACE, active=False)
        gr.HTML(_introduction(model))
        with gr.Row():
            with gr.Column(scale=4, min_width=300), gr.Tabs(selected="draw" if model.info.name in INKS else "drop"):
                with gr.Tab("Draw", id="draw"):
                    paper = gr.HTML(html_template=PAPER, js_on_load=PEN, apply_default_css=False, elem_id="paper")
                with gr.Tab("Drop a picture", id="drop"):
                    file = gr.File(file_types=["image"], show_label=False, height=180, elem_id="file")
            with gr.Column(scale=6, min_width=300):
                trouble = gr.HTML(visible=False)
                with gr.Row():
                    seen = gr.HTML(_seen(None), apply_default_css=False, min_width=150)
                    answer = gr.Label(num_top_classes=3, label="answer", elem_id="answer", scale=2, min_width=150)
                beliefs = gr.HTML(apply_default_css=False, elem_id="beliefs")
                with gr.Row(visible=False) as steps:
                    step = gr.Slider(0, 1, 0, step=1, label="steps taken", scale=4, elem_id="step", buttons=[])
                    again = gr.Button("play", scale=1, min_width=80)

        def name(image: Tensor | None, error: str = "") -> dict[Any, Any]:
            """What the page shows of a uint8 image (C, H, W), or without one."""
            shown = {
                trouble: gr.HTML(f'<p class="trouble" role="alert">{html.escape(error)}</p>', visible=bool(error)),
                seen: _seen(image), answer: None, beliefs: "", course: None, steps: gr.Row(visible=False),
                playing: gr.Timer(active=False),
            }  # fmt: skip
            if image is None:
                return shown
            confidences = model(image[None])[0].exp().tolist()
            found = believe(model, image, confidences)
            last = len(found.steps)
            return shown | {
                answer: dict(zip(classes, confidences, strict=True)),
                course: found,
                beliefs: draw(found, classes, 0),
                steps: gr.Row(visible=last > 0),
                step: gr.Slider(0, max(1, last), 0),
                playing: gr.Timer(active=last > 0),
            }

        def drawn(url: str) -> dict[Any, Any]:
            if not url:
                return name(None)
            with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]) as picture:
                return name(to_pixels(picture, model.info))

        def dropped(path: str | None) -> dict[Any, Any]:
            if not path:
                return name(None)
            try:
                return name(read_picture(path, model.info))
            except UserError as error:
                return name(None, str(error).replace(path, Path(path).name))

        def look(course: Beliefs | None, number: int, *, plays: bool = False) -> tuple[int, str, Any]:
            """The page after so many steps; ``plays``: more of them come by themselves."""
            last = len(course.steps) if course else 0
            number = min(number, last)
            return number, draw(course, classes, number) if course else "", gr.Timer(active=plays and number < last)

        def hold(course: Beliefs | None, number: int) -> tuple[str, Any]:
            """The page where the user has moved the steps to; they stay there."""
            return look(course, number)[1:]

        # one after the other, so that a step that is on its way does not end up in another picture's beliefs
        quiet = {"show_progress": "hidden", "concurrency_id": "page"}
        shown = [trouble, seen, answer, beliefs, course, steps, step, playing]
        for happens, widget, answered in ((paper.input, paper, drawn), (file.change, file, dropped)):
            happens(answered, widget, shown, trigger_mode="always_last", **quiet)
        looked = [step, beliefs, playing]
        step.input(hold, [course, step], looked[1:], trigger_mode="always_last", **quiet)
        again.click(lambda course: look(course, 0, plays=True), course, looked, **quiet)
        playing.tick(lambda course, number: look(course, number + 1, plays=True), [course, step], looked, **quiet)
    return page


def believe(model: NoPropModel, image: Tensor, answer: list[float]) -> Beliefs:
    """What is believed of a uint8 image (C, H, W) on the mean path, which gives the ``answer``."""
    discrete = model.card.method.name == "dt"
    heading = "what each block says" if discrete else "what the block in charge says, by time"
    course = model.course(image[None])
    if course is None:  # z is too large to keep
        return Beliefs(heading, [], [answer], [])
    return Beliefs(heading, list(course.steps), [*course.told[0, 0, :-1].tolist(), answer], course.said[0, 0].tolist())


def draw(beliefs: Beliefs, classes: Sequence[str], step: int) -> str:
    """HTML after so many steps: what each of them said of every class (a row), and what the label has become."""
    told, best = beliefs.told[step], max(beliefs.told[-1])
    peaks = [max(shares) for shares in zip(beliefs.told[-1], *beliefs.said, strict=True)]
    chosen = sorted(sorted(range(len(classes)), key=lambda index: -peaks[index])[:SHOWN])
    rows = []
    for index in chosen:
        cells = "".join(
            f'<td class="{"now" if number == step else ""}" title="{shares[index]:.1%}">'
            f'<i style="opacity: {shares[index] if number <= step else 0:.3f}"></i></td>'
            for number, shares in enumerate(beliefs.said, 1)
        )
        rows.append(
            f'<tr class="{"best" if beliefs.told[-1][index] == best else ""}"><th>{html.escape(classes[index])}</th>{cells}'
            f'<td class="bar"><b style="width: {told[index]:.1%}"></b><span>{told[index]:.0%}</span></td></tr>'
        )
    every = -(-sum(map(len, beliefs.steps)) // LETTERS) or 1
    heads = "".join(
        f'<th class="{"now" if number == step else ""}">{"" if (number - 1) % every else html.escape(name)}</th>'
        for number, name in enumerate(beliefs.steps, 1)
    )
    wide = min(12, max(len(classes[index]) for index in chosen)) + 2
    now = "the answer" if step == len(beliefs.steps) else "the label so far"
    said = f'<th colspan="{len(beliefs.steps)}">{beliefs.heading}</th>' if beliefs.steps else ""
    return (
        f'<table class="beliefs"><tr><th style="width: {wide}ch"></th>{said}<th>{now}</th></tr>'
        f"<tr><th></th>{heads}<th></th></tr>{''.join(rows)}</table>"
    )


def _introduction(model: NoPropModel) -> str:
    card, many = model.card, len(model.info.classes)
    known = ", ".join(model.info.classes[:SHOWN]) + (", …" if many > SHOWN else "")
    how = "This model was trained by ordinary back-propagation, so it has an answer, but no blocks to watch."
    if card.method.name in LOCAL_METHODS:
        how = (
            f"A network of {card.model.blocks} blocks, each trained alone: no gradient ever passed between them. Knowing "
            "nothing at first, they look at your picture one after the other; each cleans the noise off a label a little more."
            if card.model.blocks > 1
            else "One block that cleans noise off a label. Knowing nothing at first, it looks at your picture again and again, "
            "and each time cleans a little more."
        )
    return f"<h1>From noise to a label</h1><p>{how}</p><p>It knows: <b>{html.escape(known)}</b>.</p>"


def _seen(image: Tensor | None) -> str:
    """HTML: what the network sees."""
    if image is None:
        return '<figure class="seen"><div></div><figcaption>what the network sees</figcaption></figure>'
    buffer = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = "×".join(map(str, reversed(image.shape[1:])))
    return (
        f'<figure class="seen"><img alt="the picture as the network sees it" src="data:image/png;base64,{data}">'
        f"<figcaption>what the network sees: {size}</figcaption></figure>"
    )


PAPER = """
<canvas width="448" height="448" aria-label="paper to draw on"></canvas>
<p>Draw here with mouse or finger. <button type="button">clear</button></p>
"""
PEN = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const told = picture => { props.value = picture; trigger("input"); };
const blank = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const go = event => {
    const scale = canvas.width / canvas.clientWidth;
    pen.lineTo(event.offsetX * scale, event.offsetY * scale);
    pen.stroke();
};
pen.lineCap = pen.lineJoin = "round";
pen.lineWidth = canvas.width / 14;
blank();
canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); pen.beginPath(); go(event); };
canvas.onpointermove = event => { if (event.buttons) go(event); };
canvas.onpointerup = () => told(canvas.toDataURL());
element.querySelector("button").onclick = () => { blank(); told(""); };
"""
FONT = ("system-ui", "sans-serif")
CSS = """
#paper canvas { width: 100%; background: white; border: 1px solid var(--border-color-primary); border-radius: 6px;
    touch-action: none; cursor: crosshair; display: block }
#paper p { display: flex; justify-content: space-between; margin: 8px 2px }
#paper button { text-decoration: underline; cursor: pointer }
#file .download { display: none }
.seen { margin: 0; text-align: center }
.seen img, .seen div { width: min(140px, 100%); margin: 0 auto; image-rendering: pixelated; border-radius: 6px }
.seen div { aspect-ratio: 1; background: #8882 }
.seen figcaption { font-size: 12px; opacity: .7; margin-top: 4px }
.trouble { border-left: 4px solid #D55E00; padding: 8px 12px; background: #D55E0018 }
.beliefs { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 3px; font-size: 13px }
.beliefs th { font-weight: normal; padding: 1px 0; text-align: center }
.beliefs tr:nth-child(2) th { font-size: 11px; text-wrap: nowrap }
@media (max-width: 640px) { .beliefs tr:nth-child(2) th { font-size: 9px } }
.beliefs th:first-child { text-align: right; padding-right: 4px; overflow: hidden; text-overflow: ellipsis; text-wrap: nowrap }
.beliefs th:last-child { width: 36% }
.beliefs td { background: #8882; height: 22px; padding: 0; border-radius: 3px; overflow: hidden }
.beliefs i { display: block; height: 22px; background: #0072B2 }
.beliefs td.now, .beliefs th.now { box-shadow: 0 0 0 2px #E69F00 }
.beliefs .bar { position: relative }
.beliefs .bar b { position: absolute; inset: 0 auto 0 0; background: #E69F00 }
.beliefs .bar span { position: absolute; right: 6px; top: 2px }
.beliefs .best th, .beliefs .best span { font-weight: bold }
"""


if __name__ == "__main__":
    command.run(main)
