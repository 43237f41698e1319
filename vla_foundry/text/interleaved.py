"""Read and tokenize documents of text and images in order, in the layouts of public datasets.

| layout  | JSON                                                                                                       |
|---------|------------------------------------------------------------------------------------------------------------|
| parts   | `{"parts": [{"text": "A cat."}, {"image": "image_0.jpg"}, ...]}`; also `{"type": "image"}`: the next image |
|         | and "video" like "image"                                                                                   |
| OBELICS | `{"texts": ["A cat.", null], "images": [null, "image_0.jpg"]}`: lists of one length, one value per place   |
| MMC4    | `{"text_list": ["A cat."], "image_info": [{"image_name": "a.jpg", "matched_text_index": 0}]}`: each image  |
|         | goes before the sentence that it matches                                                                   |

Texts of OBELICS that follow each other are joined by a blank line, those of MMC4 by a space, and parts by nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from vla_foundry.text.captions import Unusable, find_damage
from vla_foundry.text.chat import IMAGE_MARKER, ChatTokenizer, Turn

_Values: TypeAlias = dict[str, Any]


class Picture(NamedTuple):
    """The place of an image in a document."""

    # as the document names it; None: the next one
    name: str | None


# a text, or the place of an image
Part: TypeAlias = "str | Picture"


def read_document(values: Any) -> list[Part]:
    """Return a document's parts in order, no two texts in a row.

    Raises:
        Unusable: it has none of the layouts, holds no text, or a text is damaged.
    """
    if not isinstance(values, dict):
        raise Unusable("bad JSON", "it is not an object")
    found = next((layout for layout in LAYOUTS if all(isinstance(values.get(key), list) for key in layout)), None)
    if found is None:
        wanted = ", or ".join(" and ".join(layout) for layout in LAYOUTS)
        raise Unusable("no document", f"its JSON has no lists {wanted}, only {', '.join(sorted(values)) or 'no key'}")
    read, separator = LAYOUTS[found]
    parts: list[Part] = []
    for part in read(values):
        last = parts[-1] if parts else None
        if isinstance(part, str) and isinstance(last, str):
            parts[-1] = last + separator + part
        else:
            parts.append(part)
    texts = [part for part in parts if isinstance(part, str)]
    if not any(text.strip() for text in texts):
        raise Unusable("no text")
    for text in texts:
        if damage := find_damage(text):
            raise Unusable(damage)
    return parts


def _read_parts(values: _Values) -> Iterable[Part]:
    for number, part in enumerate(values["parts"]):
        keys = ("text", "image", "video", "type")
        text, image, video, kind = (part.get(key) if isinstance(part, dict) else None for key in keys)
        name = video if image is None else image
        if isinstance(text, str) and name is None:
            yield from [text] if text else []
        elif text is None and (isinstance(name, str) or (name is None and kind in ("image", "video"))):
            yield Picture(name)
        else:
            raise Unusable("bad document", f'parts[{number}] is neither {{"text": ...}} nor {{"image": "a name"}}')


def _read_parallel(values: _Values) -> Iterable[Part]:
    texts, images = values["texts"], values["images"]
    if len(texts) != len(images):
        raise Unusable("bad document", f"it has {len(texts)} texts and {len(images)} images; null fills the gaps")
    for number, (text, name) in enumerate(zip(texts, images, strict=True)):
        if text and name:
            raise Unusable("bad document", f"texts[{number}] and images[{number}] are both given: one must be null")
        for value in (text, name):
            if value is not None and not isinstance(value, str):
                raise Unusable("bad document", f"entry {number} is of type {type(value).__name__}, not a text")
        if text or name:
            yield text or Picture(name)


def _read_matched(values: _Values) -> Iterable[Part]:
    texts = values["text_list"]
    images: list[list[Picture]] = [[] for _ in texts]
    for number, image in enumerate(values["image_info"]):
        name, place = (image.get(key) if isinstance(image, dict) else None for key in ("image_name", _PLACE))
        if type(place) is not int or not 0 <= place < len(texts) or not isinstance(name, str | None):
            raise Unusable("bad document", f"image_info[{number}] has no {_PLACE} below {len(texts)}")
        images[place].append(Picture(name))
    for number, (text, before) in enumerate(zip(texts, images, strict=True)):
        if not isinstance(text, str):
            raise Unusable("bad document", f"text_list[{number}] is of type {type(text).__name__}, not a text")
        yield from [*before, *([text] if text else [])]


_PLACE = "matched_text_index"
# keys that hold lists -> (reads the parts, joins neighbouring texts)
LAYOUTS: dict[tuple[str, ...], tuple[Callable[[_Values], Iterable[Part]], str]] = {
    ("parts",): (_read_parts, ""),
    ("texts", "images"): (_read_parallel, "\n\n"),
    ("text_list", "image_info"): (_read_matched, " "),
}


def place_pictures(parts: Iterable[Part], names: list[str]) -> list[Part]:
    """Return the parts with the name of a stored image at each place.

    Names that are not all among the stored ones (they may be URLs) stand for these in order.

    Args:
        parts: the document.
        names: the stored images, in order.

    Raises:
        Unusable: they differ in number.
    """
    parts = list(parts)
    wanted = [part.name for part in parts if isinstance(part, Picture)]
    if all(name in names for name in wanted):
        return parts
    if len(wanted) != len(names):
        missing = next(name for name in wanted if name not in names)
        which = "an image" if missing is None else f"image {missing[:200]!r}"
        raise Unusable("missing image", f"it names {which} and {len(wanted)} in all, and has {len(names)} images")
    stored = iter(names)
    return [part if isinstance(part, str) else Picture(next(stored)) for part in parts]


class DocumentTokenizer(ChatTokenizer):
    """Tokenize conversations, and documents of text and images; see `ChatTokenizer`."""

    def encode_document(
        self,
        parts: Sequence[str | None],
        image_tokens: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        is_whole: bool = True,
        begins_after_images: bool = False,
    ) -> tuple[list[int], list[bool], int]:
        """Tokenize text and images in order; all text is a target, and nothing else.

        A longer document ends within a text, or behind the last text before an image that does not fit.

        Args:
            parts: texts, and None where the next image goes.
            image_tokens: the tokens that represent each image.
            max_tokens: most tokens.
            is_whole: an end-of-sequence token follows; it is a target, too.
            begins_after_images: the beginning-of-sequence token follows the images that the document begins with.

        Returns:
            The ids, whether each is a target, and the number of images among them.

        Raises:
            ValueError: a text contains a control token of the tokenizer, or its first images leave no room for text.
        """
        ids: list[int] = []
        mask: list[bool] = []
        num_images = kept = num_kept = 0
        for kind, tokens in self._pieces(parts, iter(image_tokens), is_whole, begins_after_images):
            room = max_tokens - len(ids)
            if room <= 0 or (kind == "image" and len(tokens) > room):
                break
            ids += tokens[:room]
            mask += [kind == "text"] * (len(ids) - len(mask))
            num_images += kind == "image"
            if kind == "text" and tokens:
                kept, num_kept = len(ids), num_images
        if not any(mask[1:kept]):
            raise ValueError(f"its images leave no room for text within data.seq_len + 1 = {max_tokens} tokens")
        return ids[:kept], mask[:kept], num_kept

    def _pieces(
        self, parts: Sequence[str | None], images: Iterator[Sequence[int]], is_whole: bool, begins_after_images: bool
    ) -> Iterator[tuple[Literal["text", "image", "begin"], list[int]]]:
        bos, last = self.tokenizer.bos_token_id, None
        empty = self.tokenizer.encode("", add_special_tokens=True)[:1]
        is_begun = not begins_after_images and empty != [bos]
        before, after = (self._tokenize(text, False, "token") for text in self._around_image())
        for part in parts:
            if not is_begun and not (begins_after_images and part is None):
                is_begun, last = True, bos
                yield "begin", [bos]
            if part is None:
                tokens = [*before, *next(images), *after]
                yield "image", tokens
            else:
                if found := self._control.search(part):
                    raise ValueError(f"a text has the control token {found.group()!r} of the tokenizer")
                is_first = last is None or last == bos
                tokens = self._tokenize(part, True, "start" if is_first else "token" if last in self._added else "text")
                yield "text", tokens
            last = tokens[-1] if tokens else last
        if is_whole:
            yield "text", [self.tokenizer.eos_token_id]

    def _around_image(self) -> tuple[str, str]:
        """Return what a chat template writes before and after an image between two texts."""
        if self._layout is not None:
            return "", ""
        written = self._render([Turn("user", f"Before{IMAGE_MARKER}After")], False)
        before, marker, after = written.partition("Before")[2].partition("After")[0].partition(self._image_marker)
        return (before, after) if marker else ("", "")
