"""The error of a whole family of comparisons is controlled, and the family is fixed beforehand."""

import itertools
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vla_foundry.evaluation.comparison.family import (
    FAMILY_NAME,
    Family,
    assign_letters,
    level_for,
    null_sizes,
    pairs_of,
    read_family,
    separate,
)
from vla_foundry.evaluation.comparison.sequential import find_table, run_tests


def decide(outcomes: np.ndarray, draws: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Test all pairs of models at the level 5% / `level`; outcomes (..., models, rollouts)."""
    first, second = np.triu_indices(outcomes.shape[-2], 1)
    num = outcomes.shape[-1]
    flat = [outcomes[..., index, :].reshape(-1, num) for index in (first, second)]
    return run_tests(find_table(num, Fraction(1, 40 * level)), *flat, np.full(len(flat[0]), num), draws=draws)


def share_separated(num_models: int, rate: float, num_runs: int, n_max: int) -> tuple[int, int]:
    """Simulate equal models; in how many runs any two are separated."""
    generator, found, done = np.random.default_rng(num_models), 0, 0
    num_pairs = num_models * (num_models - 1) // 2
    while done < num_runs:
        batch = min(num_runs - done, 100_000 // num_pairs)
        outcomes = generator.random((batch, num_models, n_max)) < rate
        # a closed test separates no pair if it does not reject that all models are equal
        better, _ = decide(outcomes, generator.random((batch * num_pairs, n_max)), level_for(num_pairs))
        found += int((better >= 0).reshape(batch, -1).any(axis=1).sum())
        done += batch
    return found, done


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize(("num_models", "num_runs"), [(3, 4000), (4, 3000), (12, 400)])
def test_equal_models_are_separated_in_at_most_5_percent(num_models: int, num_runs: int, rate: float) -> None:
    found, num = share_separated(num_models, rate, num_runs, 50)
    assert found <= stats.binom.ppf(0.999, num, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("num_models", "num_runs"), [(3, 60_000), (4, 40_000), (12, 6000)])
def test_equal_models_are_separated_in_at_most_5_percent_of_many_runs(num_models: int, num_runs: int) -> None:
    found, num = share_separated(num_models, 0.3, num_runs, 100)
    high = stats.binomtest(found, num).proportion_ci(0.99, method="exact").high
    assert high <= 0.05


def test_equal_models_beside_different_ones_are_separated_in_at_most_5_percent() -> None:
    generator, num, wrong, right = np.random.default_rng(0), 300, 0, 0
    for _ in range(num):
        outcomes = generator.random((4, 50)) < [[0.1], [0.1], [0.8], [0.8]]
        draws = generator.random((6, 50))
        better, _ = separate(4, partial(decide, outcomes, draws))
        wrong += better[0] >= 0 or better[5] >= 0
        right += (better[1:5] == 1).all()
    assert wrong <= stats.binom.ppf(0.999, num, 0.05)
    assert right > 0.99 * num


def test_numbers_of_pairs_that_may_be_equal_at_once() -> None:
    assert [null_sizes(num) for num in (1, 2, 3, 4)] == [[], [1], [1, 3], [1, 2, 3, 6]]
    assert null_sizes(5) == [1, 2, 3, 4, 6, 10]


def test_a_closed_test_is_more_powerful_than_bonferroni_and_never_less() -> None:
    # pair 0 is rejected at any level; pair 1 at alpha alone
    def levels(level: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([1, 0 if level == 1 else -1, -1]), np.array([7, 9, 20])

    better, stop = separate(3, levels)
    assert better.tolist() == [1, 0, -1]
    assert stop.tolist()[:2] == [7, 9]
    # nothing is rejected at alpha / 3: nothing is separated
    assert (
        separate(3, lambda level: (np.array([1, 1, 1]) if level == 1 else np.full(3, -1), np.zeros(3, int)))[0].max()
        < 0
    )


def test_levels_without_a_table_use_the_next_smaller_one() -> None:
    assert [level_for(size) for size in (1, 4, 66, 67, 1000)] == [1, 6, 66, 120, 1000]
    assert len(pairs_of([str(number) for number in range(12)])) == 66


def write(folder: Path, text: str) -> Family | None:
    (folder / FAMILY_NAME).write_text(text, encoding="utf-8")
    return read_family(folder)


def test_a_manifest_declares_the_family_and_its_hash_changes_with_it(tmp_path: Path) -> None:
    assert read_family(tmp_path) is None
    first = write(tmp_path, "models: [a, b]\n")
    assert first == Family(models=("a", "b"), is_declared=True)
    same = write(tmp_path, "# in another order\nalpha: 0.05\nmodels: [a, b]\nfamily: column\n")
    assert same is not None
    assert first is not None
    assert same.digest == first.digest
    other = [
        "models: [a, b, c]",
        "models: [b, a]",
        "models: [a, b]\nalpha: 0.01",
        "models: [a, b]\nfamily: all\ntasks: [lift, push]",
        "models: [a, b]\nmax_sample_size: 50",
        "models: [a, b]\npaired: true",
        "models: [a, b]\nseed: 1",
        "models: [a, b]\ntasks: [lift]",
    ]
    families = [write(tmp_path, text) for text in other]
    assert len({first.digest, *(family.digest for family in families if family)}) == len(other) + 1


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "1.e-3", "+0.1e-2", "0.001"])
def test_alpha_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    family = write(tmp_path, f"models: [a, 2026-01-02]\nalpha: {text}")
    assert family is not None
    assert (family.alpha, family.models) == (Fraction(1, 1000), ("a", "2026-01-02"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "must declare `models`"),
        ("models: a", "must declare `models`"),
        ("models: []", "must declare `models`"),
        ("models: [a, 1]", "models must be a list of names"),
        ("models: [a, null]", "YAML needs quotes around .null. and numbers"),
        ("models: [a, a]", "models must name each once"),
        ("models: [a]\nalpha: 0.0", "alpha must lie between 0 and 1"),
        ("models: [a]\nalpha: .nan", "alpha must lie between 0 and 1"),
        ("models: [a]\nalpha: high", "alpha must be float"),
        ("models: [a]\nfamily: both", "family must be column or all"),
        ("models: [a]\nfamily: all", "family: all needs `tasks`"),
        ("models: [a]\nseed: -1", "seed at least 0"),
        ("models: [a]\nmax_sample_size: 0", "max_sample_size must be at least 1"),
        ("models: [a]\npaired: 1", "paired must be bool"),
        ("models: [a]\nmodles: [b]", "'modles' is unknown"),
        ("models: [a", "not valid YAML"),
    ],
)
def test_broken_manifests_are_named_with_the_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, text)


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
