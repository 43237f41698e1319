# %% [markdown]
# # A policy on a Hugging Face backbone
#
# About a minute on two CPU cores. Qwen3-VL, PaliGemma, SmolVLM2 and CLIP are named by `hf_pretrained: NAME` and downloaded. Here a
# model of Qwen3-VL's architecture with random weights, and a few thousand parameters, is saved in a folder and named by it; with
# `Qwen/Qwen3-VL-2B-Instruct` in its place all else stays the same.

# %%
import json
import os
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## A small Qwen3-VL
# Skip this with a published model.

# %%
Path("words.jsonl").write_text(json.dumps({"text": "open the drawer, close the drawer"}) + "\n")
marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
Path("marks.yaml").write_text(f"special_tokens: {json.dumps(marks)}\n")

# %% magic_args="-e" language="bash"
# vla-foundry preprocess tokenizer --config_path marks.yaml --source words.jsonl --output tokenizer --vocab_size 300

# %%
import transformers as hf

tokenizer = hf.AutoTokenizer.from_pretrained("tokenizer")
template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pictures = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}}
hf.Qwen3VLProcessor(
    hf.Qwen2VLImageProcessor(**pictures),
    tokenizer,
    hf.Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
    chat_template=template,
).save_pretrained("small_qwen")
ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks), strict=True))
config = hf.Qwen3VLConfig(
    text_config={
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    vision_config={
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    },
    image_token_id=ids["<|image_pad|>"],
    video_token_id=ids["<|video_pad|>"],
    vision_start_token_id=ids["<|vision_start|>"],
    vision_end_token_id=ids["<|vision_end|>"],
)
model = hf.Qwen3VLForConditionalGeneration(config)
model.save_pretrained("small_qwen")
sum(parameter.numel() for parameter in model.parameters())

# %% [markdown]
# ## Data and configs
# `new-policy` writes a training config for a dataset and a backbone. Image size, tokens and prompts are those of the model's own
# processor.

# %% magic_args="-e" language="bash"
# vla-foundry demos --tasks drawer-open-v3@half --episodes 4 --cameras workspace --image_size 64 --num_workers 0 \
#     --output_dir demos
# vla-foundry new-policy --dataset demos --backbone hf:small_qwen --output policy
# vla-foundry preprocess robotics --config_path policy/preprocess.yaml --num_workers 0 2>&1 | grep samples
# sed -n '/^model:/,/^  action_head:/p' policy/train.yaml

# %% [markdown]
# ## Train
# Options that matter with a large backbone, each a flag: `--model.vision_language_backbone.freeze true` trains the head alone,
# `--model.lora.targets '["vision_language_backbone.*"]'` trains adapters, `--hparams.grad_checkpointing true` and
# `--distributed.fsdp true` save memory. `vla-foundry plan` says what fits.

# %% magic_args="-e" language="bash"
# vla-foundry train --config_path policy/train.yaml --data.num_workers 0 --total_train_samples 64 \
#     --hparams.global_batch_size 8 --hparams.per_gpu_batch_size 8 --hparams.precision fp32 --num_checkpoints 1 \
#     --log_every_n_steps 2 --model.vision_language_backbone.num_vlm_layers_to_use 2 --model.action_head.transformer.n_layers 2

# %% [markdown]
# The run folder holds the model's own files and processor, so it is served and evaluated without the download.

# %% language="bash"
# ls policy/runs/policy policy/runs/policy/model_files
