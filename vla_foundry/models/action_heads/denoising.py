"""Heads that turn noise into actions: flow matching (flow_transformer) and denoising diffusion (ddpm_transformer).

Tokens are conditioning, proprioception and noised actions, in this order. The time is told in one of three ways
(`time_conditioning`):

  concat          a token in front of all
  add             added to the conditioning; with cross-attention to the actions
  adaptive_norm   by the norms that the actions' tokens pass

What is not told the time and does not see the actions is context: its keys and values are made once for all draws of a
sample in training, and once for all steps of sampling. That is so with adaptive_norm and with cross-attention.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models.action_heads.base import (
    ActionWindow,
    DrawKey,
    HeadWidths,
    reduce_loss,
    register_action_head,
)
from vla_foundry.models.action_heads.decoder import Memory, Reading, Tokens
from vla_foundry.models.action_heads.transformer_head import (
    Part,
    TransformerHead,
    append_steps,
    encode_sines,
    join_parts,
    place_steps,
)
from vla_foundry.models.backbones.base import Conditioning
from vla_foundry.models.noise.base import create_noise
from vla_foundry.models.noise.draws import draw_normals, draw_uniforms
from vla_foundry.params.models.action_heads import DenoisingHeadParams

# the time is encoded in units of 1/1000
_TIME_UNITS = 1000.0


class Observation(NamedTuple):
    """What of a batch is the same at every time."""

    # joint reading: conditioning (B, K, C or D) with its mask, and encoded proprioception
    condition: Part | None
    proprioception: Tensor | None
    # else: both as context, and its keys and values where they are kept
    context: Tokens | None
    memories: list[Memory] | None
    # (N, T), True at steps that are no padding; None: none is
    step_mask: Tensor | None
    # draws of each sample, next to each other: N is B times this
    num_draws: int


class DenoisingHead(TransformerHead):
    """A transformer that predicts, from noised actions and their time, the way back."""

    def __init__(self, params: DenoisingHeadParams, widths: HeadWidths) -> None:
        super().__init__(
            params, widths, reading=_choose_reading(params), is_modulated=params.time_conditioning == "adaptive_norm"
        )
        self.params = params
        self.process = create_noise(params.noise_params())
        dim = params.transformer.hidden_dim
        self.time_encoding: Any
        if params.time_encoding == "table":
            self.time_encoding = nn.Embedding(self.process.params.num_timesteps, widths.conditioning_dim)
        else:
            self.time_encoding = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        # what sampling repeats; compile_sampling replaces it
        self._repeated: Any = self.predict

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the squared error of the prediction at drawn times and noise, summed; the mean over draws."""
        R = self.params.num_action_head_repeats
        # whatever the weights' precision
        dtype = torch.promote_types(self.dtype, torch.float32)
        actions = window.actions.to(dtype).repeat_interleave(R, dim=0)
        noise = self._draw(key, "noise", R, window).to(dtype)
        uniforms = draw_uniforms(key.samples, R, seed=key.seed, purpose=f"{key.stage} time").flatten()
        times = self.process.spread_times(uniforms)
        free, held = (mask.repeat_interleave(R, dim=0) for mask in (window.free_mask(), window.held_actions()))
        noised = torch.where(free, self.process.add_noise(actions, noise, times), held.to(dtype))
        if self.training and self.params.input_noise_std > 0:
            noised = noised + self.params.input_noise_std * self._draw(key, "input noise", R, window).to(dtype)
        observation = self.observe(conditioning, window, num_draws=R, key=key)
        predicted = self.predict(noised, times, observation)
        errors = (predicted.to(dtype) - self.process.target(actions, noise)).square()
        return reduce_loss(errors, window, R)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, window: ActionWindow, key: DrawKey, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Go from noise, a function of each sample's seed, to actions; conditioning is read once."""
        return self.sample_from(self._draw(key, "noise", 1, window), conditioning, window, num_steps)

    @torch.no_grad()
    def sample_from(
        self, noise: Float[Tensor, "B T A"], conditioning: Conditioning, window: ActionWindow, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Go from this noise to actions."""
        observation = self.observe(conditioning, window)
        if observation.context is not None:
            observation = observation._replace(memories=self.transformer.remember(observation.context))
        free, held = window.free_mask(), window.held_actions()
        return self.process.sample(
            lambda x, times: self._repeated(x, times, observation).float(),
            noise,
            num_steps or self.process.params.num_inference_steps,
            lambda x: torch.where(free, x, held),
        )

    def observe(
        self, conditioning: Conditioning, window: ActionWindow, *, num_draws: int = 1, key: DrawKey | None = None
    ) -> Observation:
        """Encode what is the same at every time.

        Args:
            key: of the noise that is added to proprioception in training.
        """
        encoded = self.encode_proprioception(window.proprioception)
        if encoded is not None and self.training and key is not None and self.params.input_noise_std > 0:
            drawn = draw_normals(
                key.samples, encoded.shape[1:], seed=key.seed, purpose=f"{key.stage} proprioception noise"
            )
            encoded = encoded + self.params.input_noise_std * drawn.to(encoded.dtype)
        tokens = conditioning.tokens.to(self.dtype)
        if self.params.time_encoding == "mlp":
            # else the time is added before this
            tokens = self.condition_encode(tokens)
        step_mask = _repeat(window.step_mask, num_draws)
        if self.transformer.reading == "joint":
            return Observation(Part(tokens, conditioning.mask), encoded, None, None, step_mask, num_draws)
        parts = [Part(tokens, conditioning.mask)] + ([] if encoded is None else [Part(encoded)])
        return Observation(None, None, join_parts(parts), None, step_mask, num_draws)

    def predict(
        self, noised: Float[Tensor, "N T A"], times: Float[Tensor, " N"], observation: Observation
    ) -> Float[Tensor, "N T A"]:
        """Return what the process calls the target: velocity, or noise.

        Args:
            noised: noised actions, with what is known in its place.
            times: 0 is data, 1 is noise.
        """
        actions = self.encode_steps(self.action_encode(noised.to(self.dtype)))  # (N, T, D)
        time = self._encode_time(times)  # (N, D), or (N, C) from a table
        T = actions.shape[1]
        if self.transformer.reading == "joint":
            front = self._front(time, observation)
            steps = place_steps(actions, observation.step_mask, front)
            hidden = self.transformer(append_steps(front, steps), None, num_outputs=T)
            return self.output_layer(hidden)
        is_modulated = self.params.time_conditioning == "adaptive_norm"
        if self.params.time_conditioning == "add":
            actions = actions + time.unsqueeze(1)
        in_front = observation.context if self.transformer.reading == "prefix" else None
        if self.params.time_conditioning == "concat":
            in_front = join_parts([Part(time.unsqueeze(1))])
        steps = place_steps(actions, observation.step_mask, in_front)
        if self.params.time_conditioning == "concat" and in_front is not None:
            steps = append_steps(in_front, steps)
        hidden = self.transformer(
            steps,
            observation.context,
            time=time if is_modulated else None,
            memories=observation.memories,
            num_outputs=T,
        )
        return self.output_layer(hidden)

    def compile_sampling(self, **options: Any) -> None:
        """Compile the prediction that each step of sampling makes."""
        self._repeated = torch.compile(self.predict, **options)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights; a table of times starts as sines."""
        super().init_weights()
        if isinstance(self.time_encoding, nn.Embedding):
            table = self.time_encoding.weight
            table.copy_(encode_sines(torch.arange(table.shape[0], device=table.device), table.shape[1]))
        else:
            for module in (self.time_encoding[0], self.time_encoding[2]):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def _front(self, time: Tensor, observation: Observation) -> Tokens:
        """Time, conditioning and proprioception as the tokens in front of the actions."""
        assert observation.condition is not None
        R = observation.num_draws
        tokens, mask = _repeat(observation.condition.values, R), _repeat(observation.condition.mask, R)
        assert tokens is not None
        parts = []
        is_encoded = self.params.time_encoding == "mlp"
        if self.params.time_conditioning == "concat":
            parts = [Part((time if is_encoded else self.condition_encode(time)).unsqueeze(1))]
        else:
            tokens = tokens + time.unsqueeze(1)
        parts.append(Part(tokens if is_encoded else self.condition_encode(tokens), mask))
        proprioception = _repeat(observation.proprioception, R)
        if proprioception is not None:
            parts.append(Part(proprioception))
        return join_parts(parts)

    def _encode_time(self, times: Tensor) -> Tensor:
        if isinstance(self.time_encoding, nn.Embedding):
            num = self.time_encoding.num_embeddings
            return self.time_encoding((times * num).round().long().clamp(0, num - 1))
        sines = encode_sines(times * _TIME_UNITS, self.params.transformer.hidden_dim)
        return self.time_encoding(sines.to(self.dtype))

    def _draw(self, key: DrawKey, purpose: str, num_draws: int, window: ActionWindow) -> Float[Tensor, "N T A"]:
        """Normal numbers for each draw of each sample, fp32."""
        shape = (num_draws, *window.actions.shape[1:])
        return draw_normals(key.samples, shape, seed=key.seed, purpose=f"{key.stage} {purpose}").flatten(0, 1)


def _choose_reading(params: DenoisingHeadParams) -> Reading:
    if params.conditioning == "cross_attention":
        return "cross"
    return "prefix" if params.time_conditioning == "adaptive_norm" else "joint"


def _repeat(x: Tensor | None, num_draws: int) -> Tensor | None:
    return x if x is None or num_draws == 1 else x.repeat_interleave(num_draws, dim=0)


@register_action_head("flow_transformer")
@register_action_head("ddpm_transformer")
def create_denoising_head(params: DenoisingHeadParams, widths: HeadWidths) -> DenoisingHead:
    """Build the head; its noise process makes the difference."""
    head = DenoisingHead(params, widths)
    head.init_weights()
    return head
