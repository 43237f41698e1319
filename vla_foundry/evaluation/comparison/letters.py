"""Compact letter displays: two policies share a letter if and only if they are not separated."""

from collections.abc import Iterable, Sequence


def assign_letters(models: Sequence[str], separated: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Give each model its letters, by insert and absorb (Piepho 2004).

    Args:
        models: from the best to the worst, which gets the last letters.
        separated: pairs that differ, in either order.

    Returns:
        The letters of each model, in the order of `models`; after z come aa, ab, ..., and then letters are separated
        by spaces.
    """
    ranks = {model: rank for rank, model in enumerate(models)}
    columns = [frozenset(ranks.values())] if models else []
    for first, second in separated:
        pair = {ranks[first], ranks[second]}
        split = [column for column in columns if pair <= column]
        columns = [column for column in columns if not pair <= column]
        for column in split:
            for rank in sorted(pair):
                part = column - {rank}
                if not any(part <= other for other in columns):
                    columns = [other for other in columns if not other <= part] + [part]
    columns.sort(key=lambda column: (min(column), -len(column), sorted(column)))
    names = [_letter(number) for number in range(len(columns))]
    between = "" if len(names) <= 26 else " "
    return {
        model: between.join(name for name, column in zip(names, columns, strict=True) if rank in column)
        for model, rank in ranks.items()
    }


def _letter(number: int) -> str:
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
