"""Prompts as data: turns of a conversation, the templates they are filled from, and the layouts they are written in.

A turn's text marks the place of each image by `<image>`. A layout turns turns into segments of text; what is supervised
is a segment of its own, so that its tokens are known exactly and the prompt at inference is, token for token, the
beginning of what was trained on.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# stands for an image in every text a user writes, whatever the token of the model
IMAGE_MARKER = "<image>"

Role = Literal["system", "user", "assistant"]

# user turns that a caption answers; one is drawn per sample
CAPTION_PROMPTS: tuple[str, ...] = (
    "<image>Describe the image.",
    "<image>What does this image show?",
    "<image>Write a caption for this picture.",
    "<image>What can be seen here?",
)
# user turns of a robot policy
INSTRUCTION_PROMPTS: tuple[str, ...] = ("<image>{instruction}",)

# who speaks, in the conversation files that others write
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


class Turn(NamedTuple):
    """What one side says; `<image>` in the content stands for an image."""

    role: Role
    content: str


class Segment(NamedTuple):
    """A stretch of text that is tokenized by itself."""

    text: str
    # its tokens are targets
    is_target: bool
    # an end-of-sequence token follows, a target as well
    ends_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How turns are written where the tokenizer brings no chat template."""

    # before and after a system turn
    system: tuple[str, str]
    # before and after a user turn
    user: tuple[str, str]
    # what announces an answer: the end of the prompt at inference
    assistant: str
    # begins every answer and is a target; a space, so that its first word is tokenized as within a sentence
    answer: str
    # follows the end-of-sequence token where another turn comes
    between: str


PROMPT_LAYOUTS: dict[str, PromptLayout] = {
    # User: <image>Describe the image.
    # Assistant: A cat.<eos>
    "chat": PromptLayout(system=("", "\n"), user=("User: ", "\n"), assistant="Assistant:", answer=" ", between="\n"),
    # <image>Describe the image.
    # A cat.<eos>
    "plain": PromptLayout(system=("", "\n"), user=("", "\n"), assistant="", answer="", between="\n"),
    # <image>A cat.<eos>, for prompts without words
    "caption": PromptLayout(system=("", ""), user=("", ""), assistant="", answer="", between=""),
}


def template_fields(template: str) -> list[str]:
    """Return the names of the fields, `{name}`, of a prompt template.

    Raises:
        ValueError: a brace is not closed, or a field is more than a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt template {template!r} is broken: {error}. Write {{{{ for a brace.") from None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"prompt template {template!r} may only have fields like {{caption}}, got {{{name}}}.")
    return [name for name, _, _ in fields]


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Fill a prompt template; braces within the values stay as they are.

    Raises:
        ValueError: the template is broken, or has a field that is not among `fields`.
    """
    for name in template_fields(template):
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise ValueError(f"prompt template {template!r} has the unknown field {{{name}}}. Fields: {known}.")
    return template.format(**fields)


def place_images(content: str, num_images: int) -> str:
    """Return a user turn with one marker per image: before the text if it has none, and one for all if it has one.

    Raises:
        ValueError: it has several, but not one per image.
    """
    num_markers = content.count(IMAGE_MARKER)
    if num_markers == num_images:
        return content
    if num_markers == 0:
        return IMAGE_MARKER * num_images + content
    if num_markers == 1:
        return content.replace(IMAGE_MARKER, IMAGE_MARKER * num_images)
    raise ValueError(f"prompt {content!r} has {num_markers} times <image>, but the sample has {num_images} images.")


def create_user_turn(
    prompts: Sequence[str], fields: Mapping[str, str], *, num_images: int, seed: int, position: int
) -> Turn:
    """Draw one of the templates for the sample at a position of the plan, and fill it.

    Raises:
        ValueError: a field is unknown, or `<image>` is there more than once, but not once per image.
    """
    from vla_foundry.randomness import draw_index  # params read this file, and are parsed without numpy

    prompt = prompts[draw_index(len(prompts), seed=seed, position=position, purpose="text.prompt")]
    # the images' places come from the template alone, so that a value cannot bring markers in unseen
    return Turn("user", fill_template(place_images(prompt, num_images), fields))


def create_caption_turns(
    caption: str,
    prompts: Sequence[str] = CAPTION_PROMPTS,
    *,
    num_images: int = 1,
    seed: int,
    position: int,
    fields: Mapping[str, str] | None = None,
) -> list[Turn]:
    """Return the two turns of a captioned image: a drawn prompt, and the caption as its answer.

    Raises:
        ValueError: the caption is empty, or as `create_user_turn`.
    """
    caption = caption.strip()
    if not caption:
        raise ValueError("its caption is empty")
    user = create_user_turn(prompts, fields or {}, num_images=num_images, seed=seed, position=position)
    return [user, Turn("assistant", caption)]


def parse_conversations(value: Any) -> list[Turn]:
    """Read the turns of a `conversations` (or `messages`) list, in any of the forms that are about.

    Each turn is `{"from": "human" | "gpt" | "system", "value": text}` or `{"role": ..., "content": text or parts}`,
    with parts `{"type": "text", "text": ...}` and `{"type": "image"}`.

    Raises:
        ValueError: it is not such a list; the message names the turn.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"its conversations must be a list of turns, got {type(value).__name__}")
    return [_parse_turn(item, number) for number, item in enumerate(value)]


def _parse_turn(item: Any, number: int) -> Turn:
    if not isinstance(item, dict):
        raise ValueError(f"turn {number} of its conversations must be an object, got {type(item).__name__}")
    speaker = item.get("role", item.get("from"))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"turn {number} of its conversations has the unknown role {speaker!r}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(_parse_part(part, number) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"turn {number} of its conversations has no text")
    return Turn(role, content)


def _parse_part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        return IMAGE_MARKER
    raise ValueError(f"turn {number} of its conversations has a part that is neither text nor an image")


def layout_segments(turns: Sequence[Turn], layout: PromptLayout) -> list[Segment]:
    """Write turns in a layout; after a user turn at the end, the next answer is announced."""
    segments: list[Segment] = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            segments.append(Segment(layout.answer + turn.content, is_target=True, ends_turn=True))
            if number + 1 < len(turns):
                segments.append(Segment(layout.between, is_target=False))
            continue
        before, after = layout.system if turn.role == "system" else layout.user
        segments.append(Segment(before + turn.content + after, is_target=False))
        if turn.role == "user":
            segments.append(Segment(layout.assistant, is_target=False))
    return segments


def chat_template_segments(
    turns: Sequence[Turn], render: Callable[[Sequence[Turn], bool], str], end_of: Callable[[str, int], int | None]
) -> list[Segment]:
    """Write turns by a tokenizer's chat template.

    An answer is all that the template writes after the prompt for it, up to and with the token that ends the turn: just
    what a model has to generate.

    Args:
        turns: alternating as the template wants them.
        render: writes the first turns, and announces the next answer if the second argument says so.
        end_of: the end of the first control token in a text at or after a place, or None.

    Raises:
        ValueError: the template rewrites earlier turns or drops answers, so that no answer has a place of its own.
    """
    segments: list[Segment] = []
    done = ""
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt, whole = render(turns[:number], True), render(turns[: number + 1], False)
        answer = whole.removeprefix(prompt)
        start = answer.rfind(turn.content.strip())
        if not prompt.startswith(done) or not whole.startswith(prompt) or start < 0:
            raise ValueError(
                "the tokenizer's chat template does not write an answer right after the prompt for it. "
                "Use a prompt_layout such as chat instead of chat_template."
            )
        content_end = start + len(turn.content.strip())
        end = end_of(answer, content_end)
        segments.append(Segment(prompt[len(done) :], is_target=False))
        segments.append(Segment(answer[: end or content_end], is_target=True, ends_turn=end is None))
        segments.append(Segment(answer[end or content_end :], is_target=False))
        done = whole
    if turns[-1].role != "assistant":
        prompt = render(turns, True)
        if not prompt.startswith(done):
            raise ValueError("the tokenizer's chat template rewrites earlier turns. Use a prompt_layout such as chat.")
        segments.append(Segment(prompt[len(done) :], is_target=False))
    elif segments:
        segments.pop()  # nothing needs what follows the last answer
    return segments
