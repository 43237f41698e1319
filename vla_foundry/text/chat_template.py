"""Build prompts: the turns of a conversation, the templates that fill them, and the layouts that format them.

A turn's text marks the position of each image with `<image>`. A layout formats turns as segments of text. Supervised
text gets its own segments, so that its tokens are known exactly, and the prompt at inference matches the beginning of
the training sequence token for token.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# marks an image in all user text, whatever the model's own token is
IMAGE_MARKER = "<image>"

Role = Literal["system", "user", "assistant"]

# user turns for captions; one is drawn per sample
CAPTION_PROMPTS: tuple[str, ...] = (
    "<image>Describe the image.",
    "<image>What does this image show?",
    "<image>Write a caption for this picture.",
    "<image>What can be seen here?",
)
# user turns of a robot policy
INSTRUCTION_PROMPTS: tuple[str, ...] = ("<image>{instruction}",)

# stands for an answer when a chat template is rendered to see what it writes around one
_PLACEHOLDER = "Placeholder"

# speaker names in third-party conversation files
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


class Turn(NamedTuple):
    """One speaker's turn; `<image>` in the content stands for an image."""

    role: Role
    content: str


class Segment(NamedTuple):
    """A piece of text that is tokenized separately."""

    text: str
    # True if its tokens are targets
    is_target: bool
    # True if an end-of-sequence token follows, which is also a target
    ends_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How to format turns without the tokenizer's chat template."""

    # text before and after a system turn
    system: tuple[str, str]
    # text before and after a user turn
    user: tuple[str, str]
    # text that introduces an answer: the end of the prompt at inference
    assistant: str
    # start of every answer, also a target; a space, so that the first word is tokenized as in mid-sentence
    answer: str
    # text after the end-of-sequence token if another turn follows
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
    """Return the names of the `{name}` fields in a prompt template.

    Raises:
        ValueError: a brace is not closed, or a field is not a plain name.
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
    """Fill a prompt template; braces within the values are kept.

    Raises:
        ValueError: the template is malformed, or has a field that is not in `fields`.
    """
    for name in template_fields(template):
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise ValueError(f"prompt template {template!r} has the unknown field {{{name}}}. Fields: {known}.")
    return template.format(**fields)


def place_images(content: str, num_images: int) -> str:
    """Return a user turn with one marker per image.

    Without a marker, all markers go before the text; a single marker is repeated for all images.

    Raises:
        ValueError: the turn has several markers, but not one per image.
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
    """Draw a template for the sample at a position of the plan, and fill it.

    Raises:
        ValueError: a field is unknown, or `<image>` occurs more than once, but not once per image.
    """
    from vla_foundry.randomness import draw_index  # lazy: params import this file and must not need numpy

    prompt = prompts[draw_index(len(prompts), seed=seed, position=position, purpose="text.prompt")]
    # image positions come from the template alone, so that a field value cannot smuggle in markers
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
        ValueError: the caption is empty, or see `create_user_turn`.
    """
    caption = caption.strip()
    if not caption:
        raise ValueError("its caption is empty")
    user = create_user_turn(prompts, fields or {}, num_images=num_images, seed=seed, position=position)
    return [user, Turn("assistant", caption)]


def parse_conversations(value: Any) -> list[Turn]:
    """Parse a `conversations` (or `messages`) list into turns, in any of the common forms.

    Each turn is `{"from": "human" | "gpt" | "system", "value": text}` or `{"role": ..., "content": text or parts}`,
    with parts `{"type": "text", "text": ...}` and `{"type": "image"}`.

    Raises:
        ValueError: the value is not such a list; the message names the turn.
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
    """Format turns in a layout; if the last turn is the user's, add the text that introduces an answer."""
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
    """Format turns with a tokenizer's chat template.

    An answer is everything that the template writes after its prompt, up to and including the token that ends the turn:
    exactly what a model must generate. Where its text ends is known from rendering a placeholder in its place; the
    answer itself is never searched for, because its words may also occur in the token that ends the turn.

    Args:
        turns: turns that alternate as the template requires.
        render: formats the first turns; the second argument says whether to add the prompt for the next answer.
        end_of: returns the end of the first control token in a text at or after a position, or None.

    Raises:
        ValueError: the template rewrites earlier turns or drops answers, so that answers cannot be located.
    """
    segments: list[Segment] = []
    done = ""
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt, whole = render(turns[:number], True), render(turns[: number + 1], False)
        placed = render([*turns[:number], Turn("assistant", _PLACEHOLDER)], False)
        answer = whole.removeprefix(prompt)
        lead, _, tail = placed.removeprefix(prompt).partition(_PLACEHOLDER)
        content = answer.removeprefix(lead).removesuffix(tail)
        is_placed = whole == prompt + lead + content + tail and content.strip() == turn.content.strip()
        if not (is_placed and prompt.startswith(done)):
            raise ValueError(
                "the tokenizer's chat template does not write an answer right after the prompt for it. "
                "Use a prompt_layout such as chat instead of chat_template."
            )
        content_end = len(lead + content)
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
        segments.pop()  # text after the last answer is not needed
    return segments
