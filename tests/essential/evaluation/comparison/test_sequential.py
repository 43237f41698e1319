"""The sequential test keeps its error exactly, and is the published one."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.evaluation.comparison import sequential
from vla_foundry.evaluation.comparison.sequential import (
    SHIPPED,
    SIZES,
    Decision,
    StepTable,
    as_fraction,
    dead_time,
    error_rates,
    find_table,
    make_table,
    one_sided_errors,
    run_test,
)

NULL_RATES = np.array([0.002, 0.01, 0.03, 0.08, 0.17, 0.3, 0.41, 0.5, 0.62, 0.77, 0.9, 0.99])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sequential.find_table.cache_clear()


def shipped(n_max: int, size: int, *, is_paired: bool = False) -> StepTable:
    return find_table(n_max, Fraction(1, 40 * size), is_paired=is_paired)


# n_max = 200, alpha = 0.05 for one side: (t, smaller count) -> largest count without a rejection, and the chances above
PUBLISHED = {
    (9, 0): (1, [0.008, 0, 0, 0, 0]),
    (9, 1): (7, [0.547]),
    (9, 2): (8, []),
    (20, 1): (9, []),
    (20, 2): (10, [0.746]),
    (20, 5): (14, []),
    (20, 10): (18, []),
    (50, 5): (15, [0.087]),
    (50, 10): (22, [0.056]),
    (50, 20): (33, []),
    (100, 10): (22, []),
    (100, 20): (35, []),
    (100, 40): (57, []),
    (100, 60): (76, []),
    (200, 5): (13, [0.299]),
    (200, 10): (21, []),
    (200, 20): (34, []),
    (200, 40): (58, []),
    (200, 60): (80, []),
    (200, 80): (101, []),
    (200, 90): (111, []),
}


def test_the_states_of_the_published_table_are_met() -> None:
    table = find_table(200, Fraction(1, 20))
    for (t, x), (last, chances) in PUBLISHED.items():
        row = table.rejections(t)[x]
        # the chances depend on the null rates at which the risk is bounded
        assert row[: last + 1].max() < 0.03, (t, x)
        assert row[last + 1 : last + 1 + len(chances)] == pytest.approx(chances, abs=0.06), (t, x)
        assert (row[last + 1 + len(chances) :] == 1).all(), (t, x)


def test_power_and_stopping_times_are_the_published_ones() -> None:
    for (p0, p1), one_side, two_sided in [
        ((0.6, 0.7), (0.596, 147), (0.467, 162)),
        ((0.55, 0.7), (0.887, 107), (0.811, 123)),
        ((0.8, 0.9), (0.824, 119), (0.727, 136)),
    ]:
        for table, expected in ((find_table(200, Fraction(1, 20)), one_side), (shipped(200, 1), two_sided)):
            power, _, stop = error_rates(table, p0, p1)
            assert (power, stop) == (pytest.approx(expected[0], abs=0.002), pytest.approx(expected[1], abs=0.6))


@pytest.mark.parametrize("n_max", [20, 50, 100, 200])
@pytest.mark.parametrize("size", [1, 3, 66])
def test_shipped_tables_keep_their_error_at_every_null_rate(n_max: int, size: int) -> None:
    table = shipped(n_max, size)
    errors = one_sided_errors(table, np.linspace(0.0005, 0.5, 997))
    assert errors.max() <= table.alpha
    assert errors.max() >= 0.98 * table.alpha
    # the other half mirrors it
    assert one_sided_errors(table, 1 - NULL_RATES) == pytest.approx(one_sided_errors(table, NULL_RATES), rel=1e-5)


def test_two_policies_that_are_equal_are_told_apart_in_at_most_alpha() -> None:
    table = shipped(100, 1)
    for p in NULL_RATES:
        for_one, for_zero, _ = error_rates(table, p)
        assert for_one == pytest.approx(for_zero)
        assert for_one + for_zero <= 0.05


def test_paired_tables_keep_their_error_and_gain_power_where_outcomes_agree() -> None:
    table = shipped(200, 1, is_paired=True)
    assert one_sided_errors(table, np.linspace(0.0005, 0.5, 499)).max() <= table.alpha
    # 0.6 and 0.7 as before, independent or with a correlation of 0.3
    for correlation, least in ((0.0, 0.44), (0.3, 0.6)):
        both = 0.6 * 0.7 + correlation * np.sqrt(0.6 * 0.4 * 0.7 * 0.3)
        assert error_rates(table, 0.6 - both, 0.7 - both)[0] > least


def test_a_small_table_agrees_with_simulated_runs() -> None:
    table, generator = make_table(12, 0.1), np.random.default_rng(1)
    found = [
        run_test(table, (generator.random((2, 12)) < [[0.3], [0.8]]).tolist(), seed=number, purpose="test").better
        for number in range(3000)
    ]
    for better, expected in zip((1, 0), error_rates(table, 0.3, 0.8)[:2], strict=True):
        share = found.count(better) / len(found)
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected / len(found)) + 1e-3)


def test_it_may_be_looked_at_any_time_and_repeats_its_draws() -> None:
    table, generator = shipped(50, 1), np.random.default_rng(0)
    for number in range(200):
        outcomes = (generator.random((2, 60)) < [[0.3], [0.6]]).tolist()
        whole = run_test(table, outcomes, seed=number, purpose="a")
        prefixes = [run_test(table, [each[:t] for each in outcomes], seed=number, purpose="a") for t in range(51)]
        first = next((found for found in prefixes if found.better is not None), prefixes[-1])
        assert whole == first
        assert all(found == Decision(better=None, stop=t) for t, found in enumerate(prefixes) if t < whole.stop)
        swapped = run_test(table, outcomes[::-1], seed=number, purpose="a")
        assert (swapped.better, swapped.stop) == ({0: 1, 1: 0, None: None}[whole.better], whole.stop)


def test_ties_are_never_separated() -> None:
    for is_paired in (False, True):
        table = shipped(200, 1, is_paired=is_paired)
        for p in (0.0, 0.4, 1.0):
            same = (np.random.default_rng(2).random(200) < p).tolist()
            assert run_test(table, [same, same], seed=0, purpose="a") == Decision(better=None, stop=200)


def test_alpha_is_the_fraction_that_was_meant() -> None:
    assert as_fraction(1 - 0.95) == as_fraction(0.05) == Fraction(1, 20)
    assert as_fraction((1 - 0.95) / 3) == as_fraction(0.05 / 3) == Fraction(1, 60)


def test_tables_of_all_pairs_of_up_to_12_policies_ship_with_the_package() -> None:
    with np.load(SHIPPED, allow_pickle=False) as file:
        assert {f"step-200-1-{40 * size}/first" for size in SIZES} < set(file.files)
    assert SHIPPED.stat().st_size < 500_000


def test_other_tables_are_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = find_table(10, Fraction(1, 7))
    (kept,) = tmp_path.rglob("*.npz")
    assert kept.name == "step-10-1-7.npz"
    sequential.find_table.cache_clear()
    monkeypatch.setattr(sequential, "make_table", None)
    assert all(np.array_equal(find_table(10, Fraction(1, 7)).rejections(t), made.rejections(t)) for t in range(11))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for content in (b"", b"PK\x03\x04 broken", kept.read_bytes()[:500]):
        kept.write_bytes(content)
        sequential.find_table.cache_clear()
        assert np.array_equal(find_table(10, Fraction(1, 7)).first, made.first)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_table(11, Fraction(1, 7)).n_max == 11


def test_nothing_is_decided_in_the_dead_time() -> None:
    assert [dead_time(n_max) for n_max in (10, 50, 100, 200, 256)] == [4, 6, 7, 8, 9]
    table = shipped(200, 1)
    assert run_test(table, [[False] * 8, [True] * 8], seed=0, purpose="a").better is None


@pytest.mark.parametrize(("n_max", "alpha"), [(4, 0.05), (501, 0.05), (-1, 0.05), (50, 0.0), (50, 1.0)])
def test_impossible_tests_are_refused(n_max: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"needs 5 to 500 rollouts|alpha must lie"):
        make_table(n_max, alpha)
