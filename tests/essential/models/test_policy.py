"""Policies train, sample, are saved and loaded, and give the same numbers however they are run."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_foundry.config.command_line import parse
from vla_foundry.config.loading import dump_params
from vla_foundry.models import create_batch_handler, create_model, load_model_checkpoint
from vla_foundry.models.action_heads.action_head import HeadWidths, create_action_head
from vla_foundry.params import ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.models.policy import RegressionPolicyParams
from vla_foundry.training.checkpoint_writer import save_checkpoint
from vla_foundry.training.distributed import parallelize, strip_wrapper_names
from vla_foundry.training.loop import train_step
from vla_foundry.world import World

SCRIPT = Path(__file__).with_name("policy_run.py")
HEADS = ["flow adaptive", "flow concat", "flow add", "flow cross", "flow cross concat", "ddpm", "regression"]
HEADS += ["flow layers", "flow layers concat", "regression layers", "flow insulated", "fast tokens", "discrete bins"]
# heads whose loss has no noise
EXACT = ["regression", "regression layers", "fast tokens", "discrete bins"]


class Policy:
    """A policy, and the inputs of a batch for it."""

    def __init__(self, policies: ModuleType, head: str, backbone: str = "vlm", **options: Any) -> None:
        self.policies = policies
        head_params = policies.create_head_params(head, **options)
        self.params: TrainExperimentParams = policies.create_params(
            policies.create_backbone_params(backbone), head_params, is_insulated=head == "flow insulated"
        )
        self.model: Any = policies.create_policy(self.params)
        self.handler = create_batch_handler(self.params)

    def prepare(self, batch: Any) -> dict[str, Any]:
        return self.handler.prepare(batch, "cpu")

    def prepare_sampling(self, batch: Any) -> dict[str, Any]:
        return self.handler.prepare_sampling(batch, "cpu")

    def randomize(self) -> "Policy":
        """Give weights that start at zero, gains and biases other values, so that nothing is hidden."""
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.ndim == 1 or "modulation" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return self


@pytest.fixture
def create(policies: ModuleType) -> Callable[..., Policy]:
    return lambda head="flow adaptive", backbone="vlm", **options: Policy(policies, head, backbone, **options)


def loss_of(policy: Policy, batch: Any) -> Tensor:
    output = policy.model(**policy.prepare(batch))
    return output.sum / output.count


@pytest.mark.parametrize("head", HEADS)
def test_every_trained_weight_gets_a_gradient_and_the_others_are_frozen(head: str, create, policies) -> None:
    policy = create(head)
    output = policy.model(**policy.prepare(policies.create_batch(0)))
    output.sum.backward()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in policy.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"vision_language_backbone.model.transformer.output.weight"}


@pytest.mark.parametrize("head", HEADS)
def test_the_count_is_that_of_numbers_to_be_predicted(head: str, create, policies) -> None:
    policy, batch = create(head), policies.create_batch(0)
    inputs = policy.prepare(batch)
    output = policy.model(**inputs)
    # 5 steps of 3 dimensions, and 3 steps of 2
    assert output.count.item() == policy.handler.count_targets(inputs).item() == 5 * 3 + 3 * 2
    plain = policy.prepare(policies.create_batch(0, is_plain=True))
    assert "action_dim_mask" not in plain
    assert plain["step_mask"] is None
    assert policy.handler.count_targets(plain).item() == policy.model(**plain).count.item() == 2 * 5 * 3


def test_without_anything_to_predict_the_loss_is_zero_with_a_gradient(create, policies) -> None:
    policy, batch = create(), policies.create_batch(0)
    batch["future_mask"] = torch.zeros_like(batch["future_mask"])
    output = policy.model(**policy.prepare(batch))
    output.sum.backward()
    assert (output.sum.item(), output.count.item()) == (0, 0)
    assert all(not parameter.grad.any() for parameter in policy.model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("head", HEADS)
def test_a_rank_without_samples_validates_on_a_row_of_padding(head: str, create, policies) -> None:
    policy, batch = create(head), policies.create_batch(0, num_samples=1)
    nothing = torch.zeros_like(batch["future_mask"])
    batch |= {"positions": torch.arange(0), "past_mask": nothing, "future_mask": nothing, "is_padding": ~nothing}
    policy.model.eval()
    output = policy.model(**policy.prepare(batch))
    assert (output.sum.item(), output.count.item()) == (0, 0)


@pytest.mark.parametrize("head", HEADS)
def test_masked_steps_and_dimensions_are_neither_learned_nor_seen(head: str, create, policies) -> None:
    policy, batch = create(head).randomize(), policies.create_batch(0)
    inputs = policy.prepare(batch)
    output = policy.model(**inputs)
    may_count = policies.free_mask(batch) | batch["past_mask"][..., None]
    if head not in ("fast tokens", "discrete bins"):  # where tokens stand for the actions
        inputs["actions"] = inputs["actions"].requires_grad_()
        policy.model(**inputs).sum.backward()
        gradient = inputs["actions"].grad
        assert gradient is not None
        assert not gradient[~may_count].any()
        assert gradient[policies.free_mask(batch)].all()
    spoiled = torch.where(may_count, batch["actions"], 7.0)
    again = policy.model(**policy.prepare({**batch, "actions": spoiled}))
    assert torch.equal(again.sum, output.sum)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", ["vlm", "vlm prefix"])
def test_a_sample_does_not_depend_on_its_batch(head: str, backbone: str, create, policies) -> None:
    policy = create(head, backbone).randomize()
    policy.model.eval()
    batch = policies.create_batch(0, num_samples=3, lengths=[14, 20, 16])
    together = policy.model.sample(policy.prepare_sampling(batch), seeds=torch.tensor([5, 6, 7]), num_steps=3)
    alone = {name: value[1:2] for name, value in batch.items() if isinstance(value, Tensor)}
    alone = {**batch, **alone, "pixel_values": batch["pixel_values"][2:4], "input_ids": batch["input_ids"][1:2, :20]}
    del alone["documents"]
    own = policy.model.sample(policy.prepare_sampling(alone), seeds=torch.tensor([6]), num_steps=3)
    torch.testing.assert_close(own, together[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [head for head in HEADS if head not in EXACT])
def test_noise_differs_by_sample_and_is_fixed_in_validation(head: str, create, policies) -> None:
    policy, batch = create(head).randomize(), policies.create_batch(0)
    moved = {**batch, "positions": batch["positions"] + 1}
    assert torch.equal(loss_of(policy, batch), loss_of(policy, batch))
    training = loss_of(policy, batch)
    assert loss_of(policy, moved) != training
    policy.model.eval()
    validation = loss_of(policy, batch)
    assert validation != training
    assert torch.equal(validation, loss_of(policy, batch))


def test_observed_steps_stay_and_nothing_is_made_where_there_is_nothing(create, policies) -> None:
    policy, batch = create().randomize(), policies.create_batch(0)
    made = policy.model.sample(policy.prepare_sampling(batch), seeds=torch.tensor([1, 2]), num_steps=4)
    assert made.dtype == torch.float32
    past, free = batch["past_mask"], policies.free_mask(batch)
    assert torch.equal(made[past], batch["actions"][past])
    assert not made[~(past[..., None] | free)].any()
    assert made[free].all()
    # only observed steps are read
    spoiled = {**batch, "actions": torch.where(past[..., None], batch["actions"], 9.0)}
    again = policy.model.sample(policy.prepare_sampling(spoiled), seeds=torch.tensor([1, 2]), num_steps=4)
    assert torch.equal(again, made)


def test_sampling_needs_no_actions_and_is_a_function_of_the_seed(create, policies) -> None:
    policy, batch = create().randomize(), policies.create_batch(0, is_plain=True)
    batch["past_mask"], batch["future_mask"] = batch["past_mask"] & False, batch["future_mask"] | True
    del batch["actions"], batch["positions"]
    inputs = policy.handler.prepare_sampling(batch, "cpu")
    first, second, other = (
        policy.model.sample(inputs, seeds=torch.tensor(seeds)) for seeds in ([1, 2], [1, 2], [1, 3])
    )
    assert torch.equal(first, second)
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    batch["past_mask"][0, 0] = True
    with pytest.raises(ValueError, match="past_mask says that steps are observed, but there are no actions"):
        policy.handler.prepare_sampling(batch, "cpu")


@pytest.mark.parametrize("head", ["flow adaptive", "flow add", "flow cross", "ddpm", "regression", *HEADS[7:]])
def test_a_policy_is_loaded_as_it_was_saved(head: str, create, policies, tmp_path: Path) -> None:
    policy = create(head).randomize()
    state = policies.create_train_state(
        policy.model, policy.model, hparams=policy.params.hparams, ema=policies.EMAParams(), total_steps=2
    )
    batches = [policies.create_batch(3)]
    train_step(state, batches, handler=policy.handler, hparams=policy.params.hparams, world=World())
    folder = save_checkpoint(tmp_path, state, world=World(), facts={})
    config = tmp_path / "config_model.yaml"
    config.write_text(dump_params(policy.params.model), encoding="utf-8")
    params = load_params_from_yaml(ModelParams, str(config))
    assert params == policy.params.model
    loaded: Any = create_model(params, load_pretrained=False)
    load_model_checkpoint(loaded, folder)
    inputs = policy.prepare(policies.create_batch(1))
    for model in (policy.model, loaded):
        model.eval()
    seeds, asked = torch.tensor([3, 4]), policy.prepare_sampling(policies.create_batch(1))
    assert torch.equal(loaded.sample(asked, seeds=seeds), policy.model.sample(asked, seeds=seeds))
    assert torch.equal(loaded(**inputs).sum, policy.model(**inputs).sum)


def test_a_backbone_starts_from_a_run_of_a_vision_language_model(create, policies, tmp_path: Path) -> None:
    torch.manual_seed(5)
    vlm: Any = create_model(policies.VLM)
    state = policies.create_train_state(
        vlm, vlm, hparams=policies.HyperParams(warmup=0.0), ema=policies.EMAParams(), total_steps=2
    )
    save_checkpoint(tmp_path, state, world=World(), facts={})
    backbone = policies.VLMFoundryBackboneParams(
        vlm=policies.VLM, num_vlm_layers_to_use=2, resume_from_checkpoint=str(tmp_path)
    )
    params = policies.create_params(backbone, policies.create_head_params("flow adaptive"))
    model = policies.create_policy(params)
    for name, value in vlm.state_dict().items():
        assert torch.equal(model.vision_language_backbone.model.state_dict()[name], value)
    # and a policy's own checkpoint is one of its backbone too
    folder = tmp_path / "policy"
    with torch.no_grad():
        model.vision_language_backbone.model.projection.proj.weight.fill_(0.5)
    state = policies.create_train_state(
        model, model, hparams=policies.HyperParams(warmup=0.0), ema=policies.EMAParams(), total_steps=2
    )
    save_checkpoint(folder, state, world=World(), facts={})
    again = policies.create_policy(
        policies.create_params(
            policies.change(backbone, resume_from_checkpoint=str(folder)),
            policies.create_head_params("regression"),
        )
    )
    assert (again.vision_language_backbone.model.projection.proj.weight == 0.5).all()


@pytest.mark.parametrize("head", ["flow adaptive", "flow cross concat", "regression", "flow layers", "fast tokens"])
def test_recomputed_activations_give_the_same_gradients(head: str, create, policies) -> None:
    gradients = []
    for grad_checkpointing in (False, True):
        policy = create(head).randomize()
        parallelize(policy.model, DistributedParams(), world=World(), grad_checkpointing=grad_checkpointing)
        policy.model(**policy.prepare(policies.create_batch(0))).sum.backward()
        gradients.append({strip_wrapper_names(name): p.grad for name, p in policy.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("backbone", ["vlm", "vit"])
def test_a_policy_made_on_the_meta_device_is_whole_once_it_has_memory(backbone: str, create, policies) -> None:
    whole = create("flow add", backbone).randomize()
    with torch.device("meta"):
        model: Any = create_model(whole.params.model, load_pretrained=False)
    model.to_empty(device="cpu")
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    model.load_state_dict(whole.model.state_dict())
    inputs = whole.prepare(policies.create_batch(0))
    assert torch.equal(model(**inputs).sum, whole.model(**inputs).sum)


@pytest.mark.slow
def test_two_ranks_train_and_resume_as_one_process_does_sharded_or_not(
    policies, check_two_ranks: Callable, tmp_path: Path
) -> None:
    policies.create_clip().save_pretrained(tmp_path / "clip")
    alone = {name: policies.train(name, tmp_path, World()) for name in policies.TRAINED}
    check_two_ranks(SCRIPT, tmp_path, alone)


def test_a_policy_without_widths_is_an_error(policies) -> None:
    params = RegressionPolicyParams(
        vision_language_backbone=policies.create_backbone_params("vit"),
        action_head=policies.create_head_params("regression"),
    )
    with pytest.raises(ValueError, match=r"model\.action_dim is missing\. Give --model\.action_dim N"):
        create_model(params)


# of LBM's two arms
WIDTHS = ["--action_dim", "20", "--proprioception_dim", "20"]


def load_preset(name: str, *words: str) -> Any:
    return parse(ModelParams, ["--config_path", f"config_presets/models/{name}.yaml", *WIDTHS, *words], prog="").params


def count(module: Any, *, without: tuple[str, ...] = ()) -> float:
    """Parameters in millions, but for those whose names hold one of `without`."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if not any(part in name for part in without)) / 1e6


def test_foundry_vla() -> None:
    params = load_preset("foundry_vla_1.7b", "--vision_language_backbone.vlm.image_token_id", "49190")
    with torch.device("meta"):
        policy: Any = create_model(params)
    assert count(policy) == pytest.approx(1852, abs=1)
    assert count(policy, without=("embeddings", "output.weight")) == pytest.approx(1650, abs=1)
    backbone, head = policy.vision_language_backbone.model, policy.action_head
    assert count(backbone) == pytest.approx(1527.2, abs=0.1)
    assert count(backbone.vit) == pytest.approx(85.7, abs=0.1)
    assert count(head) == pytest.approx(325, abs=0.5)
    # a row for each time, and the map from the states of four layers
    assert count(head.time_encoding) == 1000 * 8192 / 1e6
    assert count(head.condition_encode) == (8192 * 1024 + 1024) / 1e6
    # all that the head holds is used
    assert not any("embeddings" in name for name, _ in head.named_parameters())


def test_the_head_of_foundry_qwen3vla() -> None:
    params = load_preset("foundry_qwen3vla_2.1b")
    assert (params.vision_language_backbone.type, params.vision_language_backbone.num_vlm_layers_to_use) == (
        "vlm_backbone",
        1,
    )
    # the language model of Qwen3-VL-2B is 2048 wide
    widths = HeadWidths(action_dim=20, proprioception_dim=20, conditioning_dim=2048)
    with torch.device("meta"):
        head: Any = create_action_head(params.action_head, widths)
    assert count(head) == pytest.approx(312.5, abs=0.3)
