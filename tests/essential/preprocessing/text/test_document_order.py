"""The order of documents is a pure function of files and seed, and keeps each of them once and whole."""

import itertools
from collections import Counter

from vla_foundry.preprocessing.sources import SourceFile
from vla_foundry.preprocessing.text import document_order as plan
from vla_foundry.preprocessing.text.document_order import divide_into_tasks, shuffled_documents
from vla_foundry.preprocessing.text.documents import DocumentTally, Piece, Skipped


def create_files() -> list[SourceFile]:
    jsonl = [SourceFile(uri=f"/{n}.jsonl", name=f"{n}", size=5_000_000) for n in range(3)]
    txt = [SourceFile(uri=f"/{n}.txt", name=f"t{n}", size=100) for n in range(50)]
    return jsonl + txt


def test_each_part_of_each_file_is_in_one_task():
    tasks = divide_into_tasks(create_files(), seed=0, task_bytes=2_000_000)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    units = Counter((unit.file.name, unit.part) for task in tasks for unit in task.payload)
    assert set(units.values()) == {1}
    parts = Counter(name for name, _ in units)
    assert all(parts[unit.file.name] == unit.num_parts for task in tasks for unit in task.payload)
    assert all(task.weight <= 2_000_000 for task in tasks)
    assert sum(task.weight for task in tasks) == 15_005_000


def test_seed_alone_decides_the_order():
    def order(seed: int) -> list[list[tuple[str, int]]]:
        tasks = divide_into_tasks(create_files(), seed=seed, task_bytes=2_000_000)
        return [[(unit.file.name, unit.part) for unit in task.payload] for task in tasks]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[0] != sorted(order(1)[0])


def test_documents_are_shuffled_whole(monkeypatch):
    monkeypatch.setattr(plan, "_SHUFFLE_BYTES", 400)
    rows: list[Piece | Skipped] = []
    for number in range(60):
        num_parts = 1 + number % 3 + 30 * (number == 20)  # document 20 is longer than the memory
        rows += [Piece(f"d{number}", part, "x" * 20, part == num_parts - 1) for part in range(num_parts)]
    rows.insert(7, Skipped("empty", "here"))
    tally = DocumentTally()
    found = list(shuffled_documents(rows, tally, seed=3, task_number=5))
    assert Counter(found) == Counter(row for row in rows if isinstance(row, Piece))
    names = [piece.document for piece in found if piece.part == 0]
    assert names != sorted(names, key=lambda name: int(name[1:]))
    for before, after in itertools.pairwise(found):
        assert after.part == (0 if before.is_last else before.part + 1)
        assert before.is_last or after.document == before.document
    assert tally.num_good == 60
    assert tally.counts == {"empty": 1}
    assert found == list(shuffled_documents(rows, DocumentTally(), seed=3, task_number=5))
    assert found != list(shuffled_documents(rows, DocumentTally(), seed=3, task_number=6))
