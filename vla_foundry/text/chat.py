"""Build prompts and tokenize them: turns, the templates that fill them, the layouts that format them, ids and targets.

A turn's text marks the position of each image with `<image>`. A layout formats turns as segments of text. Each segment
is tokenized separately, with the same code in training and inference, and the ids are concatenated. So the tokens of a
target are known exactly, and a prompt has the same ids whether its answer follows (training) or not (inference).
"""

import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from vla_foundry.parsing import parse_object
from vla_foundry.text.tokenizers import encode_text

# marks an image in all user text, whatever the model's own token is
IMAGE_MARKER = "<image>"

# the layout that uses the tokenizer's own chat template
CHAT_TEMPLATE = "chat_template"
# prompts whose ids a ChatTokenizer keeps
_MAX_CACHED = 10_000

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

# where a segment stands in its sequence: at the start, behind text, or behind an added token or an image
_Place = Literal["start", "text", "token"]

# stands for an answer when a chat template is rendered to see what it writes around one
_PLACEHOLDER = "Placeholder"


class Turn(NamedTuple):
    """One speaker's turn; `<image>` in the content stands for an image."""

    role: Role
    content: str


# formats turns; the second argument says whether to add the prompt for the next answer
Render = Callable[[Sequence[Turn], bool], str]


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


@lru_cache(maxsize=1024)
def template_fields(template: str) -> tuple[str, ...]:
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
    return tuple(name for name, _, _ in fields)


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
    raise ValueError(f"prompt {content!r} has <image> {num_markers} times, but the sample has {num_images} images.")


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


class TurnEnd(NamedTuple):
    """What a chat template writes after an answer to end the turn."""

    # "" if it writes nothing that a model could stop at
    text: str
    # the added token of the tokenizer that it ends with; "": none, it is plain text
    token: str = ""


def chat_template_segments(turns: Sequence[Turn], render: Render, find_end: Callable[[str], TurnEnd]) -> list[Segment]:
    """Format turns with a tokenizer's chat template.

    An answer is everything that the template writes after its prompt, up to and including the end of the turn: exactly
    what a model must generate. Where its text ends is known from rendering a placeholder in its place; the answer
    itself is never searched for, because its words may also occur in the end of the turn. An end in plain text is a
    segment of its own, so that its tokens do not depend on the answer.

    Args:
        turns: turns that alternate as the template requires.
        render: formats the first turns; the second argument says whether to add the prompt for the next answer.
        find_end: returns the turn's end from the text that the template writes after an answer.

    Raises:
        ValueError: the template rewrites earlier turns or drops answers, so that answers cannot be located; or a text
            holds the end of a turn.
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
        end = find_end(tail)
        mark = end.token or end.text.strip()
        if mark and any(mark in each.content for each in (turns if end.token else [turn])):
            raise ValueError(f"a text has {mark!r}, which ends a turn")
        segments.append(Segment(prompt[len(done) :], is_target=False))
        if end.token or not mark:
            segments.append(Segment(lead + content + end.text, is_target=True, ends_turn=not mark))
        else:
            segments += [Segment(lead + content, is_target=True), Segment(end.text, is_target=True)]
        # a template may end the whole conversation, too: what follows the end is read from the next prompt
        done = prompt + lead + content + end.text
    if turns[-1].role != "assistant":
        prompt = render(turns, True)
        if not prompt.startswith(done):
            raise ValueError("the tokenizer's chat template rewrites earlier turns. Use a prompt_layout such as chat.")
        segments.append(Segment(prompt[len(done) :], is_target=False))
    return segments


class ChatTokenizer:
    """Tokenize conversations with images.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        prompt_layout: a name in PROMPT_LAYOUTS, or "chat_template" for the tokenizer's own chat template.
        render: formats turns with a chat template; None: the tokenizer's, with `<image>` kept in the text.
        image_marker: marks an image in the output of `render`.

    Raises:
        ValueError: the layout is unknown, or the tokenizer lacks a chat template or end-of-sequence token.
    """

    def __init__(
        self, tokenizer: Any, *, prompt_layout: str, render: Render | None = None, image_marker: str = IMAGE_MARKER
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("data.tokenizer has no end-of-sequence token. Choose one that has.")
        self.tokenizer = tokenizer
        self.prompt_layout = prompt_layout
        self._layout = PROMPT_LAYOUTS.get(prompt_layout)
        self._render = render or self._render_text
        self._image_marker = image_marker if self._layout is None else IMAGE_MARKER
        self._cache: dict[tuple[str, _Place], list[int]] = {}
        # tokens that in user text would steer the model, and all that may end a turn
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = dict.fromkeys(tokenizer.all_special_tokens, True)
        self._control = _any_of(token for token, is_special in (added | special).items() if is_special)
        self._ends = self._control, _any_of(token for token in added if token.strip())
        self._added = frozenset(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        # called directly, because its wrapper takes three times as long; the wrapper resets these at every call
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        # a chat template writes the beginning-of-sequence token itself
        empty = tokenizer.encode("", add_special_tokens=True) if self._layout is not None else []
        self._begin = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        # tokenizers such as SentencePiece's put a space before a text, which its later segments must not get
        is_plain = self._backend.encode("a", add_special_tokens=False).tokens == ["a"]
        self._continuing = None if is_plain else _without_first_space(self._backend)
        if self._layout is None and (
            prompt_layout != CHAT_TEMPLATE or (render is None and not tokenizer.chat_template)
        ):
            choices = ", ".join([*PROMPT_LAYOUTS, *([CHAT_TEMPLATE] if tokenizer.chat_template else [])])
            raise ValueError(f"data.prompt_layout '{prompt_layout}' is unknown for this tokenizer. Use {choices}.")

    def stop_token_ids(self) -> list[int | tuple[int, ...]]:
        """Return the tokens that end an answer, beginning with what ends supervised answers.

        An end that a chat template writes in plain text is a tuple of its tokens.
        """
        last = self._segments([Turn("user", "a"), Turn("assistant", "a")])[-1]
        ids = [] if last.ends_turn else self._tokenize(last.text, True, "text")
        if len(ids) > 1 and ids[-1] not in self._added:
            return [tuple(ids), self.tokenizer.eos_token_id]
        return list(dict.fromkeys([*ids[-1:], self.tokenizer.eos_token_id]))

    def encode(
        self, turns: Sequence[Turn], image_tokens: Sequence[Sequence[int]], *, max_tokens: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """Tokenize turns; if the last turn is the user's, add the text that introduces an answer.

        Args:
            turns: the conversation; `<image>` in user turns marks the images, in order.
            image_tokens: the tokens that represent each image.
            max_tokens: truncate the sequence to this length, within the last answer.

        Returns:
            The ids, and whether each is a target: the answers and the tokens that end them.

        Raises:
            ValueError: markers and images differ in number, an answer is empty or has images, a text contains a control
                token of the tokenizer, or images and prompts leave no room for an answer within `max_tokens`.
        """
        self._check_turns(turns, len(image_tokens))
        ids, mask = list(self._begin), [False] * len(self._begin)
        remaining = iter(image_tokens)
        for segment in _join_prompts(self._segments(turns)):
            for number, text in enumerate(segment.text.split(self._image_marker)):
                new = list(next(remaining)) if number else []
                mask += [False] * len(new)
                ids += new
                follows = "text" if not number and ids[-1:] and ids[-1] not in self._added else "token"
                new = self._tokenize(text, segment.is_target, "start" if len(ids) == len(self._begin) else follows)
                mask += [segment.is_target] * len(new)
                ids += new
            if segment.ends_turn:
                ids.append(self.tokenizer.eos_token_id)
                mask.append(True)
        if next(remaining, None) is not None:
            raise ValueError("the chat template of data.processor left out an image. Use data.prompt_layout=chat.")
        return _cut(ids, mask, max_tokens)

    def _check_turns(self, turns: Sequence[Turn], num_images: int) -> None:
        num_markers = 0
        for turn in turns:
            pieces = turn.content.split(IMAGE_MARKER)
            if turn.role == "assistant" and (len(pieces) > 1 or not turn.content.strip()):
                raise ValueError("an answer is empty" if len(pieces) == 1 else "an answer has an image")
            num_markers += len(pieces) - 1
            for piece in pieces:
                if found := self._control.search(piece):
                    raise ValueError(f"a text has the control token {found.group()!r} of the tokenizer")
        if num_markers != num_images:
            raise ValueError(f"the turns have {IMAGE_MARKER} {num_markers} times, but there are {num_images} images")
        if not turns or not any(turn.role == "user" for turn in turns):
            raise ValueError("no turn is the user's")

    def _segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if self._layout is not None:
            return layout_segments(turns, self._layout)
        return chat_template_segments(turns, self._render, self._find_end)

    def _find_end(self, tail: str) -> TurnEnd:
        """Return the end of a turn: up to the first special token, else up to the first added one, else all words.

        A beginning-of-sequence token begins the next turn.
        """
        begin = self.tokenizer.bos_token
        if begin and begin != self.tokenizer.eos_token:
            tail = tail.partition(begin)[0]
        for pattern in self._ends:
            if found := pattern.search(tail):
                return TurnEnd(tail[: found.end()], found.group())
        return TurnEnd(tail.rstrip())

    def _render_text(self, turns: Sequence[Turn], announces: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=announces)

    def _tokenize(self, text: str, is_target: bool, place: _Place) -> list[int]:
        if not text:
            return []
        # prompts recur, answers do not
        ids = None if is_target else self._cache.get((text, place))
        if ids is None:
            if self._continuing is None or place == "start":
                ids = encode_text(self._backend, text)
            else:
                begin = encode_text(self._continuing, text) if place == "text" else []
                first = self._find_added(begin)
                ids = begin
                if place == "token" or first < len(begin):
                    # from its first added token on, the segment is as it would be anywhere else
                    ids = encode_text(self._backend, self.tokenizer.eos_token + text)[1:]
                    ids = begin[:first] + ids[self._find_added(ids) if begin else 0 :]
            if not is_target and len(self._cache) < _MAX_CACHED:
                self._cache[text, place] = ids
        return ids

    def _find_added(self, ids: Sequence[int]) -> int:
        return next((number for number, token in enumerate(ids) if token in self._added), len(ids))


def _without_first_space(backend: Any) -> Any:
    """Return a copy of a tokenizer that puts no space before a text."""
    never = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
    definition = parse_object(backend.to_str(), "the tokenizer")
    changed = {name: _replace_values(definition[name], never) for name in ("normalizer", "pre_tokenizer")}
    return type(backend).from_str(json.dumps(definition | changed))


def _replace_values(item: Any, values: Mapping[str, Any]) -> Any:
    """Return JSON with other values for some keys, wherever they are."""
    if isinstance(item, dict):
        return {key: values.get(key, _replace_values(value, values)) for key, value in item.items()}
    return [_replace_values(value, values) for value in item] if isinstance(item, list) else item


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match the longest of these tokens; nothing if there are none."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _join_prompts(segments: Sequence[Segment]) -> list[Segment]:
    """Join adjacent segments that are not supervised, so that they are tokenized as one text."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not segment.is_target and not joined[-1].is_target:
            joined[-1] = Segment(joined[-1].text + segment.text, is_target=False)
        else:
            joined.append(segment)
    return joined


def _cut(ids: list[int], mask: list[bool], max_tokens: int | None) -> tuple[list[int], list[bool]]:
    if max_tokens is None or len(ids) <= max_tokens:
        return ids, mask
    if not any(mask[:max_tokens]) or not all(mask[max_tokens:]):
        num_prompt = len(mask) - mask[::-1].index(False)
        raise ValueError(
            f"its images and prompts take {num_prompt} tokens, more than data.seq_len allows: {max_tokens}"
        )
    return ids[:max_tokens], mask[:max_tokens]
