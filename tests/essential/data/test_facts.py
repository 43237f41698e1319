"""What is read before a config is resolved: manifests and what lies beside them, tokenizers, cores."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.resolve import Resolved, resolve_known
from vla_foundry.config.schema import Unavailable
from vla_foundry.data.facts import read_facts
from vla_foundry.params import (
    DistributedParams,
    HyperParams,
    TrainExperimentParams,
)
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import DatasetFacts, Facts, TokenizerFacts
from vla_foundry.params.models.action_heads import FlowTransformerParams
from vla_foundry.params.models.backbones import CLIPBackboneParams, VLMBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import DiffusionPolicyParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.params.models.vit import ViTHFParams, ViTParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams
from vla_foundry.text.tokenizers import read_vocabulary

Write = Callable[[str, str], str]


def dataset(num_samples: Any = 1000, **provenance: Any) -> DatasetFacts:
    return DatasetFacts(manifest="a/manifest.jsonl", num_samples=num_samples, provenance=provenance)


FACTS = Facts(datasets=(dataset(),), num_cpus=6, ranks_per_node=2)
DATA = TextDataParams(dataset_manifest=["a/manifest.jsonl"], seq_len=16)
PARAMS = TrainExperimentParams(
    data=DATA,
    model=TransformerParams(max_seq_len=16, vocab_size=100),
    hparams=HyperParams(global_batch_size=8, per_gpu_batch_size=4, seed=7, warmup=0.1),
    total_train_samples=800,
)


def write_dataset(folder: Path, counts: list[int]) -> str:
    folder.mkdir(parents=True)
    lines = [json.dumps({"shard": f"s{index}", "num_sequences": count}) for index, count in enumerate(counts)]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "manifest.jsonl")


def test_facts_are_read_from_manifests_and_what_lies_beside_them(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", [10, 20])
    second = write_dataset(tmp_path / "b", [5])
    (tmp_path / "a" / "provenance.json").write_text('{"dataset": {"vocab_size": 50, "seq_len": 16}}', encoding="utf-8")
    (tmp_path / "b" / "tokenizer").mkdir()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]}
    (tmp_path / "b" / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    data = TextDataParams(dataset_manifest=[first, second], val_dataset_manifest=[second])
    facts = read_facts(replace(PARAMS, data=data, distributed=DistributedParams()), 4)
    assert [item.num_samples for item in facts.datasets] == [30, 5]
    assert facts.datasets[0].provenance == {"vocab_size": 50, "seq_len": 16}
    assert facts.datasets[0].tokenizer is None
    assert facts.datasets[1].tokenizer == TokenizerFacts(name=str(tmp_path / "b" / "tokenizer"), vocab_size=3)
    assert facts.val_datasets == (facts.datasets[1],)
    assert facts.world_size == 4
    assert facts.num_cpus >= 1


def test_an_epoch_counts_the_pieces_of_records(
    tmp_path: Path, write_samples: Callable, json_tokens: Callable, write_records: Callable
) -> None:
    # one dataset says the length of its records; of the others the first record does
    manifests = [
        write_dataset(tmp_path / "made", [10, 20]),
        str(write_samples(tmp_path / "lists", [[json_tokens(range(9))] * 3])),
        str(write_records(tmp_path / "records", [2], 6)),
    ]
    (tmp_path / "made" / "provenance.json").write_text('{"dataset": {"seq_len": 12}}', encoding="utf-8")
    data = TextDataParams(dataset_manifest=manifests, seq_len=4, allow_multiple_epochs=True)
    facts = read_facts(replace(PARAMS, data=data), 1)
    assert [item.num_samples for item in facts.datasets] == [90, 6, 4]
    params = replace(PARAMS, data=data, total_train_samples=None, num_epochs=2)
    assert resolve_known(params, facts).params.total_train_samples == 200


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert read_facts(replace(PARAMS, data=TextDataParams()), 8).ranks_per_node == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert read_facts(replace(PARAMS, data=TextDataParams()), 8).ranks_per_node == 8


def test_a_missing_manifest_is_an_error_before_training_and_a_gap_when_offline(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere" / "manifest.jsonl")
    params = replace(PARAMS, data=replace(DATA, dataset_manifest=[missing]))
    with pytest.raises(FileNotFoundError, match=r"^data\.dataset_manifest: there is no manifest .*nowhere"):
        read_facts(params, 1)
    for name in (missing, "s3://bucket/manifest.jsonl", "hf://datasets/a/b/manifest.jsonl"):
        data = replace(DATA, dataset_manifest=[name], tokenizer="hf://a/b")
        facts = read_facts(replace(params, data=data), 1, offline=True)
        assert facts.datasets[0].num_samples == Unavailable(name)


def test_a_tokenizer_folder_that_is_not_there_is_an_error_and_one_on_the_hub_is_not_waited_for(tmp_path: Path) -> None:
    folder = str(tmp_path / "nowhere")
    params = replace(PARAMS, data=TextDataParams(tokenizer=folder))
    with pytest.raises(FileNotFoundError, match=r"^data\.tokenizer: \S*nowhere is no folder with a tokenizer\.json\.$"):
        read_facts(params, 1)
    assert read_facts(params, 1, offline=True).tokenizer is None
    hub = replace(PARAMS, data=TextDataParams(tokenizer="owner/name"))
    assert read_facts(hub, 1, offline=True).tokenizer is None


def test_a_folder_instead_of_its_manifest_says_what_was_meant(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1])
    params = replace(PARAMS, data=replace(DATA, dataset_manifest=[str(tmp_path / "a")]))
    with pytest.raises(FileNotFoundError, match=rf"Did you mean {manifest}\?"):
        read_facts(params, 1)


VOCAB = {"a": 0, "b": 1, "c": 2}


def write_tokenizer(folder: Path, ids: dict[str, int], template: str | None = None) -> None:
    folder.mkdir(parents=True)
    added = [{"id": number, "content": token, "special": True} for token, number in ids.items() if "<" in token]
    content = {"model": {"type": "WordLevel", "vocab": ids}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = json.dumps({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def write_run(folder: Path, ids: dict[str, int], *, kept: str = "tokenizer", template: str | None = None) -> str:
    write_tokenizer(folder / kept, ids, template)
    (folder / "config_model.yaml").write_text("type: transformer\n", encoding="utf-8")
    return str(folder)


def resolve_with(params: TrainExperimentParams) -> Resolved[TrainExperimentParams]:
    return resolve_known(params, read_facts(params, 1))


def test_datasets_of_two_tokenizers_of_one_size_are_refused(tmp_path: Path) -> None:
    manifests = [write_dataset(tmp_path / name, [1000]) for name in ("a", "b", "c")]
    for name, ids in (("a", VOCAB), ("b", {"a": 0, "c": 1, "b": 2}), ("c", VOCAB)):
        write_tokenizer(tmp_path / name / "tokenizer", ids)
    same = replace(DATA, dataset_manifest=[manifests[0], manifests[2]])
    assert resolve_with(replace(PARAMS, data=same)).notices == []
    params = replace(PARAMS, data=replace(DATA, dataset_manifest=manifests[:2]))
    with pytest.raises(ValueError, match=r"b/manifest\.jsonl have different tokenizers: token 1 is 'b' in the one and"):
        resolve_with(params)
    (notice,) = resolve_with(replace(params, data=replace(params.data, accept_contradictions=True))).notices
    assert "have different tokenizers" in notice
    validation = replace(DATA, dataset_manifest=manifests[:1], val_dataset_manifest=manifests[1:2])
    with pytest.raises(ValueError, match="have different tokenizers"):
        resolve_with(replace(PARAMS, data=validation))


@pytest.mark.parametrize("below", ["", "checkpoints/step_00000001"])
def test_weights_trained_on_another_tokenizer_than_the_data_are_refused(below: str, tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1000])
    write_tokenizer(tmp_path / "a" / "tokenizer", VOCAB)
    right = write_run(tmp_path / "right", VOCAB, template="{{ chat }}")
    wrong = write_run(tmp_path / "wrong", {"b": 0, "a": 1, "c": 2})
    bare = str(tmp_path / "bare.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(b"")

    def params(run: str) -> TrainExperimentParams:
        checkpoint = Path(run, below)
        if below:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "COMPLETE").touch()
        model = replace(PARAMS.model, resume_from_checkpoint=str(checkpoint), resume_weights_only=True)
        return replace(PARAMS, model=model, data=replace(DATA, dataset_manifest=[manifest]))

    assert resolve_with(params(right)).notices == []
    with pytest.raises(
        ValueError, match=rf"^The weights of {wrong}\S* and {manifest} have different tokenizers: token"
    ):
        resolve_with(params(wrong))
    if not below:
        (notice,) = resolve_with(params(bare)).notices
        assert notice.startswith(f"{bare} keeps no tokenizer")
    continued = replace(PARAMS, data=params(right).data, save_path=str(tmp_path), name="wrong", resume="auto")
    with pytest.raises(ValueError, match=rf"^The weights of {wrong} and {manifest} have different tokenizers"):
        resolve_with(continued)


def write_step(folder: Path, **inputs: Any) -> str:
    """A step folder as far as facts are read from it."""
    folder.mkdir(parents=True)
    content = json.dumps({"inputs": inputs}).encode()
    (folder / "state.json").write_bytes(content)
    (folder / "model.safetensors").touch()
    digest = hashlib.sha256(content).hexdigest()
    (folder / "COMPLETE").write_text(json.dumps({"state.json": [len(content), digest]}), encoding="utf-8")
    return str(folder)


def test_a_step_folder_alone_knows_the_tokenizer_of_its_weights(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1000])
    write_tokenizer(tmp_path / "a" / "tokenizer", VOCAB)
    write_tokenizer(tmp_path / "other", {"b": 0, "a": 1, "c": 2, "<image>": 3})
    right = write_step(
        tmp_path / "1" / "checkpoints" / "step_00000001",
        tokenizer=read_vocabulary(tmp_path / "a" / "tokenizer").to_record(),
    )
    record = read_vocabulary(tmp_path / "other").to_record()
    wrong = write_step(tmp_path / "step", tokenizer=record)
    # the files of a run do not speak for weights that were trained on another tokenizer
    misplaced = Path(write_run(tmp_path / "run", VOCAB), "checkpoints", "step_00000001")
    write_step(misplaced, tokenizer=record)

    def notices(checkpoint: str) -> list[str]:
        model = replace(PARAMS.model, resume_from_checkpoint=checkpoint, resume_weights_only=True)
        return resolve_with(replace(PARAMS, model=model, data=replace(DATA, dataset_manifest=[manifest]))).notices

    assert notices(right) == notices(f"{right}/model.safetensors") == notices(str(tmp_path / "1")) == []
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("damaged", encoding="utf-8")
    for checkpoint in (wrong, f"{wrong}/model.safetensors", str(misplaced), str(tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"^The weights of {checkpoint} and .*: their tokens or merges differ\."):
            notices(checkpoint)


def test_data_without_a_tokenizer_is_a_notice_when_the_weights_have_one(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1000])
    run = write_run(tmp_path / "run", VOCAB)
    model = replace(PARAMS.model, resume_from_checkpoint=run, resume_weights_only=True)
    params = replace(PARAMS, model=model, data=replace(DATA, dataset_manifest=[manifest]))
    (notice,) = resolve_with(params).notices
    assert notice.startswith(f"{manifest} keeps no tokenizer")
    assert resolve_with(replace(params, model=PARAMS.model)).notices == []


def test_a_vlm_needs_the_tokenizer_of_its_language_model(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "a", [1000])
    run = write_run(tmp_path / "llm", VOCAB)
    for name, ids in (("same", VOCAB), ("more", VOCAB | {"<image>": 3}), ("other", {"c": 0, "b": 1, "a": 2})):
        write_tokenizer(tmp_path / name, ids, template="{{ chat }}")
    language_model = TransformerParams(vocab_size=3, resume_from_checkpoint=run, resume_weights_only=True)
    model = VLMParams(vit=ViTParams(img_size=32, patch_size=16), transformer=language_model)

    def params(tokenizer: str) -> TrainExperimentParams:
        data = ImageCaptionDataParams(dataset_manifest=[manifest], tokenizer=tokenizer)
        return replace(PARAMS, model=model, data=data)

    for name in ("same", "more"):
        assert resolve_with(params(str(tmp_path / name))).notices == []
    with pytest.raises(ValueError, match=rf"^The weights of {run} and data\.tokenizer \S*other have different tokeni"):
        resolve_with(params(str(tmp_path / "other")))
    vlm = replace(model, resume_from_checkpoint=write_run(tmp_path / "vlm", VOCAB | {"<image>": 3}, kept="processor"))
    (notice,) = resolve_with(replace(params(str(tmp_path / "same")), model=vlm)).notices
    assert notice == f"{tmp_path / 'vlm'} keeps no image processor, so it is not compared with the data's."
    with pytest.raises(ValueError, match=r"^The weights of \S*vlm and data\.tokenizer \S*other have different"):
        resolve_with(replace(params(str(tmp_path / "other")), model=vlm))


def test_the_sizes_of_a_checkpoint_are_those_of_its_run(tmp_path: Path) -> None:
    manifest, run = write_dataset(tmp_path / "a", [1000]), write_run(tmp_path / "run", VOCAB)
    stored = "type: transformer\nhidden_dim: 96\nn_layers: 8\nvocab_size: 50432\n"
    (tmp_path / "run" / "config_model.yaml").write_text(stored, encoding="utf-8")
    start: dict[str, Any] = {"resume_from_checkpoint": run, "resume_weights_only": True}

    def resolve_model(model: Any, data: Any = DATA) -> None:
        resolve_with(replace(PARAMS, model=model, data=replace(data, dataset_manifest=[manifest])))

    resolve_model(TransformerParams(**start))
    for name, value, needed in (("hidden_dim", 64, 96), ("n_layers", 7, 8), ("vocab_size", 50433, 50432)):
        with pytest.raises(
            ValueError, match=rf"^model\.{name} \({value}\) must be {needed}, that of model\.resume_from_"
        ):
            resolve_model(TransformerParams(**start, **{name: value}))
    images, vit = ImageCaptionDataParams(tokenizer=f"{run}/tokenizer"), ViTParams(img_size=32, patch_size=16)
    resolve_model(VLMParams(vit=vit, transformer=TransformerParams(**start, vocab_size=50433)), images)  # with <image>
    with pytest.raises(ValueError, match=r"^model\.transformer\.vocab_size \(50431\) must be 50432"):
        resolve_model(VLMParams(vit=vit, transformer=TransformerParams(**start, vocab_size=50431)), images)


def small_model(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


HEAD = FlowTransformerParams(transformer=TransformerParams(hidden_dim=16, n_layers=1, vocab_size=0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer", r"^model\.vocab_size \(2\) is less than the 3 tokens of .*Use --model\.vocab_size 3 or more"),
        ("transformer_hf", r"/model: vocab_size \(2\) is less than the 3 tokens of .*Use data of its own tokenizer"),
        ("vlm", r"^model\.transformer\.vocab_size \(2\) is less than the 4 tokens of "),
        ("vlm of hf", r"/model: vocab_size \(2\) is less than the 4 tokens of "),
        ("vlm_hf", r"/model: vocab_size \(2\) is less than the 4 tokens of "),
        (
            "vlm_foundry_backbone",
            r"^model\.vision_language_backbone\.vlm\.transformer\.vocab_size \(2\) is less than the 4 tokens of ",
        ),
        ("vlm_backbone", r"/model: vocab_size \(2\) is less than the 4 tokens of "),
        ("clip_backbone", r"/model: vocab_size \(2\) is less than the 4 tokens of "),
    ],
)
def test_a_token_table_smaller_than_the_tokenizer_is_known_when_a_config_is_resolved(
    name: str, message: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "tokenizer", VOCAB)
    published = small_model(
        tmp_path / "model", {"vocab_size": 2} if "hf" in name else {"text_config": {"vocab_size": 2}}
    )
    native = TransformerParams(vocab_size=2, hidden_dim=16, n_layers=1)
    vit = ViTParams(hidden_dim=16, n_heads=2, patch_size=8, img_size=16)
    vlm = VLMParams(vit=vit, transformer=native, vocab_size=2, image_token_id=3)
    models: dict[str, Any] = {
        "transformer": native,
        "transformer_hf": TransformerHFParams(hf_pretrained=published),
        "vlm": vlm,
        "vlm of hf": replace(vlm, transformer=TransformerHFParams(hf_pretrained=published)),
        "vlm_hf": VLMHFParams(hf_pretrained=published, vocab_size=2),
        "vlm_foundry_backbone": VLMFoundryBackboneParams(vlm=vlm),
        "vlm_backbone": VLMBackboneParams(hf_pretrained=published, vocab_size=2),
        "clip_backbone": CLIPBackboneParams(hf_pretrained=published),
    }
    model, tokenizer = models[name], str(tmp_path / "tokenizer")
    data: Any = ImageCaptionDataParams(tokenizer=tokenizer)
    if name.startswith("transformer"):
        data = TextDataParams(tokenizer=tokenizer)
    elif "backbone" in name:
        model = DiffusionPolicyParams(vision_language_backbone=model, action_head=HEAD)
        data = RoboticsDataParams(tokenizer=tokenizer)
    params = replace(PARAMS, model=model, data=replace(data, seq_len=16))
    with pytest.raises(ValueError, match=message):
        params.check(params, read_facts(params, 1), "")


def test_a_token_table_that_grows_fits_the_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", VOCAB)
    published = small_model(tmp_path / "model", {"model_type": "smolvlm", "text_config": {"vocab_size": 2}})
    params = replace(
        PARAMS,
        model=DiffusionPolicyParams(
            vision_language_backbone=VLMBackboneParams(hf_pretrained=published), action_head=HEAD
        ),
        data=RoboticsDataParams(tokenizer=str(tmp_path / "tokenizer")),
    )
    facts, backbone = read_facts(params, 1), params.model.vision_language_backbone
    vocab_size = backbone.derive(params, facts)["vocab_size"].value
    assert vocab_size == 4
    grown = replace(backbone, vocab_size=vocab_size)
    assert grown.model_params().vocab_size == 4
    assert grown.token_limits(facts).vocab_size == 64


def test_images_prepared_otherwise_than_for_the_weights_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", VOCAB)
    run, published = tmp_path / "run", tmp_path / "clip"
    (run / "processor").mkdir(parents=True)
    published.mkdir()
    (run / "config_model.yaml").write_text("type: vlm\n", encoding="utf-8")
    config = {"type": "native", "image_size": [16, 16], "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    processor = run / "processor" / "config_processor.json"
    vit = ViTParams(hidden_dim=16, n_heads=2, patch_size=8, img_size=16)
    vlm = VLMParams(vit=vit, transformer=TransformerParams(max_seq_len=16, vocab_size=100))
    data = ImageCaptionDataParams(tokenizer=str(tmp_path / "tokenizer"), image_size=16, seq_len=16)

    def compare(model: Any, **values: Any) -> list[str]:
        changed = replace(data, **values)
        facts = read_facts(replace(PARAMS, model=model, data=changed), 1)
        return changed.compare_images(facts, "data", is_accepted=changed.accept_contradictions)

    started = replace(vlm, resume_from_checkpoint=str(run))
    assert "keeps no image processor, so it is not compared" in compare(started)[0]
    for key, value, message in (
        (
            "image_mean",
            [0.48, 0.45, 0.4],
            r"images of mean \[0\.48, .*, but data gives \[0\.5, .* --data\.image_mean",
        ),
        ("image_size", [32, 32], r"images of size \[32, 32\], but data gives \[16, 16\]\. Use --data\.image_size 32\."),
    ):
        processor.write_text(json.dumps(config), encoding="utf-8")
        assert compare(started) == []
        processor.write_text(json.dumps(config | {key: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            compare(started)
        assert len(compare(started, accept_contradictions=True)) == 1
    # a step folder keeps them too
    images = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": None, "patch_size": None}
    step = write_step(tmp_path / "step", images=images | {"mean": [0.4] * 3})
    with pytest.raises(ValueError, match=r"step were trained on images of mean \[0\.4, 0\.4, 0\.4\], but data gives"):
        compare(replace(vlm, resume_from_checkpoint=step), image_mean=(0.5, 0.5, 0.5))
    # text weights see no images; a published encoder has a processor of its own
    assert compare(replace(vlm, transformer=replace(vlm.transformer, resume_from_checkpoint=str(run)))) == []
    hf = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 18}, "image_std": [0.5, 0.5, 0.27]}
    (published / "preprocessor_config.json").write_text(json.dumps(hf | {"image_mean": [0.5] * 3}), encoding="utf-8")
    (published / "config.json").write_text("{}", encoding="utf-8")
    encoded = replace(vlm, vit=ViTHFParams(hf_pretrained=str(published)))
    with pytest.raises(ValueError, match=r"images of std \[0\.5, 0\.5, 0\.27\], but data gives"):
        compare(encoded, image_std=(0.5, 0.5, 0.5))
    facts = read_facts(replace(PARAMS, model=encoded, data=data), 1)
    derived = data.derive_colors(facts)
    assert {name: item.value for name, item in derived.items()} == {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.27),
    }
    assert derived["image_std"].source == str(published)
    assert compare(encoded, image_std=derived["image_std"].value) == []
    unknown = replace(vlm, vit=ViTHFParams(hf_pretrained="timm:vit_tiny", img_size=16, patch_size=8))
    assert compare(unknown) == ["timm:vit_tiny keeps no image processor, so it is not compared with the data's."]


def test_a_published_model_is_read_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--clip"
    snapshot = repository / "snapshots" / "0123"
    write_tokenizer(snapshot, VOCAB)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    images = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.5, 0.5, 0.27], "do_center_crop": False}
    (snapshot / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (snapshot / "config.json").write_text('{"vocab_size": 3, "num_hidden_layers": 2}', encoding="utf-8")
    write_tokenizer(tmp_path / "same", VOCAB)
    write_tokenizer(tmp_path / "other", {"c": 0, "b": 1, "a": 2})
    manifest = write_dataset(tmp_path / "data", [1000])

    def params(name: str, tokenizer: str = "same") -> TrainExperimentParams:
        model = VLMParams(
            vit=ViTHFParams(hf_pretrained=name, img_size=16, patch_size=8),
            transformer=TransformerHFParams(hf_pretrained=name),
        )
        data = ImageCaptionDataParams(tokenizer=str(tmp_path / tokenizer), seq_len=16, dataset_manifest=[manifest])
        return replace(PARAMS, model=model, data=data)

    for name in ("owner/clip", "hf://owner/clip"):
        found = params(name)
        resolved = resolve_known(found, read_facts(found, 1, offline=True))
        data: Any = resolved.params.data
        assert (data.image_mean, data.image_std) == ((0.48, 0.45, 0.4), (0.5, 0.5, 0.27))
        assert resolved.sources["data.image_mean"] == name
        assert resolved.notices == []
        assert found.model.token_limits(read_facts(found, 1)).num_layers == 2
        with pytest.raises(ValueError, match=rf"^The weights of {name} and .* Use data of the tokenizer {name}\."):
            resolve_with(params(name, "other"))
    notices = resolve_known(params("owner/gone"), read_facts(params("owner/gone"), 1, offline=True)).notices
    assert notices[0] == (
        "model.vit.hf_pretrained: owner/gone is not on this machine, so its layers, tokens and images are checked when "
        "training starts."
    )
    for name, message in (
        ("owner/gone", r"owner/gone is not a local folder, is not in the cache of Hugging Face, and HF_HUB_OFFLINE is"),
        (str(tmp_path / "gone"), r"\S*/gone is not a folder with a config\.json\.$"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^model\.vit\.hf_pretrained: {message}"):
            read_facts(params(name), 1)
