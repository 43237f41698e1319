"""Read what a sample says about its images: captions or a conversation, from its members txt and json."""

from typing import Any, NamedTuple

from vla_foundry.parsing import parse_record
from vla_foundry.text.chat import IMAGE_MARKER, Role, Turn

_CONVERSATION_KEYS = ("conversations", "messages")
# speaker names in third-party conversation files
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


class Unusable(ValueError):
    """Raised for images and texts that make no sample.

    Args:
        reason: a few words that failures are counted by.
        detail: what is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


class Texts(NamedTuple):
    """What a sample says about its images: a conversation, or else captions, of which training draws one."""

    conversation: list[Turn]
    captions: list[str]
    # whether the txt member is the caption
    is_txt: bool
    # the object in the JSON member; None: there is none
    values: dict[str, Any] | None


def read_texts(txt: bytes | None, values: bytes | None, *, key: str) -> Texts:
    """Read the text members of a sample, by the same rules in preprocessing and in training.

    A txt that is blank counts as missing. So does a JSON that is not an object, beside a txt.

    Args:
        txt: content of the txt member.
        values: content of the JSON member.
        key: key in the JSON of the caption or the list of captions.

    Raises:
        Unusable: they say nothing about the images, or are not text.
    """
    try:
        content: Any = None if txt is None else txt.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8", f"byte {error.start}") from None
    is_txt = bool(find_captions(content))
    facts = None if values is None else _parse_object(values)
    if values is not None and facts is None and not is_txt:
        raise Unusable("bad JSON", "it is not an object")
    if facts and not is_txt:
        content = facts.get(key)
    captions = find_captions(content)
    conversation = next((facts[name] for name in _CONVERSATION_KEYS if facts.get(name)), None) if facts else None
    turns = _parse_usable(conversation) if isinstance(conversation, list) else []
    if not captions and not turns:
        first = content[0] if isinstance(content, list) and content else content
        raise Unusable(_fault_of(first) or "no caption")
    return Texts(turns, captions, is_txt, facts)


def find_captions(value: Any) -> list[str]:
    """Return the captions in a text or a list of texts, stripped; those that cannot be trained on are left out."""
    return [text.strip() for text in (value if isinstance(value, list) else [value]) if _fault_of(text) is None]


def _fault_of(text: Any) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return "no caption"
    return find_damage(text, "the caption")


def find_damage(text: str, name: str = "the text") -> str | None:
    """Return why a text cannot be trained on, in a few words; None if it can."""
    try:
        return f"NUL bytes in {name}" if b"\0" in text.encode("utf-8") else None
    except UnicodeEncodeError:  # half of a surrogate pair
        return "not Unicode"


def _parse_object(data: bytes) -> dict[str, Any] | None:
    try:
        values = parse_record(data, "json")
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _parse_usable(conversation: list[Any]) -> list[Turn]:
    try:
        turns = parse_conversations(conversation)
    except ValueError as error:
        raise Unusable("bad conversation", str(error)) from None
    if not any(turn.role == "assistant" for turn in turns):
        raise Unusable("no caption", "its conversation has no answer")
    if fault := _fault_of("".join(turn.content for turn in turns)):
        raise Unusable(fault, "in its conversation")
    return turns


def parse_conversations(value: Any) -> list[Turn]:
    """Parse a `conversations` (or `messages`) list into turns, in any of the common forms.

    Each turn is `{"from": "human" | "gpt" | "system", "value": text}` or `{"role": ..., "content": text or parts}`,
    with parts `{"type": "text", "text": ...}`, and `{"type": "image"}` or "video", both marked by `<image>`.

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
    if kind in ("image", "image_url", "video", "video_url"):
        return IMAGE_MARKER
    raise ValueError(f"turn {number} of its conversations has a part that is neither text nor an image or video")
