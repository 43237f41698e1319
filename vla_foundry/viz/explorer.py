"""`vla-foundry data explore DATASET`: look at a robot dataset in the browser: episodes, windows, statistics, texts."""

import base64
import html
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.runs import ExploreParams
from vla_foundry.robotics.statistics_format import parse_statistics
from vla_foundry.run_folder import STATISTICS_NAME
from vla_foundry.serving.guard import Guard
from vla_foundry.storage.uri import exists, join_uri, parent_uri, read_text
from vla_foundry.viz.episodes import StoredEpisode, StoredEpisodes
from vla_foundry.viz.inspection import read_dataset_sample
from vla_foundry.viz.sample_figure import draw_sample

if TYPE_CHECKING:
    import gradio

_STATISTICS = ("field", "column", "mean", "std", "min", "max", "1%", "99%")
_LAUNCH: dict[str, Any] = {"server_name": "127.0.0.1", "quiet": True, "prevent_thread_lock": True, "footer_links": []}
_STYLE = (
    ".cameras img {height: 240px; margin: 2px; image-rendering: pixelated} figure {display: inline-block; margin: 4px}"
)


def main(argv: list[str]) -> None:
    """Run `vla-foundry data explore`.

    Raises:
        ValueError: gradio is not installed, or the dataset cannot be read.
        FileNotFoundError: the dataset does not exist.
    """
    params = parse_command(ExploreParams, argv, prog="vla-foundry data explore", positional=("dataset",))
    # before it is imported: it would report its use, and look for a newer version
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError(
            "explore needs gradio, which is not installed: uv pip install 'vla-foundry[dashboard]'."
        ) from None
    from starlette.middleware import Middleware

    blocks = create_blocks(Explorer(params.dataset))
    guard = {"middleware": [Middleware(Guard, password=None, is_local=True)]}
    try:
        _, address, _ = blocks.launch(**_LAUNCH, css=_STYLE, server_port=params.port or None, app_kwargs=guard)
    except OSError:
        raise ValueError(f"port {params.port} of this machine is in use. Give another, or --port 0.") from None
    sys.stdout.write(f"{params.dataset}: {address}\n")
    sys.stdout.flush()
    blocks.block_thread()


class Explorer:
    """What the page shows of a dataset.

    Args:
        folder: the dataset, or its manifest.

    Raises:
        ValueError: it is not a robot dataset of episodes.
        FileNotFoundError: it does not exist.
    """

    def __init__(self, folder: str) -> None:
        self._stored = StoredEpisodes(folder)
        self.episodes: list[StoredEpisode] = list(self._stored)
        self.name = folder
        lengths = [len(episode.info.anchors) for episode in self.episodes]
        # number of each episode's first sample
        self._firsts = np.cumsum([0, *lengths]).tolist()

    def list_episodes(self) -> list[list[Any]]:
        """Return a row for each episode: number, id, task, frames, seconds, instruction."""
        return [
            [
                number,
                info.episode_id,
                info.task or "",
                info.num_frames,
                round(info.num_frames / info.fps, 1),
                instruction,
            ]
            for number, (info, instruction) in enumerate((each.info, each.instruction) for each in self.episodes)
        ]

    def list_instructions(self) -> list[list[Any]]:
        """Return a row for each instruction: text, kind, episodes that have it."""
        counts: Counter[tuple[str, str]] = Counter()
        for episode in self.episodes:
            spans = [span.texts for span in episode.info.instructions]
            counts.update({(text, kind) for texts in spans for kind, given in texts.items() for text in given})
        return [[text, kind, count] for (text, kind), count in counts.most_common()]

    def list_statistics(self) -> list[list[Any]]:
        """Return a row for each column of each field; none without statistics."""
        place = join_uri(parent_uri(self._stored.manifest), STATISTICS_NAME)
        if not exists(place):
            return []
        rows: list[list[Any]] = []
        for name, found in parse_statistics(read_text(place), place).items():
            described = self._stored.spec.fields.get(name)
            columns = (found.mean, found.std, found.min, found.max, found.percentiles[1], found.percentiles[99])
            for column in range(len(found.mean)):
                label = described.label(column) if described is not None else str(column)
                rows.append([name, label, *(float(f"{values[column]:.5g}") for values in columns)])
        return rows

    def show_frame(self, number: int, frame: int) -> str:
        """Return the pictures of all colour cameras at a frame, as HTML."""
        episode = self.episodes[number]
        frame = min(frame, episode.info.num_frames - 1)
        figures = []
        for camera, about in episode.info.cameras.items():
            content = None if about.extension == "png" else episode.read_frame(camera, frame)
            if content is not None:
                data = base64.b64encode(content).decode()
                name = html.escape(camera)
                picture = f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
                figures.append(f"<figure>{picture}<figcaption>{name}</figcaption></figure>")
        return f"<div class=cameras>{''.join(figures) or 'no pictures'}</div>"

    def draw_fields(self, number: int, frame: int) -> "Any":
        """Return a figure of every field over an episode, with a line at a frame."""
        from matplotlib.figure import Figure

        episode = self.episodes[number]
        fields = episode.read_fields(list(self._stored.spec.fields))
        seconds = np.arange(episode.info.num_frames) / episode.info.fps
        figure = Figure(figsize=(10, 1.6 * max(len(fields), 1)), layout="constrained")
        axes = figure.subplots(max(len(fields), 1), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, values) in zip(axes, fields.items(), strict=False):
            unit = self._stored.spec.fields[name].unit
            axis.plot(seconds, values, linewidth=1)
            axis.axvline(frame / episode.info.fps, color="black", linewidth=0.8)
            title = f"{name}{f' ({unit})' if unit else ''}"
            axis.set_title(title, fontsize=8, loc="left", parse_math=False)
        axes[-1].set_xlabel("seconds")
        return figure

    def draw_window(self, number: int, frame: int) -> "Any":
        """Return a picture of the window whose anchor is the last one up to a frame, as (H, W, 3)."""
        from PIL import Image

        anchors = self.episodes[number].info.anchors
        place = max(0, int(np.searchsorted(anchors, frame, side="right")) - 1)
        sample = read_dataset_sample(self._stored.manifest, self._stored.spec, self._firsts[number] + place)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "window.png"
            draw_sample(sample, str(path))
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))


def create_blocks(explorer: Explorer) -> "gradio.Blocks":
    """Return the page."""
    import gradio as gr

    with gr.Blocks(title="Explorer", analytics_enabled=False) as blocks:
        gr.HTML(f"<h2>{html.escape(explorer.name)}: {len(explorer.episodes)} episodes</h2>")
        with gr.Tab("Episodes"):
            header = ["number", "episode", "task", "frames", "seconds", "instruction"]
            gr.Dataframe(explorer.list_episodes(), headers=header, interactive=False, max_height=240)
            with gr.Row():
                most = len(explorer.episodes) - 1
                number = gr.Number(0, label=f"Episode (0 to {most})", precision=0, minimum=0, maximum=most)
                frame = gr.Slider(0, explorer.episodes[0].info.num_frames - 1, 0, step=1, label="Frame", scale=4)
            about, cameras = gr.HTML(elem_id="about"), gr.HTML(elem_id="cameras")
            fields = gr.Plot(show_label=False)
        with gr.Tab("Windows"):
            gr.Markdown("The sample whose anchor is the chosen frame, with normalisation and masks.")
            draw = gr.Button("Draw the window at this frame", elem_id="draw")
            window = gr.Image(show_label=False, elem_id="window", buttons=["fullscreen"])
        with gr.Tab("Statistics"):
            gr.Dataframe(explorer.list_statistics(), headers=[*_STATISTICS], interactive=False)
        with gr.Tab("Instructions"):
            gr.Dataframe(explorer.list_instructions(), headers=["text", "kind", "episodes"], interactive=False)

        def choose(number: int) -> tuple[Any, str]:
            info, instruction = explorer.episodes[number].info, explorer.episodes[number].instruction
            return gr.Slider(
                maximum=info.num_frames - 1, value=0
            ), f"<b>{html.escape(info.episode_id)}</b>: {html.escape(instruction)}"

        def show(number: int, frame: int) -> tuple[str, Any]:
            return explorer.show_frame(number, int(frame)), explorer.draw_fields(number, int(frame))

        for event in (blocks.load, number.change):
            event(choose, number, [frame, about], show_progress="hidden").then(
                show, [number, frame], [cameras, fields], show_progress="hidden"
            )
        frame.release(show, [number, frame], [cameras, fields], show_progress="hidden")
        draw.click(lambda n, f: explorer.draw_window(n, int(f)), [number, frame], window)
    return blocks
