"""Draws are a function of their key, and samplers integrate what they say."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_foundry.models.action_heads.noise import beta_quantiles, create_noise, draw_normals, draw_uniforms
from vla_foundry.params.models.action_heads import DDPMParams, FlowParams, NoiseParams
from vla_foundry.params.models.legacy import LegacyDDPMParams, LegacyFlowParams
from vla_foundry.randomness import draw_uniforms as draw_uniforms_on_host

STEPS = [4, 6, 7, 10, 16, 30]


def hold_nothing(x: Tensor) -> Tensor:
    return x


def flow(**values: Any) -> Any:
    return create_noise(FlowParams(**values))


def legacy_flow(**values: Any) -> Any:
    return create_noise(LegacyFlowParams(**values))


def test_draws_are_those_of_the_host() -> None:
    samples = torch.tensor([0, 3, 12345678901, -1])
    drawn = draw_uniforms(samples, 5, seed=7, purpose="x")
    for row, position in enumerate(samples.tolist()):
        host = draw_uniforms_on_host(5, seed=7, position=position, purpose="x")
        # the host keeps 53 bits, the device 24
        assert np.floor(host * 2**24).tolist() == (drawn[row] * 2**24).tolist()


def test_a_sample_draws_the_same_whatever_the_batch() -> None:
    together = draw_normals(torch.arange(9), (3, 4, 2), seed=1, purpose="noise")
    alone = draw_normals(torch.tensor([5]), (3, 4, 2), seed=1, purpose="noise")
    assert torch.equal(together[5], alone[0])
    # more draws only append
    assert torch.equal(draw_normals(torch.tensor([5]), (2, 4, 2), seed=1, purpose="noise")[0], alone[0, :2])


def test_draws_differ_by_sample_seed_and_purpose() -> None:
    draws = [
        draw_normals(torch.tensor([sample]), (4,), seed=seed, purpose=purpose)
        for sample in (0, 1)
        for seed in (0, 1)
        for purpose in ("a", "b")
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 8


def test_normals_are_normal_and_independent() -> None:
    drawn = draw_normals(torch.arange(20000), (4,), seed=3, purpose="noise").double()
    assert drawn.mean(0).abs().max() < 0.03
    assert (drawn.T.cov() - torch.eye(4)).abs().max() < 0.03
    inside = (drawn.abs() < 1).double().mean()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.01
    # neighbours in the plan
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03


def test_the_process_goes_from_actions_to_noise_and_its_velocity_says_so() -> None:
    process = flow()
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ends = [process.add_noise(actions, noise, torch.full((2,), time)) for time in (0.0, 1.0)]
    torch.testing.assert_close(torch.stack(ends), torch.stack([actions, noise]))
    middle = process.add_noise(actions, noise, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(middle[0], 0.75 * actions[0] + 0.25 * noise[0])
    torch.testing.assert_close(process.target(actions, noise), noise - actions)


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({}, 1 / 2, 1 / math.sqrt(12)),
        ({"time_distribution": "beta", "beta_a": 1.5, "beta_b": 1.0}, 0.6, math.sqrt(1.5 / (2.5**2 * 3.5))),
        ({"time_distribution": "beta", "beta_a": 2.0, "beta_b": 5.0}, 2 / 7, math.sqrt(10 / (49 * 8))),
        ({"time_distribution": "logit_normal"}, 1 / 2, 0.2083),
        ({"num_timesteps": 4}, 3 / 8, math.sqrt(5) / 8),
    ],
)
def test_times_have_their_distribution(values: dict[str, Any], mean: float, std: float) -> None:
    uniforms = (torch.arange(20000) + 0.5) / 20000
    times = (legacy_flow if "num_timesteps" in values else flow)(**values).spread_times(uniforms)
    assert 0 <= times.min() <= times.max() < 1
    assert times.mean().item() == pytest.approx(mean, abs=2e-3)
    assert times.std().item() == pytest.approx(std, abs=2e-3)
    assert (times.diff() >= 0).all()


def test_quantiles_of_beta_are_exact_where_they_have_a_formula() -> None:
    places = np.linspace(0, 1, 2048)
    np.testing.assert_allclose(beta_quantiles(1.5, 1.0), places ** (1 / 1.5), atol=1e-5)
    np.testing.assert_allclose(beta_quantiles(1.0, 3.0), 1 - (1 - places) ** (1 / 3), atol=1e-5)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize(
    "params",
    [FlowParams(), FlowParams(solver="heun"), DDPMParams(clamp_range=None), DDPMParams(beta_schedule="linear")],
    ids=["euler", "heun", "ddim", "ddim linear"],
)
def test_a_point_is_reached_exactly_in_any_number_of_steps(params: NoiseParams, num_steps: int) -> None:
    process: Any = create_noise(params)
    target = torch.tensor([[[0.3, -1.2], [2.0, 0.0]]], dtype=torch.float64)
    noise = torch.randn(1, 2, 2, dtype=torch.float64)

    def predict(x: Tensor, time: float) -> Tensor:
        if isinstance(params, FlowParams):
            # at time 0, where x is the target, the limit along the path
            return (x - target) / time if time > 0 else noise - target
        alpha = process.alphas[round(time * params.num_timesteps)]  # pyright: ignore
        return (x - math.sqrt(alpha) * target) / math.sqrt(1 - alpha)

    reached = process.sample(predict, noise, num_steps, hold_nothing)
    torch.testing.assert_close(reached, target, rtol=0, atol=1e-6)


def mixture_velocity(x: np.ndarray, time: float) -> np.ndarray:
    """The velocity that leads from noise to an even mixture of two points with variance 0.05, float64 (n, 2)."""
    centres, variance = np.array([[1.0, 0.5], [-0.7, 1.1]]), 0.05
    spread = (1 - time) ** 2 * variance + time**2
    offsets = x[:, None] - (1 - time) * centres
    weights = np.exp(-(offsets**2).sum(-1) / (2 * spread))
    weights /= weights.sum(1, keepdims=True)
    # E[noise - actions | x_t = x] in each of the two
    actions = centres + (1 - time) * variance / spread * offsets
    noise = time / spread * offsets
    return (weights[..., None] * (noise - actions)).sum(1)


def integrate(solver: str, start: np.ndarray, num_steps: int) -> np.ndarray:
    """Euler's and Heun's methods from 1 to 0, written down once more."""
    x = start.copy()
    for step in range(num_steps):
        time, after = 1 - step / num_steps, 1 - (step + 1) / num_steps
        velocity = mixture_velocity(x, time)
        if solver == "heun":
            velocity = 0.5 * (velocity + mixture_velocity(x + (after - time) * velocity, after))
        x = x + (after - time) * velocity
    return x


def sample_mixture(solver: str, start: np.ndarray, num_steps: int) -> np.ndarray:
    def predict(x: Tensor, time: float) -> Tensor:
        velocity = mixture_velocity(x[:, 0].numpy(), time)
        return torch.from_numpy(velocity)[:, None]

    noise = torch.from_numpy(start)[:, None]
    return flow(solver=solver).sample(predict, noise, num_steps, hold_nothing)[:, 0].numpy()


@pytest.fixture
def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 2))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", STEPS)
def test_sampling_is_the_textbook_method(solver: str, num_steps: int, start: np.ndarray) -> None:
    # times are told in fp32
    expected = integrate(solver, start, num_steps)
    np.testing.assert_allclose(sample_mixture(solver, start, num_steps), expected, atol=2e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(solver: str, order: int, start: np.ndarray) -> None:
    exact = integrate("heun", start, 4000)
    errors = [np.abs(sample_mixture(solver, start, num_steps) - exact).mean() for num_steps in (40, 80, 160)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order] * 2, abs=0.2)


def test_what_is_held_is_in_every_input_and_in_the_result() -> None:
    seen: list[Tensor] = []

    def hold(x: Tensor) -> Tensor:
        return torch.cat((torch.full_like(x[:, :1], 9.0), x[:, 1:]), dim=1)

    def predict(x: Tensor, time: float) -> Tensor:
        seen.append(x)
        return x

    for params in (FlowParams(), FlowParams(solver="heun"), DDPMParams()):
        process: Any = create_noise(params)
        reached = process.sample(predict, torch.randn(2, 3, 2), 3, hold)
        assert (reached[:, 0] == 9).all()
    assert all((x[:, 0] == 9).all() for x in seen)


@pytest.mark.parametrize("time", [1.0, 0.5, 0.1, 0.0])
def test_guidance_is_that_of_the_paper(time: float) -> None:
    """With the velocity A x the denoised estimate is (1 - t A) x, and so is its Jacobian."""
    torch.manual_seed(1)
    A, x = torch.randn(6, 6, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    target, weights = (
        torch.randn(1, 3, 2, dtype=torch.float64),
        torch.tensor([1.0, 0.4, 0.0]).double()[None, :, None].expand(1, 3, 2),
    )
    guided = flow().guide(lambda x, times: (A @ x.flatten()).reshape(1, 3, 2), target, weights)
    jacobian = torch.eye(6, dtype=torch.float64) - time * A
    error = (weights * (target - (jacobian @ x.flatten()).reshape(1, 3, 2))).flatten()
    # in the paper time is tau = 1 - t and the velocity points from noise to actions
    tau = 1 - time
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    strength = min(5.0, (1 - tau) / (tau * r2)) if 0 < tau < 1 else 5.0
    expected = -(-(A @ x.flatten()) + strength * (jacobian.T @ error))
    found = guided(x, time)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-9, atol=1e-9)


def test_clamping_limits_noised_actions_but_not_the_first_noise() -> None:
    process = legacy_flow(clamp_range=(-1.0, 1.0))
    noised = process.add_noise(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 4.0), torch.tensor([0.5]))
    assert noised.max() == 1
    inputs: list[float] = []

    def predict(x: Tensor, time: float) -> Tensor:
        inputs.append(x.max().item())
        return torch.zeros_like(x)

    process.sample(predict, torch.full((1, 2, 2), 4.0), 2, hold_nothing)
    assert inputs == [4.0, 1.0]


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: FlowParams(num_inference_steps=0), "num_inference_steps"),
        (
            lambda: LegacyFlowParams(clamp_range=(1.0, -1.0)),
            r"clamp_range \(\[1.0, -1.0\]\) must be \[smallest, largest\]",
        ),
        (lambda: FlowParams(beta_a=0.1), "beta_a"),
        (lambda: DDPMParams(beta_start=0.5, beta_end=0.1), "beta_start"),
    ],
)
def test_params_that_can_not_be(create: Callable[[], NoiseParams], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()


def test_more_steps_than_the_process_has_is_an_error() -> None:
    process: Any = create_noise(DDPMParams(num_timesteps=4))
    with pytest.raises(ValueError, match=r"num_steps \(5\) must be at most .* \(4\)"):
        process.sample(lambda x, times: x, torch.zeros(1, 1, 1), 5, hold_nothing)


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_legacy_diffusion_recovers_actions_from_either_prediction(target: Any) -> None:
    process = create_noise(LegacyDDPMParams(target=target, num_timesteps=20, clamp_range=None))
    actions, noise = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)).double()

    def predict(x: Tensor, time: float) -> Tensor:
        alpha = process.alphas[round(time * 20)]
        found = (x - math.sqrt(alpha) * actions) / math.sqrt(1 - alpha)
        return process.target(actions, found)

    torch.testing.assert_close(process.sample(predict, noise, 7, hold_nothing), actions)
