"""The paper's action head: a flow transformer on the hidden states at the observation token.

    x_t      = (1 - t) actions + t noise               t = 0 is data, t = 1 is noise
    loss     = |transformer(x_t, t, observation) - (noise - actions)|^2
    sampling integrates the predicted velocity from t = 1 to t = 0

The paper's layout is one sequence, `conditioning: tokens` with `time_conditioning: add`:

    [conditioning + time | proprioception | noised actions]

Conditioning is the backbone's output: the hidden states of its last layers at the observation token, side by side. Time
can also enter as a token before all others (concat) or through adaLN-Zero, which scales, shifts and gates each block of
the action tokens (adaln_zero). With `conditioning: cross_attention` the blocks read conditioning and proprioception by
cross-attention, and `add` adds the time to the actions. With `conditioning: joint_attention` each block attends to the
hidden states of one of the backbone's last layers at all tokens, beside the action tokens (decoder.py).

With adaLN-Zero or cross-attention, conditioning and proprioception do not depend on time. They form a context that does
not see the actions, so its keys and values are computed only once: for all draws of a sample in training, and for all
sampling steps.

`ddpm_transformer` is the same head with denoising diffusion as its noise process (noise.py).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models.action_heads.action_head import (
    ActionHead,
    ActionWindow,
    DrawKey,
    HeadWidths,
    reduce_loss,
    register_action_head,
)
from vla_foundry.models.action_heads.decoder import (
    ActionDecoder,
    KeyValues,
    Part,
    Reading,
    Tokens,
    append_steps,
    encode_sines,
    init_maps,
    join_parts,
    place_after,
    place_steps,
    repeat,
)
from vla_foundry.models.action_heads.noise import create_noise, draw_normals, draw_uniforms
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import DenoisingHeadParams, TransformerHeadParams

# how a head reads conditioning that is not a part of its own sequence
READINGS: dict[str, Reading] = {"cross_attention": "cross", "joint_attention": "layers"}
# encode time in units of 1/1000
_TIME_UNITS = 1000.0


class TransformerHead(ActionHead):
    """The input and output maps of a head's transformer. Module names match published heads."""

    def __init__(
        self,
        params: TransformerHeadParams,
        widths: HeadWidths,
        *,
        reading: Reading,
        is_modulated: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        dim = params.transformer.hidden_dim
        reads_layers = reading == "layers"
        self.condition_encode: Any = None if reads_layers else nn.Linear(widths.conditioning_dim, dim)
        self.proprioception_encode = None
        if widths.proprioception_dim:
            self.proprioception_encode = nn.Linear(widths.proprioception_dim, dim)
        self.action_encode = nn.Linear(widths.action_dim, dim)
        # In one sequence, rotary positions distinguish the steps, as in published heads. They are not enough where
        # attention has no positions (cross) or all steps start from the same token (regression).
        self.step_encode = None if reading == "joint" else nn.Linear(dim, dim)
        self.transformer = ActionDecoder(
            params.transformer,
            reading=reading,
            is_modulated=is_modulated,
            final_norm=final_norm,
            layer_dim=widths.conditioning_dim // widths.num_states if reads_layers else 0,
        )
        self.output_layer = nn.Linear(dim, widths.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return self.action_encode.weight.dtype

    def embed_proprioception(self, proprioception: Float[Tensor, "B P D"] | None) -> Float[Tensor, "B P D2"] | None:
        """Return one token per step; None if the head reads no proprioception.

        Raises:
            ValueError: the head reads proprioception, but it is missing.
        """
        if self.proprioception_encode is None:
            return None
        if proprioception is None:
            raise ValueError(
                "The policy reads proprioception (model.proprioception_dim), but the batch has none. "
                "Give the data proprioception_fields."
            )
        return self.proprioception_encode(proprioception.to(self.dtype))

    def add_steps(self, tokens: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Add a step encoding to each action token."""
        if self.step_encode is None:
            return tokens
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens + self.step_encode(encode_sines(steps, tokens.shape[2]).to(self.dtype))

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return list(self.transformer.layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the transformer's weights; use Xavier-uniform for its input and output maps."""
        self.transformer.init_weights()
        maps = [self.condition_encode, self.proprioception_encode, self.action_encode]
        init_maps(*maps, self.step_encode, self.output_layer)


class Context(NamedTuple):
    """Embedded conditioning and proprioception, which are the same at all times."""

    # parts of the actions' sequence before time is added: of a joint one (N, K, D) and (N, P, D); beside the backbone's
    # layers (N, P, D)
    parts: list[Part]
    # what is separate from it: (B, K + P, D), or (B, K, C) of layers; and its cached keys and values, if any
    tokens: Tokens | None
    cache: list[KeyValues] | None
    # adaLN-Zero's of each block at all sampling times (S, 6 D), if they are cached
    modulations: list[Tensor] | None
    # (N, T), False at padding; None: no padding
    step_mask: Tensor | None


@register_action_head("flow_transformer")
@register_action_head("ddpm_transformer")
class FlowTransformer(TransformerHead):
    """A transformer that predicts the denoising target from noised actions and their time."""

    def __init__(self, params: DenoisingHeadParams, widths: HeadWidths, *, final_norm: bool = True) -> None:
        is_modulated = params.time_conditioning == "adaln_zero"
        reading: Reading = "prefix" if is_modulated else "joint"
        reading = READINGS.get(params.conditioning, reading)
        super().__init__(params, widths, reading=reading, is_modulated=is_modulated, final_norm=final_norm)
        # each type of head has params of its own noise process
        self.params: Any = params
        self.is_modulated = is_modulated
        self.process = create_noise(self.params.noise)
        self.time_encoding: Any = self.create_time_encoding(widths)
        self.init_weights()

    @property
    def can_be_guided(self) -> bool:
        """True if `sample` follows the window's guidance."""
        return self.process.can_be_guided

    def create_time_encoding(self, widths: HeadWidths) -> nn.Module:
        """Create the network that maps the sines of the time."""
        dim = self.params.transformer.hidden_dim
        return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def embed_context(
        self, conditioning: Conditioning, window: ActionWindow, *, num_draws: int = 1, key: DrawKey | None = None
    ) -> Context:
        """Embed conditioning and proprioception.

        Args:
            num_draws: number of (time, noise) draws per sample.
            key: key of the noise that training adds to proprioception.
        """
        parts: list[Part] = []
        if self.transformer.reading != "layers":
            parts = [(self.embed_conditioning(conditioning.tokens.to(self.dtype)), conditioning.mask)]
        proprioception = self.embed_proprioception(window.proprioception)
        if proprioception is not None:
            if self.training and key is not None and self.params.input_noise_std > 0:
                drawn = self._draw(key, "proprioception noise", proprioception.shape[1:])
                proprioception = proprioception + self.params.input_noise_std * drawn.to(proprioception.dtype)
            parts.append((proprioception, None))
        step_mask = None if window.step_mask is None else repeat(window.step_mask, num_draws)
        if self.transformer.reading in ("joint", "layers"):
            parts = [(repeat(x, num_draws), None if mask is None else repeat(mask, num_draws)) for x, mask in parts]
            layers = None if self.transformer.reading == "joint" else join_parts([conditioning[:2]])
            return Context(parts, layers, None, None, step_mask)
        return Context([], join_parts(parts), None, None, step_mask)

    def cache_context(
        self, conditioning: Conditioning, window: ActionWindow, times: Float[Tensor, " S"] | None = None
    ) -> Context:
        """Embed conditioning and proprioception for all sampling steps, with their keys and values.

        Args:
            times: of the sampling steps; with adaLN-Zero, the weights that read them are then used once for all.
        """
        context = self.embed_context(conditioning, window)
        if context.tokens is None:
            return context
        time = self.embed_time(times) if self.is_modulated and times is not None else None
        cache, modulations = self.transformer.cache_context(context.tokens, time)
        return context._replace(cache=cache, modulations=modulations)

    def embed_conditioning(self, tokens: Float[Tensor, "B K C"]) -> Float[Tensor, "B K D"]:
        """Map conditioning to the head's width."""
        assert self.condition_encode is not None
        return self.condition_encode(tokens)

    def embed_time(self, times: Float[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Encode times with sines and a small network."""
        sines = encode_sines(times * _TIME_UNITS, self.params.transformer.hidden_dim)
        return self.time_encoding(sines.to(self.dtype))

    def add_time(self, parts: list[Part], time: Float[Tensor, "N D"]) -> list[Part]:
        """Insert time into the joint sequence: as a first token, or added to the conditioning."""
        if self.params.time_conditioning == "concat":
            return [(time.unsqueeze(1), None), *parts]
        (tokens, mask), *others = parts
        return [(tokens + time.unsqueeze(1), mask), *others]

    def embed_actions(
        self, noised: Float[Tensor, "N T A"], time: Float[Tensor, "N E"] | None
    ) -> Float[Tensor, "N T D"]:
        """Embed noised actions; with cross-attention and `add`, add the time."""
        actions = self.add_steps(self.action_encode(noised.to(self.dtype)))
        if self.transformer.reading in ("cross", "layers") and self.params.time_conditioning == "add":
            assert time is not None
            actions = actions + time.unsqueeze(1)
        return actions

    def predict(
        self, noised: Float[Tensor, "N T A"], times: Float[Tensor, " N"], context: Context, *, place: int | None = None
    ) -> Float[Tensor, "N T A"]:
        """Return the prediction of the noise process's target: velocity or noise.

        Args:
            noised: noised actions, with known values inserted.
            times: 0 is data, 1 is noise.
            place: of their common time among the context's modulations, if it has any.
        """
        modulations = None
        if context.modulations is not None and place is not None:
            modulations = [each[place : place + 1] for each in context.modulations]
        # the modulations are all that adaLN-Zero needs of it
        time: Any = None if modulations else self.embed_time(times)
        actions = self.embed_actions(noised, time)
        front = None
        if self.transformer.reading == "joint":
            front = join_parts(self.add_time(context.parts, time))
        elif self.params.time_conditioning == "concat":
            front = join_parts([(time.unsqueeze(1), None), *context.parts])
        elif context.parts:
            front = join_parts(context.parts)
        before = context.tokens if self.transformer.reading == "prefix" else front
        steps = place_steps(actions, context.step_mask, before)
        tokens = steps if front is None else append_steps(front, steps)
        if self.transformer.reading == "layers" and context.tokens is not None:
            tokens = place_after(tokens, context.tokens)
        hidden = self.transformer(
            tokens,
            context.tokens,
            time=time if self.is_modulated else None,
            cache=context.cache,
            modulations=modulations,
            num_outputs=actions.shape[1],
        )
        return self.output_layer(hidden)

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the summed squared error at drawn times and noise, averaged over draws."""
        R, shape = self.params.num_action_head_repeats, window.actions.shape[1:]
        # at least fp32, regardless of the weights' precision
        dtype = torch.promote_types(self.dtype, torch.float32)
        actions = window.actions.to(dtype).repeat_interleave(R, dim=0)
        noise = self._draw(key, "noise", (R, *shape)).flatten(0, 1).to(dtype)
        uniforms = draw_uniforms(key.samples, R, seed=key.seed, purpose=f"{key.stage} time").flatten()
        times = self.process.spread_times(uniforms)
        free, held = (mask.repeat_interleave(R, dim=0) for mask in (window.free_mask(), window.held_actions()))
        noised = torch.where(free, self.process.add_noise(actions, noise, times), held.to(dtype))
        if self.training and self.params.input_noise_std > 0:
            drawn = self._draw(key, "input noise", (R, *shape)).flatten(0, 1)
            noised = noised + self.params.input_noise_std * drawn.to(dtype)
        context = self.embed_context(conditioning, window, num_draws=R, key=key)
        predicted = self.predict(noised, times, context)
        errors = (predicted.to(dtype) - self.process.target(actions, noise)).square()
        return reduce_loss(errors, window, R)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, window: ActionWindow, key: DrawKey, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Sample actions from noise that depends only on each sample's seed; embed the conditioning once."""
        noise = self._draw(key, "noise", window.actions.shape[1:])
        return self.sample_from(noise, conditioning, window, num_steps)

    @torch.no_grad()
    def sample_from(
        self, noise: Float[Tensor, "B T A"], conditioning: Conditioning, window: ActionWindow, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Sample actions from the given noise."""
        count: int = num_steps or self.process.params.num_inference_steps
        places = {time: place for place, time in enumerate(self.process.sampling_times(count))}
        # filled on the device, not copied to it
        times = torch.cat([noise.new_full((1,), time, dtype=torch.float32) for time in places])
        context = self.cache_context(conditioning, window, times)
        free, held = window.free_mask(), window.held_actions()

        def predict(x: Tensor, time: float) -> Tensor:
            place = places[time]
            return self.predict(x, times[place : place + 1].expand(len(x)), context, place=place).float()

        guidance = window.guidance
        return self.process.sample(
            predict
            if guidance is None
            else self.process.guide(predict, guidance.target, guidance.weights[..., None] * free),
            noise,
            count,
            lambda x: torch.where(free, x, held),
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the weights."""
        super().init_weights()
        self.init_time_encoding()

    def init_time_encoding(self) -> None:
        """Initialise the network that maps the sines of the time."""
        init_maps(self.time_encoding[0], self.time_encoding[2])

    def _draw(self, key: DrawKey, purpose: str, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """Draw fp32 standard normal numbers for each sample."""
        return draw_normals(key.samples, shape, seed=key.seed, purpose=f"{key.stage} {purpose}")
