"""A config's runs are resumed exactly, and this is checked by killing one."""

import json
from pathlib import Path

import pytest

from vla_foundry.hub.verify_resume import compare, main

STEPS = 40


def test_a_killed_run_is_the_one_never_killed(
    trained: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = trained.parent / "job.yaml"
    words = ["--config_path", str(config), "--data.type", "text", "--data.seq_len", "16", "--data.num_workers", "0"]
    words += ["--data.dataset_manifest", str(dataset / "manifest.jsonl"), "--data.allow_multiple_epochs", "true"]
    words += ["--data.tokenizer", str(dataset / "tokenizer"), "--steps", str(STEPS), "--output", str(tmp_path / "out")]
    main(words)
    lines = capfd.readouterr().out.splitlines()
    assert f"after the checkpoint of step {STEPS}" in lines[1]
    assert len(lines) == 9, lines
    assert {line.split()[0] for line in lines[3:]} == {"same"}
    with pytest.raises(ValueError, match=r"output .*out exists\. Choose another name, or delete it\.$"):
        main(words)
    # a difference is found
    killed = tmp_path / "out" / "killed"
    record = json.loads((killed / f"checkpoints/step_{2 * STEPS:08d}/COMPLETE").read_text(encoding="utf-8"))
    record["model.safetensors"][1] = "0" * 64
    (killed / f"checkpoints/step_{2 * STEPS:08d}/COMPLETE").write_text(json.dumps(record), encoding="utf-8")
    found = dict(compare(tmp_path / "out" / "whole", killed, STEPS))
    assert [what for what, is_same in found.items() if not is_same] == ["weights"]
