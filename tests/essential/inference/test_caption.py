"""`vla-foundry caption`, from a language run to a vision-language run to captions, by the public commands."""

import io
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.essential.byte_level import train_tokenizer
from vla_foundry.cli import main
from vla_foundry.config.loading import dump_params
from vla_foundry.data.pipelines.image_caption import ImageCaptionPipeline
from vla_foundry.data.pipelines.interleaved import create_interleaved_pipeline
from vla_foundry.images.processor import load_processor
from vla_foundry.inference.caption import (
    Captioner,
    Question,
    answer,
    create_prompt_batch,
    encode_question,
    gather_images,
    load_captioner,
)
from vla_foundry.params.data.image_caption import ImageCaptionDataParams, InterleavedDataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.params.models.vlm import VLMParams

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
PLACES = ("left", "right")


def draw_picture(color: str, place: str, size: tuple[int, int] = (24, 40)) -> bytes:
    """A bar of a colour at the left or right of a grey picture."""
    array = np.full((*size, 3), 90, dtype=np.uint8)
    width = size[1] // 2
    array[:, :width] = COLORS[color] if place == "left" else 90
    array[:, width:] = COLORS[color] if place == "right" else 90
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def caption_of(color: str, place: str) -> str:
    return f"A {color} bar at the {place}."


PICTURES = {(color, place): draw_picture(color, place) for color in COLORS for place in PLACES}


def flags(section: str, values: str) -> str:
    """`a 1 b 2` -> `--section.a 1 --section.b 2`."""
    return " ".join(word if n % 2 else f"--{section}.{word}" for n, word in enumerate(values.split()))


def _save_tokenizer(folder: Path) -> None:
    texts = [caption_of(*key) for key in PICTURES] * 3 + ["User: Describe. Assistant:"]
    train_tokenizer(320, texts, ["<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a language run `runs/llm` and a vision-language run `runs/vlm`, all made by commands."""
    folder = tmp_path_factory.mktemp("caption")
    _save_tokenizer(folder / "tokenizer")
    (folder / "text").mkdir()
    lines = (json.dumps({"text": caption_of(*key)}) + "\n" for key in list(PICTURES) * 16)
    (folder / "text" / "docs.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "pairs").mkdir()
    for number, (key, picture) in enumerate(list(PICTURES.items()) * 4):
        (folder / "pairs" / f"{number:03d}.png").write_bytes(picture)
        (folder / "pairs" / f"{number:03d}.txt").write_text(caption_of(*key), encoding="utf-8")
    at = str(folder)
    source = f"--source {at}/text --output {at}/tokens --tokenizer {at}/tokenizer --seq_len 32 --num_workers 0"
    main(["preprocess", "text", *source.split()])
    main(["preprocess", "image_caption", *f"--source {at}/pairs --output {at}/shards --num_workers 0".split()])
    shared = f"""--save_path {at}/runs --data.allow_multiple_epochs true --data.num_workers 0 --num_checkpoints 1
        --hparams.precision fp32 --hparams.warmup 0.05 --hparams.lr 3e-3 --hparams.global_batch_size 16
        --hparams.per_gpu_batch_size 16 --log_every_n_steps 10"""
    shape = "n_layers 2 n_heads 2 hidden_dim 48 max_seq_len 128 vocab_size 320"
    train = f"""--name llm --data.type text --data.dataset_manifest [{at}/tokens/manifest.jsonl] --data.seq_len 32
        --total_train_samples 64 --model.type transformer {flags("model", shape)} {shared}"""
    main(["train", *train.split()])
    vit = "hidden_dim 48 inter_dim 96 n_layers 2 n_heads 2 img_size 16 patch_size 4 projector_pixel_shuffle_factor 2"
    train = f"""--name vlm --data.type image_caption --data.dataset_manifest [{at}/shards/manifest.jsonl]
        --data.seq_len 127 --data.prompts [<image>Describe.] --total_train_samples 1280 --model.type vlm
        --data.augmentation.image.crop.enabled true --data.augmentation.image.crop.shape [20,36]
        --model.transformer.resume_from_checkpoint {at}/runs/llm
        {flags("model.transformer", shape)} {flags("model.vit", vit)} {shared}"""
    main(["train", *train.split()])
    return folder


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    """The trained run, loaded while what it was made from is gone."""
    for name in ("tokenizer", "shards", "runs/llm"):
        (folder / name).rename(folder / f"gone_{Path(name).name}")
    captioner = load_captioner(str(folder / "runs" / "vlm"), device="cpu")
    for name in ("tokenizer", "shards", "runs/llm"):
        (folder / f"gone_{Path(name).name}").rename(folder / name)
    return captioner


def questions(prompt: str = "<image>Describe.") -> list[Question]:
    return [Question((picture,), prompt) for picture in PICTURES.values()]


def test_every_picture_gets_its_caption(captioner: Captioner) -> None:
    assert answer(captioner, questions(), max_new_tokens=24) == [caption_of(*key) for key in PICTURES]


def test_the_language_run_gave_its_tokenizer_and_the_run_keeps_its_processor(folder: Path) -> None:
    params = load_experiment_params_from_yaml(str(folder / "runs" / "vlm" / "config.yaml"))
    assert params.data.tokenizer_name() == str(folder / "runs" / "llm" / "tokenizer")
    processor = load_processor(folder / "runs" / "vlm" / "processor")
    assert isinstance(params.model, VLMParams)
    assert processor.image_token_id == params.model.image_token_id
    assert len(processor.tokenizer) == params.model.vocab_size
    lines = [
        json.loads(line)
        for line in (folder / "runs" / "vlm" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert max(line["padding_share"] for line in lines if line["kind"] == "train") < 0.05


def test_inference_gives_the_model_what_validation_does_bit_for_bit(captioner: Captioner) -> None:
    assert isinstance(captioner.data, ImageCaptionDataParams)
    pipeline = ImageCaptionPipeline(captioner.data)
    key = ("blue", "right")
    draws = {"__seed__": 0, "__position__": 3, "__is_training__": False}
    sample = {**draws, "png": PICTURES[key], "txt": caption_of(*key).encode()}
    for stage in pipeline.stages:
        result = stage(sample)
        assert result is not None
        sample = result
    trained = sample["inputs"]
    asked = encode_question(captioner, Question((PICTURES[key],), "<image>Describe."))
    length = len(asked["input_ids"])
    assert torch.equal(asked["pixel_values"], trained["pixel_values"])
    assert torch.equal(asked["input_ids"], trained["input_ids"][:length])
    assert trained["target_mask"].tolist() == [False] * length + [True] * (len(trained["input_ids"]) - length)


def test_answers_do_not_depend_on_the_other_images(captioner: Captioner) -> None:
    for temperature in (0.0, 1.5):
        settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
        asked = [*questions()[:3], Question(questions()[3].images * 2, "Describe. What does this say, please?")]
        together = answer(captioner, asked, **settings)
        assert [answer(captioner, [question], **settings)[0] for question in asked] == together
        assert answer(captioner, asked, **settings, batch_size=2) == together


def test_the_cached_prefix_gives_the_tokens_of_whole_rows(captioner: Captioner) -> None:
    from vla_foundry.inference.decoding import generate

    found = []
    for use_cache in (True, False):
        inputs = create_prompt_batch(captioner, questions()[:1])
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        settings = {"max_new_tokens": 12, "use_cache": use_cache, "prompt_inputs": inputs}
        found.append(generate(captioner.model, ids, mask, **settings)[0].tokens)
    assert found[0] == found[1]


def test_the_command_prints_a_line_for_each_image(
    folder: Path, captioner: Captioner, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(folder / "pairs" / f"{number:03d}.png") for number in range(2)]
    main(["caption", "--checkpoint", str(folder / "runs" / "vlm"), "--image", *names, "--device", "cpu"])
    expected = [f"{name}: {caption_of(*key)}" for name, key in zip(names, PICTURES, strict=False)]
    assert capsys.readouterr().out.splitlines() == expected


def test_images_are_gathered_from_one_flag_or_several() -> None:
    words = ["--image", "a.png", "b.png", "--seed", "1", "--image=c.png"]
    assert gather_images(words) == ["--seed", "1", '--image=["a.png", "b.png", "c.png"]']


def score(place: Path, *words: str) -> None:
    main(["evaluate", "captions", "--annotations", str(place / "annotations.json"), "--images", str(place), *words])


def test_scores_of_a_runs_captions_are_kept_in_the_run(folder: Path, tmp_path: Path) -> None:
    keys = list(PICTURES)
    for number, picture in enumerate(PICTURES.values()):
        (tmp_path / f"{number}.png").write_bytes(picture)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(keys))]
    annotations = [{"image_id": number, "caption": caption_of(*key)} for number, key in enumerate(keys)]
    text = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations.json").write_text(text, encoding="utf-8")
    run, results = folder / "runs" / "vlm", tmp_path / "results.json"
    words = ["--checkpoint", str(run), "--results", str(results), "--batch_size", "3", "--num_images", "4"]
    score(tmp_path, *words, "--name", "coco val")
    # the model has learned all of its pictures
    expected = [{"image_id": number, "caption": caption_of(*key)} for number, key in enumerate(keys[:4])]
    assert json.loads(results.read_text(encoding="utf-8")) == expected
    table = json.loads((run / "evaluation" / "coco_val.json").read_text(encoding="utf-8"))
    assert table["metrics"]["ROUGE-L"] == {"value": 1.0, "interval": [1.0, 1.0], "n": 4}
    assert table["settings"]["num_images"] == 4


@pytest.mark.parametrize("file_name", ["../secret.png", "/etc/passwd"])
def test_images_to_score_lie_in_their_folder(
    file_name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({
        "images": [{"id": 1, "file_name": file_name}], "annotations": [{"image_id": 1, "caption": "a cat"}]
    })  # fmt: skip
    (tmp_path / "annotations.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        score(tmp_path, "--checkpoint", str(folder / "runs" / "vlm"))
    assert file_name in capsys.readouterr().err


def test_a_run_without_images_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="of type 'transformer', not a vision-language model"):
        load_captioner(str(folder / "runs" / "llm"))


def test_a_model_of_documents_goes_on_where_the_prompt_ends(
    folder: Path, captioner: Captioner, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder / "runs" / "vlm", folder / "runs" / "documents")
    params = load_experiment_params_from_yaml(str(run / "config.yaml"))
    names = {field.name for field in fields(InterleavedDataParams)} - {"dataset_modality", "stage_order"}
    documents = InterleavedDataParams(**{name: value for name, value in vars(params.data).items() if name in names})
    for data, prompt in (
        (MixtureDataParams(datasets={"documents": documents, "captions": params.data}), "<image>Describe."),
        (MixtureDataParams(datasets={"documents": documents}), "<image>"),
        (documents, "<image>"),
    ):
        (run / "config.yaml").write_text(dump_params(replace(params, data=data)), encoding="utf-8")
        assert load_captioner(str(run), device="cpu").default_prompt == prompt
    pictures = PICTURES["blue", "right"], PICTURES["red", "left"]
    parts = [{"text": "A blue bar"}, {"image": "0.png"}, {"image": "1.png"}, {"text": " at the right."}]
    sample: Any = {"__seed__": 0, "__position__": 3, "__is_training__": False, "json": json.dumps({"parts": parts})}
    sample |= {f"{number}.png": picture for number, picture in enumerate(pictures)}
    for stage in create_interleaved_pipeline(documents).stages:
        sample = stage(sample)
    asked = encode_question(load_captioner(str(run), device="cpu"), Question(pictures, "A blue bar<image>"))
    length = len(asked["input_ids"])
    assert torch.equal(asked["pixel_values"], sample["inputs"]["pixel_values"])
    assert torch.equal(asked["input_ids"], sample["inputs"]["input_ids"][:length])
    assert captioner.processor.decode(sample["inputs"]["input_ids"][length:].tolist()) == "at the right."
    name = str(folder / "pairs" / "000.png")
    main(["caption", "--checkpoint", str(run), "--image", name, "--device", "cpu", "--max_new_tokens", "3"])
    assert capsys.readouterr().out.startswith(f"{name}: ")


@pytest.fixture(scope="module")
def published(folder: Path) -> Path:
    """A tiny PaliGemma with its processor, as `from_pretrained` takes it."""
    from transformers import (
        AutoTokenizer,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>"})
    image_processor: Any = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    config = PaliGemmaConfig(
        vision_config=vision | tiny | {"projection_dim": 32},
        text_config=text | tiny | {"vocab_size": len(processor.tokenizer)},
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder / "published")
    processor.save_pretrained(folder / "published")
    return folder / "published"


def test_a_hugging_face_model_captions_from_its_run_alone(folder: Path, published: Path) -> None:
    train = f"""--name hf --data.type image_caption --data.dataset_manifest [{folder}/shards/manifest.jsonl]
        --data.seq_len 120 --data.num_workers 0 --save_path {folder}/runs --num_checkpoints 1
        --data.allow_multiple_epochs true --total_train_samples 960 --hparams.lr 1e-2 --hparams.warmup 0.1
        --hparams.global_batch_size 16 --hparams.per_gpu_batch_size 16 --hparams.precision fp32
        --model.type vlm_hf --model.hf_pretrained {published}"""
    main(["train", *train.split()])
    published.rename(folder / "gone_published")
    captioner = load_captioner(str(folder / "runs" / "hf"), device="cpu")
    asked = [*questions()[:2], Question(questions()[2].images, "Say at length what this picture shows.")]
    together = answer(captioner, asked, max_new_tokens=10)
    assert [answer(captioner, [question], max_new_tokens=10)[0] for question in asked] == together
    assert all(text.startswith("A ") for text in together[:2]), together  # it has begun to learn
