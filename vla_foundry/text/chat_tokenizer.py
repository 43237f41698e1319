"""Tokenize turns into ids and a target mask, with the same code in training and inference.

Each segment is tokenized separately and the ids are concatenated. So the tokens of a target are known exactly, and the
prompt of an answer has the same ids whether the answer follows (training) or not (inference).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vla_foundry.text.chat_template import (
    IMAGE_MARKER,
    PROMPT_LAYOUTS,
    Segment,
    Turn,
    chat_template_segments,
    layout_segments,
)

CHAT_TEMPLATE = "chat_template"
_MAX_CACHED = 10_000

Render = Callable[[Sequence[Turn], bool], str]


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
        self._cache: dict[tuple[str, bool], list[int]] = {}
        self._control = _control_pattern(tokenizer)
        # called directly, because its wrapper takes three times as long; the wrapper resets these at every call
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        # a chat template writes the beginning-of-sequence token itself
        empty = tokenizer.encode("", add_special_tokens=True) if self._layout is not None else []
        self._begin = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        # SentencePiece tokenizers prepend a space to a text, which a segment within a sequence must not get
        anchored = tokenizer.encode(tokenizer.eos_token + "a", add_special_tokens=False)
        self._puts_space_first = tokenizer.encode("a", add_special_tokens=False) != anchored[1:]
        if self._layout is None and (
            prompt_layout != CHAT_TEMPLATE or (render is None and not tokenizer.chat_template)
        ):
            choices = ", ".join([*PROMPT_LAYOUTS, *([CHAT_TEMPLATE] if tokenizer.chat_template else [])])
            raise ValueError(f"data.prompt_layout '{prompt_layout}' is not there for this tokenizer. Use {choices}.")

    def stop_token_ids(self) -> list[int]:
        """Return the tokens that end an answer, beginning with the one that ends supervised answers."""
        ids, mask = self.encode([Turn("user", "a"), Turn("assistant", "a")], [])
        last = [token for token, is_target in zip(ids, mask, strict=True) if is_target][-1]
        return list(dict.fromkeys([last, self.tokenizer.eos_token_id]))

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
        if self._layout is not None:
            segments = layout_segments(turns, self._layout)
        else:
            segments = chat_template_segments(turns, self._render, self._end_of_control)
        ids, mask = list(self._begin), [False] * len(self._begin)
        remaining = iter(image_tokens)
        for segment in _join_prompts(segments):
            for number, text in enumerate(segment.text.split(self._image_marker)):
                new = list(next(remaining)) if number else []
                mask += [False] * len(new)
                ids += new
                new = self._tokenize(text, segment.is_target, len(ids) == len(self._begin))
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
            raise ValueError(f"the turns have {num_markers} times {IMAGE_MARKER}, but there are {num_images} images")
        if not turns or not any(turn.role == "user" for turn in turns):
            raise ValueError("the turns have none of a user")

    def _end_of_control(self, text: str, start: int) -> int | None:
        found = self._control.search(text, start)
        return found.end() if found else None

    def _render_text(self, turns: Sequence[Turn], announces: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=announces)

    def _tokenize(self, text: str, is_target: bool, is_first: bool) -> list[int]:
        if not text:
            return []
        # prompts recur, answers do not
        ids = None if is_target else self._cache.get((text, is_first))
        if ids is None:
            is_anchored = self._puts_space_first and not is_first
            anchor = self.tokenizer.eos_token if is_anchored else ""
            ids = self._backend.encode(anchor + text, add_special_tokens=False).ids[1 if is_anchored else 0 :]
            if not is_target and len(self._cache) < _MAX_CACHED:
                self._cache[text, is_first] = ids
        return ids


def _control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Match control tokens, which in user text would steer the model."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in control))


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
