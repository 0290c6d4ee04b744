"""The page of `zoo demo`, in Gradio: a picture, questions about it, two choices side by side, and what pruners keep.

Fonts are those of the visitor's system, and nothing is loaded from, or sent to, another address.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.inspection.demo import AS_LOADED, Demo, Side, Talk, examples
from zoo.registry import ZooError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
import gradio as gr

KEEP_SECONDS = 6 * 3600  # pictures of visitors are deleted after that

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0; }
#title p { margin: .1rem 0 0; opacity: .75; }
.kept p { font-size: .85rem; opacity: .8; margin: 0; min-height: 1.3rem; }
.side { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px !important; }
.side .block:has(input[type=range]:disabled) > * { opacity: .4; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #chat-a, #chat-b { order: -1; }
}
"""


def theme() -> Any:
    """Return the look of the page, without fonts from elsewhere."""
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Soft(primary_hue="teal", neutral_hue="slate", radius_size="md", font=fonts, font_mono=mono)


class Page:
    """The handlers of the page, between Gradio's values and those of `Demo`."""

    def __init__(self, demo: Demo) -> None:
        self.demo = demo

    def ask(self, talk: Talk, picture: str | None, question: str, compare: bool, *chosen: Any) -> Iterator[Any]:
        """Answer a question on each side: yields state, question, chats, X-rays and their captions."""
        sides = self.sides(compare, chosen)
        talk = talk if talk.picture == picture else Talk(picture)  # another picture begins another conversation
        keep, shown = gr.skip(), ([gr.skip()] * 2, [gr.skip()] * 2)
        try:
            for texts in self.demo.answer(talk, question, sides):
                yield talk, keep, *self.chats(talk, question, texts), *shown[0], *shown[1]
        except ZooError as error:
            raise gr.Error(str(error), duration=None) from error
        pictures, captions = self.xrays(picture, question, compare, *chosen)
        yield talk, "", *self.chats(talk), *pictures, *captions

    def chats(self, talk: Talk, question: str = "", texts: Any = ()) -> list[list[dict[str, str]]]:
        """Return the messages of both sides, with a turn that is being answered."""
        both = []
        for side in range(2):
            messages = []
            turns = [(t.question, t.answers) for t in talk.turns] + ([(question, list(texts))] if texts else [])
            for asked, answers in turns:
                if side < len(answers):
                    messages.append({"role": "user", "content": asked})
                    messages.append({"role": "assistant", "content": answers[side] or "..."})
            both.append(messages)
        return both

    def xrays(self, picture: str | None, question: str, compare: bool, *chosen: Any) -> tuple[list[Any], list[Any]]:
        """Return the X-rays of both sides and their captions; nothing without a picture."""
        pictures: list[Any] = [None, None]
        captions: list[Any] = ["", ""]
        for i, side in enumerate(self.sides(compare, chosen) if picture else []):
            try:
                pictures[i], captions[i] = self.demo.xray(picture, question, side)
            except ZooError as error:
                captions[i] = str(error).partition("\n")[0]
        return pictures, captions

    def xray(self, picture: str | None, question: str, model: str, pruner: str, ratio: float) -> tuple[Any, str]:
        """Return the X-ray of one side."""
        pictures, captions = self.xrays(picture, question, False, model, pruner, ratio)
        return pictures[0], captions[0]

    def show(self, talk: Talk, picture: str | None, compare: bool, *chosen: Any) -> list[Any]:
        """Begin a conversation about another picture: state, chats, X-rays and captions."""
        if talk.picture == picture:
            return [gr.skip()] * 7
        pictures, captions = self.xrays(picture, "", compare, *chosen)
        return [Talk(picture), [], [], *pictures, *captions]

    def renew(self, talk: Talk) -> list[Any]:
        """Begin a conversation about the same picture: state, question and chats."""
        return [Talk(talk.picture), "", [], []]

    def pick_model(self, model: str) -> tuple[Any, Any]:
        """Offer the pruners of a model."""
        pruners = self.demo.pruners[model]
        return gr.update(choices=pruners, value=AS_LOADED), self.ratio(model, AS_LOADED)

    def ratio(self, model: str, pruner: str) -> Any:
        """Enable the slider where the pruner has a keep ratio."""
        return gr.update(interactive=self.demo.has_ratio(Side(model, pruner)))

    def sides(self, compare: bool, chosen: tuple[Any, ...]) -> list[Side]:
        """Return the choices: model, pruner and keep ratio of each side."""
        both = [Side(*chosen[i : i + 3]) for i in range(0, len(chosen), 3)]
        return both[: 2 if compare else 1]


def build_page(demo: Demo, title: str) -> Any:
    """Return the page as Gradio's `Blocks`."""
    page = Page(demo)
    models = list(demo.models)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, KEEP_SECONDS)) as blocks:
        talk = gr.State(Talk())
        gr.Markdown(f"# {title}\nAsk about a picture, and watch what a pruner keeps of it.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                picture = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], height=280, label="Picture",
                    buttons=["fullscreen"], elem_id="picture",
                )  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="is there a red circle?", lines=1, max_lines=4, elem_id="question"
                )
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    fresh = gr.Button("Start over", elem_id="new", min_width=90)
                compare = gr.Checkbox(label="Compare two side by side", elem_id="compare")
                _examples(picture, question)
            with gr.Column(scale=8, min_width=320), gr.Row():
                first = _side(demo, "A", models[0], visible=True)
                second = _side(demo, "B", models[min(1, len(models) - 1)], visible=False)
        sides = (first, second)
        chosen = [part for side in sides for part in side.choice]
        chats, xrays, captions = ([getattr(side, name) for side in sides] for name in ("chat", "xray", "caption"))
        shown = [*xrays, *captions]

        asked: dict[str, Any] = {
            "inputs": [talk, picture, question, compare, *chosen],
            "outputs": [talk, question, *chats, *shown],
        }
        for trigger, name in ((send.click, "ask"), (question.submit, None)):
            trigger(
                page.ask, **asked, api_name=name, show_progress="hidden", api_visibility="public" if name else "private"
            )
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        picture.change(page.show, [talk, picture, compare, *chosen], [talk, *chats, *shown], **private)
        for trigger in (fresh.click, first.chat.clear, second.chat.clear):
            trigger(page.renew, [talk], [talk, question, *chats], **private)
        compare.change(lambda on: gr.update(visible=on), [compare], [second.column], **private).then(
            lambda *given: [*(found := page.xrays(*given))[0], *found[1]],
            [picture, question, compare, *chosen],
            shown,
            **private,
        )
        for side in sides:
            model, pruning, ratio = side.choice
            look = {"inputs": [picture, question, *side.choice], "outputs": [side.xray, side.caption], **private}
            model.change(page.pick_model, [model], [pruning, ratio], **private).then(page.xray, **look)
            pruning.input(page.ratio, [model, pruning], [ratio], **private).then(page.xray, **look)
            ratio.release(page.xray, **look)
    blocks.queue(default_concurrency_limit=8)
    return blocks


class _Column:
    """The components of one side."""

    column: Any
    choice: list[Any]
    chat: Any
    xray: Any
    caption: Any


def _side(demo: Demo, letter: str, model: str, visible: bool) -> _Column:
    """Make the components of one side: what is chosen, the conversation, and the X-ray."""
    side = _Column()
    low = letter.lower()
    with gr.Column(min_width=280, visible=visible, elem_id=f"side-{low}", elem_classes="side") as side.column:
        named = gr.Dropdown(
            list(demo.models),
            value=model,
            label=f"Model {letter}",
            visible=len(demo.models) > 1,
            elem_id=f"model-{low}",
        )
        with gr.Row():
            pruner = gr.Dropdown(
                demo.pruners[model], value=AS_LOADED, label="Pruner", min_width=120, elem_id=f"pruner-{low}"
            )
            ratio = gr.Slider(
                0.05, 1.0, 0.5, step=0.05, label="Keep", min_width=200, elem_id=f"ratio-{low}",
                interactive=demo.has_ratio(Side(model)),
            )  # fmt: skip
        side.choice = [named, pruner, ratio]
        side.chat = gr.Chatbot(
            label=f"Answers {letter}", height=260, render_markdown=False, buttons=[], show_label=False,
            elem_id=f"chat-{low}",             placeholder="Nothing asked yet", feedback_options=None,
        )  # fmt: skip
        gr.Markdown("What is kept", elem_classes="kept")  # a label of the image would cover its corner
        side.xray = gr.Image(
            label="What is kept", show_label=False, interactive=False, height=280, format="png", buttons=["fullscreen"],
            elem_id=f"xray-{low}",
        )  # fmt: skip
        side.caption = gr.Markdown("", elem_id=f"kept-{low}", elem_classes="kept")
    return side


def _examples(picture: Any, question: Any) -> None:
    """Offer drawn scenes, each with a question."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-demo-"))
    files, texts = [], []
    for i, (image, text) in enumerate(examples()):
        files.append(str(folder / f"scene-{i}.png"))
        image.save(files[-1])
        texts.append(text)
    gr.Markdown("Or one of these:", elem_classes="kept")
    gallery = gr.Gallery(
        files, show_label=False, columns=3, rows=1, height=150, object_fit="cover", allow_preview=False,
        interactive=False, buttons=[], elem_id="examples",
    )  # fmt: skip

    def take(chosen: gr.SelectData) -> tuple[str, str]:
        return files[chosen.index], texts[chosen.index]

    gallery.select(take, None, [picture, question], show_progress="hidden", api_visibility="private")


def launch(blocks: Any, host: str = "127.0.0.1", port: int = 0, share: bool = False, max_file_mb: int = 20) -> str:
    """Start the page in a thread of its own, and return its address.

    Args:
        blocks: from `build_page`.
        host: address to listen on.
        port: 0: a free one.
        share: also under a public address, by a tunnel of Gradio's.
        max_file_mb: size of a picture, in MiB.

    Raises:
        ZooError: the address cannot be listened on.
    """
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port or None,
            share=share,
            max_file_size=max_file_mb << 20,
            theme=theme(),
            css=CSS,
            footer_links=[],
            state_session_capacity=1000,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
    except OSError as error:
        raise ZooError(f"Cannot listen on {host}:{port or 'a free port'}: {error}") from error
    return str(public or local)
