"""Two models share a letter if and only if they are not separated."""

import itertools

import numpy as np

from vla_foundry.evaluation.comparison.letters import assign_letters


def test_models_share_a_letter_if_and_only_if_they_are_not_separated() -> None:
    generator = np.random.default_rng(0)
    for number in range(300):
        models = [f"m{index}" for index in range(generator.integers(1, 13))]
        pairs = list(itertools.combinations(models, 2))
        separated = [pair[:: generator.choice([1, -1])] for pair in pairs if generator.random() < (number % 10) / 9]
        letters = {
            model: set(text.split() or [""]) if " " in text else set(text)
            for model, text in assign_letters(models, separated).items()
        }
        assert all(letters.values())
        for pair in pairs:
            is_separated = pair in separated or pair[::-1] in separated
            assert is_separated == letters[pair[0]].isdisjoint(letters[pair[1]])
        # no letter is needless
        groups = {
            letter: {model for model in models if letter in letters[model]} for letter in set().union(*letters.values())
        }
        assert not any(a < b or (a == b and x != y) for (x, a), (y, b) in itertools.permutations(groups.items(), 2))


def test_letters_follow_the_rank_and_go_on_after_z() -> None:
    assert assign_letters(["x"], []) == {"x": "a"}
    assert assign_letters(["x", "y", "z"], [("z", "x")]) == {"x": "a", "y": "ab", "z": "b"}
    models = [f"m{number}" for number in range(28)]
    assert list(assign_letters(models, itertools.combinations(models, 2)).values())[24:] == ["y", "z", "aa", "ab"]


def test_the_figure_of_the_paper() -> None:
    models = ["Qwen", "sim", "LBM-MT", "full"]
    separated = [("Qwen", "sim"), ("Qwen", "LBM-MT"), ("Qwen", "full"), ("sim", "full"), ("LBM-MT", "full")]
    assert assign_letters(models, separated) == {"Qwen": "a", "sim": "b", "LBM-MT": "b", "full": "c"}
