"""`vla-foundry evaluate captions`: BLEU, ROUGE-L and CIDEr-D of captions, as the COCO evaluation code computes them.

Captions are cut into tokens as Stanford's PTBTokenizer does, in lower case and without punctuation. The figures equal
those of pycocoevalcap; its METEOR and SPICE need Java and are left out.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.results import check_output, publish_table
from vla_foundry.params.commands.evaluation import CaptionScoreParams
from vla_foundry.progress import show_progress
from vla_foundry.storage.uri import exists, is_remote, join_uri, read_bytes, read_json, read_object, write_text

_ORDERS = (1, 2, 3, 4)
_BETA = 1.2
_SIGMA = 6.0
# they keep a score without matches just above 0, as in the reference
_TINY, _SMALL = 1e-15, 1e-9
_NUM_RESAMPLES = 1000

_EXTRAS = "\u0300-\u036f\u064b-\u0652\u0900-\u0dff\u0e31-\u0e4e"
_LETTER = r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u2189\u2460-\u24ff\U00010000-\U0010ffff]"
_WORD = rf"{_LETTER}(?:{_LETTER}|[\d{_EXTRAS}])*"
_ALNUM = rf"(?:{_LETTER}|[\d{_EXTRAS}])"
_APOSTROPHE = "['\u2019]"
_END = rf"(?!{_ALNUM})"
# they keep their full stop
_ABBREVIATIONS = (
    "al cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm adj adm adv ala apr aug ave bhd cie "
    "col cos cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc ind jan jos jul jun kan ltd maj "
    "mar mfg mme mon mrs mtg neb nev nov oct pfc plc pte pty pvt rep rev sen sep seq sfc sgt spc ste sys tel thu "
    "tue wed wis wyo alex ariz assn asst atty bldg blvd brig bros capt cmdr colo conn corp dept elec govs insp intl "
    "invt kans mich minn mlle mont msgr natl okla penn ppte ppty pres prof ptes ptys reps sens sept supt tenn tues "
    "univ wisc calif messrs comdr treas profs thurs assoc bancorp"
).replace(" ", "|")
# words that begin a sentence after a letter with a full stop
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
).replace(" ", "|")
# tokens that may begin at a place: the longest counts, of equals the first; groups are tokens of their own
_RULES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # contractions
        rf"(?:(can)(not)|(gon)(na)|(got)(ta)|(lem)(me)|(gim)(me)|(wan)(na)){_END}",
        rf"('t)(is|was){_END}",
        rf"({_LETTER}+?)??(n{_APOSTROPHE}t){_END}",
        rf"({_APOSTROPHE}(?:[msd]|re|ve|ll)){_END}",
        # words with apostrophes
        rf"{_APOSTROPHE}(?:n{_APOSTROPHE}|n(?= )|(?:em|till?|cause){_END})",
        rf"{_APOSTROPHE}[2-9]0s|(?<!\d){_APOSTROPHE}\d\d{_END}",
        rf"[dol]{_APOSTROPHE}(?!s{_END}){_WORD}(?:-{_ALNUM}+)*",
        rf"n{_APOSTROPHE}{_LETTER}{{2}}{_LETTER}*",
        rf"[ldj]{_APOSTROPHE}(?!s{_END})|y{_APOSTROPHE}(?={_LETTER})",
        rf"(?:somethin|ol){_APOSTROPHE}",
        rf"(?:c{_APOSTROPHE}mon|s{_APOSTROPHE}mores|nor{_APOSTROPHE}easter|e{_APOSTROPHE}er|(?:li|nat){_APOSTROPHE}l){_END}",
        rf"{_LETTER}+[aeiouy]{_APOSTROPHE}[aeiou]{_LETTER}*",
        # web
        r"https?://[^\s\"<>|(){}\[\]]+[^\s\"<>|.!?(){},\[\]-]",
        r"(?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-z]{2,4}|(?:[^\s\"`'<>|.!?(){},$_-]+\.)+(?:com|net|org|edu))"
        rf"(?:/[^\s\"<>|().!?{{}},]+)*{_END}",
        r"[a-z0-9][^\s\"<>|(){}@,;:'!?]*@(?:[a-z0-9-]+\.)*[a-z0-9-]+",
        r"[@#][a-z_]\w*",
        r"</?[a-z][a-z0-9:.-]*(?: +[a-z]+(?:=\"[^\"]*\")?)* ?/?>",
        r"&(?:amp|lt|gt|quot|apos|nbsp);",
        r"&(?:#\d+|[a-z]+(?:acute|grave|uml));",
        rf"(?-i:[<>]?[:;=][-o*']?(?:[DPdpO](?!{_ALNUM})|[()\\{{@|\[\]]))|\^_\^",
        # abbreviations and acronyms
        rf"(?:{_ABBREVIATIONS})\.(?!{_LETTER})",
        r"(?:ca|no|op|pp|art|fig|nos|figs|prop)\.(?=\s*\d)",
        rf"(?:{_LETTER}(?:\.{_LETTER})+|ph\.d)\.(?!{_LETTER})|{_LETTER}\.(?=[\s\d]|$)(?!\s+(?-i:{_STARTERS})\s)",
        rf"{_ALNUM}+(?:-{_ALNUM}+)*\.(?=[,;:])",
        r"(?-i:[A-Z]+(?:&[A-Z]+)+|[A-Z]+\$)|c(?:\+\+|#)",
        # numbers
        r"\(\d{2,3}\)[ \u00a0]?\d{3,4}-\d{4}",
        rf"\d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}{_END}",
        rf"(?:\d{{1,4}}[- \u00a0])?\d{{1,4}}/\d{{1,4}}{_END}",
        r"[-+]?\d*(?:[.:,]\d+)+|[-+]?\d+",
        # words
        rf"{_WORD}(?:[.!?]{_WORD})*",
        r"[a-z0-9][a-z0-9.,]*(?:[-\u2010\u2011][a-z0-9]+)+",
        rf"{_ALNUM}+(?:[-_/\u2010\u2011]{_ALNUM}+)*",
        # what else repeats
        r"<<|>>|[!?]+|-+|\*+|_+|@+|#+",
    )
]
_CONTRACTED = re.compile("n?\u2019(?:[tmsd]|re|ve|ll)", re.IGNORECASE)
_UNKNOWN = ("Cc", "Cf", "Cn", "Co", "Cs", "Mn", "Me", "Lm", "Nl")
_PLAIN = re.compile(r"[A-Za-z]+(?=[ \n]|$)")
_SPLIT = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_SPELLED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    " ": "\u00a0",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "\u20ac": "$",
    "\u00a3": "#",
    "\u00a4": "$",
    "\u00a2": "cents",
}
_LEFT_OUT = {
    *"'\"`.?!,:;-\u2018\u2019\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a\u2010\u2011\u2013\u2014\u2015\u2026",
    *("--", "---", "----", "&quot;", "&apos;", "&nbsp;"),
}


def tokenize(captions: Sequence[str]) -> list[str]:
    """Return each caption's tokens in lower case, without punctuation, joined by spaces.

    As in the reference, "no." or a letter with a full stop that ends a caption is read with the beginning of the next.
    """
    text = "\n".join(" ".join(caption.replace("\u00ad", "").splitlines()) for caption in captions)
    lines: list[list[str]] = [[]]
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain is not None and plain[0].lower() not in _SPLIT:
            lines[-1].append(plain[0].lower())
            place = plain.end()
            continue
        if text[place] == "\n":
            lines.append([])
        found = [match for rule in _RULES if (match := rule.match(text, place))]
        if not found:
            lines[-1] += _spell(text[place])
            place += 1
            continue
        longest = max(found, key=lambda match: match.end())
        lines[-1] += [word for part in (longest.groups() or (longest[0],)) if part for word in _spell(part)]
        place = longest.end()
    return [" ".join(token for token in line if token not in _LEFT_OUT) for line in lines]


def _spell(token: str) -> list[str]:
    """Return a token as the tokenizer writes it; no word for what it does not know."""
    if len(token) == 1 and (unicodedata.category(token) in _UNKNOWN or ord(token) > 0xFFFF or token.isspace()):
        return []
    if _CONTRACTED.fullmatch(token):
        token = token.replace("\u2019", "'")
    for written, spelled in _SPELLED.items():
        token = token.replace(written, spelled)
    if len(token) == 1 and unicodedata.decomposition(token).startswith("<fraction>"):
        token = unicodedata.normalize("NFKC", token).replace("\u2044", "/")
    return [token.lower()]


NGrams = Counter[tuple[str, ...]]


def count_ngrams(caption: str) -> NGrams:
    """Count the sequences of one to four tokens."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in _ORDERS for i in range(len(words) - n + 1))


def count_matches(caption: str, references: Sequence[str]) -> np.ndarray:
    """Return what BLEU needs of an image: matching n-grams, n-grams (four each), length, closest reference's length."""
    counts, length = count_ngrams(caption), len(caption.split())
    most: NGrams = Counter()
    for reference in references:
        most |= count_ngrams(reference)
    matches = [0] * len(_ORDERS)
    for ngram, count in (counts & most).items():
        matches[len(ngram) - 1] += count
    closest = min((abs(size - length), size) for size in (len(reference.split()) for reference in references))[1]
    return np.array([*matches, *(max(0, length - n + 1) for n in _ORDERS), length, closest], dtype=float)


def bleu(counts: np.ndarray) -> list[float]:
    """Return BLEU-1 to 4 (Papineni et al. 2002) of summed counts; see count_matches."""
    precisions = (counts[:4] + _TINY) / (counts[4:8] + _SMALL)
    ratio = (counts[8] + _TINY) / (counts[9] + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precisions[:n]) ** (1 / n)) * brevity for n in _ORDERS]


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """Return ROUGE-L (Lin 2004): an F-measure of the longest common subsequence, best precision with best recall."""
    words, others = caption.split(" "), [reference.split(" ") for reference in references]
    common = [_longest_common(words, other) for other in others]
    precision = max(common) / len(words)
    recall = max(size / len(other) for size, other in zip(common, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for j, other in enumerate(second):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return each image's CIDEr-D (Vedantam et al. 2015): tf-idf similarity of n-grams, idf from all references."""
    counted = [[count_ngrams(reference) for reference in group] for group in references]
    document_counts = Counter(ngram for group in counted for ngram in set().union(*group))
    num_documents = math.log(len(captions))

    def weigh(counts: NGrams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in _ORDERS]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (num_documents - math.log(max(1, document_counts[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
        # the reference counts pairs of words as the length
        return weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for caption, group in zip(captions, counted, strict=True):
        own, own_norms, own_length = weigh(count_ngrams(caption))
        total = 0.0
        for other, norms, length in map(weigh, group):
            penalty = math.exp(-((own_length - length) ** 2) / (2 * _SIGMA**2))
            for mine, theirs, norm in zip(
                own, other, (a * b for a, b in zip(own_norms, norms, strict=True)), strict=True
            ):
                shared = sum(
                    min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
                )
                total += (shared / norm if norm else shared) * penalty
        scores.append(10 * total / len(_ORDERS) / len(group))
    return scores


def score_captions(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return the metrics of captions: {metric: {value, interval (95%, images resampled), n}}.

    Args:
        captions: image -> its caption, as written.
        references: the same images -> one or more captions of people.
    """
    images = list(captions)
    texts = tokenize([captions[image] for image in images])
    tokens = iter(tokenize([text for image in images for text in references[image]]))
    groups = [[next(tokens) for _ in references[image]] for image in images]
    counts = np.stack([count_matches(text, group) for text, group in zip(texts, groups, strict=True)])
    means = {
        "ROUGE-L": np.array([rouge_l(text, group) for text, group in zip(texts, groups, strict=True)]),
        "CIDEr-D": np.array(cider_d(texts, groups)),
    }
    names = [*(f"BLEU-{n}" for n in _ORDERS), *means]

    def score(rows: np.ndarray | slice) -> list[float]:
        return [*bleu(counts[rows].sum(axis=0)), *(float(values[rows].mean()) for values in means.values())]

    generator = np.random.default_rng(0)
    resampled = [score(generator.integers(len(images), size=len(images))) for _ in range(_NUM_RESAMPLES)]
    limits = np.percentile(resampled, (2.5, 97.5), axis=0).T.tolist()
    return {
        name: {"value": value, "interval": interval, "n": len(images)}
        for name, value, interval in zip(names, score(slice(None)), limits, strict=True)
    }


def read_references(path: str) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Read a COCO annotation file: the captions of each image, and the images' file names.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not one.
    """
    values, references = read_object(path), {}
    try:
        for annotation in values["annotations"]:
            references.setdefault(_image_of(annotation), []).append(_text_of(annotation))
        names = {image["id"]: str(image["file_name"]) for image in values.get("images", ())}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO annotation file of captions: {_describe(error)}.") from None
    if not references:
        raise ValueError(f"{path} has no annotations.")
    return {image: references[image] for image in (*names, *references) if image in references}, names


def read_captions(path: str) -> dict[int, str]:
    """Read a COCO result file: a list of {"image_id", "caption"}, one for each image.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not one, or has two captions of an image.
    """
    values, captions = read_json(path), {}
    try:
        for result in values:
            image = _image_of(result)
            if image in captions:
                raise ValueError(f"{path} has two captions of image {image}. Keep one.")
            captions[image] = _text_of(result)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO result file of captions: {_describe(error)}.") from None
    return captions


def _image_of(values: Any) -> int:
    if type(values["image_id"]) is not int:
        raise TypeError(f"image_id {values['image_id']!r} is no whole number")
    return values["image_id"]


def _text_of(values: Any) -> str:
    if not isinstance(values["caption"], str):
        raise TypeError(f"caption of image {values['image_id']} is no text")
    return values["caption"]


def _describe(error: KeyError | TypeError) -> str:
    return f"an entry has no {error}" if isinstance(error, KeyError) else str(error)


def evaluate_captions(params: CaptionScoreParams) -> dict[str, Any]:
    """Score a result file, or a run's captions of the annotated images; the result is printed and kept.

    Returns:
        {"name", "metrics", "settings"}; see docs/benchmarks.md.

    Raises:
        FileNotFoundError: a file or the run does not exist.
        ValueError: a file is broken, or images lack captions.
    """
    check_output("output", params.output)
    references, names = read_references(params.annotations)
    settings: dict[str, Any] = {"annotations": params.annotations.rpartition("/")[2]}
    if params.checkpoint is None:
        assert params.results is not None
        captions = read_captions(params.results)
        settings["results"] = params.results.rpartition("/")[2]
    else:
        check_output("results", params.results)
        images = list(references)[: params.num_images]
        captions = _caption(params, images, names)
        options = ("prompt", "max_new_tokens", "num_images", "use_ema")
        settings |= {name: getattr(params, name) for name in options}
        if params.results is not None:
            lines = [{"image_id": image, "caption": text} for image, text in captions.items()]
            write_text(params.results, json.dumps(lines, ensure_ascii=False) + "\n")
    # in the order of the annotations
    captions = {image: captions[image] for image in (*references, *captions) if image in captions}
    unknown = next((image for image in captions if image not in references), None)
    if unknown is not None:
        raise ValueError(f"{params.results}: image {unknown} is not in {params.annotations}.")
    missing = len(references) - len(captions)
    if not captions or (missing and params.checkpoint is None and not params.allow_missing):
        raise ValueError(
            f"{params.results} lacks {missing} of {len(references)} annotated images. Caption them, or score the "
            "others with --allow_missing true."
        )
    table = {"name": params.name, "metrics": score_captions(captions, references), "settings": settings}
    publish_table(table, checkpoint=params.checkpoint, output=params.output)
    return table


def _caption(params: CaptionScoreParams, images: Sequence[int], names: Mapping[int, str]) -> dict[int, str]:
    """Caption images with a run's model, greedily."""
    from vla_foundry.inference.caption import Question, answer, load_captioner

    assert params.checkpoint is not None
    assert params.images is not None
    nameless = next((image for image in images if image not in names), None)
    if nameless is not None:
        raise ValueError(f"{params.annotations} does not say in `images` what file image {nameless} is in.")
    outside = next((names[image] for image in images if ".." in names[image].split("/")), None)
    if outside is not None:
        raise ValueError(f"{params.annotations}: file_name '{outside}' is outside of the folder of images.")
    places = {image: join_uri(params.images, names[image]) for image in images}
    missing = next((place for place in places.values() if not is_remote(place) and not exists(place)), None)
    if missing is not None:
        raise FileNotFoundError(f"images: {missing} does not exist.")
    captioner = load_captioner(params.checkpoint, device=params.device, use_ema=params.use_ema)
    prompt = captioner.default_prompt if params.prompt is None else params.prompt
    captions: dict[int, str] = {}
    with show_progress("captions", len(images), 0) as advance:
        for first in range(0, len(images), params.batch_size):
            part = images[first : first + params.batch_size]
            questions = [Question((read_bytes(places[image]),), prompt, places[image]) for image in part]
            texts = answer(captioner, questions, max_new_tokens=params.max_new_tokens, batch_size=params.batch_size)
            captions |= dict(zip(part, texts, strict=True))
            advance(len(part))
    return captions


def main(argv: list[str]) -> None:
    """Run `vla-foundry evaluate captions`: print each metric."""
    params = parse_command(CaptionScoreParams, argv, prog="vla-foundry evaluate captions")
    evaluate_captions(params)
