"""The paper's action head: a flow transformer on the hidden states at the observation token.

    x_t      = (1 - t) actions + t noise               t = 0 is data, t = 1 is noise
    loss     = |transformer(x_t, t, observation) - (noise - actions)|^2
    sampling integrates the predicted velocity from t = 1 to t = 0

The paper's layout is one sequence, `conditioning: tokens` with `time_conditioning: add`:

    [conditioning + time | proprioception | noised actions]

Conditioning is what the backbone gives: the states of its last layers at the observation token, side by side. The other
ways to tell the time are a token in front of all (concat), and adaLN-Zero, which scales, shifts and gates each block of
the action tokens (adaln_zero). With `conditioning: cross_attention` the blocks read conditioning and proprioception by
cross-attention, and `add` adds the time to the actions.

With adaLN-Zero and with cross-attention, conditioning and proprioception do not depend on the time. They form a context
that does not see the actions, so its keys and values are computed once: for all draws of a sample in training, and for
all steps of sampling.

`ddpm_transformer` is the same head with denoising diffusion for its noise process (noise.py).
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
    place_steps,
    repeat,
)
from vla_foundry.models.action_heads.noise import create_noise, draw_normals, draw_uniforms
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import DenoisingHeadParams, TransformerHeadParams

# the time is encoded in units of 1/1000
_TIME_UNITS = 1000.0


class TransformerHead(ActionHead):
    """The maps into and out of a head's transformer. Modules have the names of published heads."""

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
        self.condition_encode = nn.Linear(widths.conditioning_dim, dim)
        self.proprioception_encode = None
        if widths.proprioception_dim:
            self.proprioception_encode = nn.Linear(widths.proprioception_dim, dim)
        self.action_encode = nn.Linear(widths.action_dim, dim)
        # in one sequence, rotary positions tell the steps apart, as in published heads; that is too little where
        # attention has no positions (cross) or all steps begin alike (regression)
        self.step_encode = None if reading == "joint" else nn.Linear(dim, dim)
        self.transformer = ActionDecoder(
            params.transformer, reading=reading, is_modulated=is_modulated, final_norm=final_norm
        )
        self.output_layer = nn.Linear(dim, widths.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.action_encode.weight.dtype

    def embed_proprioception(self, proprioception: Float[Tensor, "B P D"] | None) -> Float[Tensor, "B P D2"] | None:
        """Return a token per step; None: the head reads none.

        Raises:
            ValueError: the head reads proprioception and there is none.
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
        """Tell the token of each action which step it is."""
        if self.step_encode is None:
            return tokens
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens + self.step_encode(encode_sines(steps, tokens.shape[2]).to(self.dtype))

    def blocks(self) -> list[nn.Module]:
        """The blocks of the transformer."""
        return list(self.transformer.layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights: those of the transformer, and Xavier's uniform for the maps into and out of it."""
        self.transformer.init_weights()
        maps = [self.condition_encode, self.proprioception_encode, self.action_encode]
        init_maps(*maps, self.step_encode, self.output_layer)


class Context(NamedTuple):
    """What a batch says at every time: conditioning and proprioception, embedded."""

    # the parts of one sequence, to which the time is still to be added, (N, K, D) and (N, P, D)
    parts: list[Part]
    # else: the same as tokens of their own, (B, K + P, D), and their keys and values where these are kept
    tokens: Tokens | None
    cache: list[KeyValues] | None
    # (N, T), False at padding; None: there is none
    step_mask: Tensor | None


class FlowTransformer(TransformerHead):
    """A transformer that predicts, from noised actions and their time, the way back to actions."""

    def __init__(self, params: DenoisingHeadParams, widths: HeadWidths, *, final_norm: bool = True) -> None:
        is_modulated = params.time_conditioning == "adaln_zero"
        reading: Reading = "prefix" if is_modulated else "joint"
        reading = "cross" if params.conditioning == "cross_attention" else reading
        super().__init__(params, widths, reading=reading, is_modulated=is_modulated, final_norm=final_norm)
        # each type of head has params of its own noise process
        self.params: Any = params
        self.is_modulated = is_modulated
        self.process = create_noise(self.params.noise)
        self.time_encoding: Any = self.create_time_encoding(widths)
        # what sampling repeats; compile_sampling replaces it
        self._repeated: Any = self.predict

    def create_time_encoding(self, widths: HeadWidths) -> nn.Module:
        """The network behind the sines of the time."""
        dim = self.params.transformer.hidden_dim
        return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def embed_context(
        self, conditioning: Conditioning, window: ActionWindow, *, num_draws: int = 1, key: DrawKey | None = None
    ) -> Context:
        """Embed conditioning and proprioception.

        Args:
            num_draws: how many times and noises each sample will be asked for.
            key: of the noise that training adds to proprioception.
        """
        parts: list[Part] = [(self.embed_conditioning(conditioning.tokens.to(self.dtype)), conditioning.mask)]
        proprioception = self.embed_proprioception(window.proprioception)
        if proprioception is not None:
            if self.training and key is not None and self.params.input_noise_std > 0:
                drawn = self._draw(key, "proprioception noise", proprioception.shape[1:])
                proprioception = proprioception + self.params.input_noise_std * drawn.to(proprioception.dtype)
            parts.append((proprioception, None))
        step_mask = None if window.step_mask is None else repeat(window.step_mask, num_draws)
        if self.transformer.reading == "joint":
            parts = [(repeat(x, num_draws), None if mask is None else repeat(mask, num_draws)) for x, mask in parts]
            return Context(parts, None, None, step_mask)
        return Context([], join_parts(parts), None, step_mask)

    def embed_conditioning(self, tokens: Float[Tensor, "B K C"]) -> Float[Tensor, "B K D"]:
        """Map conditioning to the width of the head."""
        return self.condition_encode(tokens)

    def embed_time(self, times: Float[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Encode times by sines and a small network."""
        sines = encode_sines(times * _TIME_UNITS, self.params.transformer.hidden_dim)
        return self.time_encoding(sines.to(self.dtype))

    def add_time(self, parts: list[Part], time: Float[Tensor, "N D"]) -> list[Part]:
        """Tell the parts of one sequence the time: in front of them, or added to conditioning."""
        if self.params.time_conditioning == "concat":
            return [(time.unsqueeze(1), None), *parts]
        (tokens, mask), *others = parts
        return [(tokens + time.unsqueeze(1), mask), *others]

    def embed_actions(self, noised: Float[Tensor, "N T A"], time: Float[Tensor, "N E"]) -> Float[Tensor, "N T D"]:
        """Embed noised actions; with cross-attention the time may be added to them."""
        actions = self.add_steps(self.action_encode(noised.to(self.dtype)))
        if self.transformer.reading == "cross" and self.params.time_conditioning == "add":
            actions = actions + time.unsqueeze(1)
        return actions

    def predict(
        self, noised: Float[Tensor, "N T A"], times: Float[Tensor, " N"], context: Context
    ) -> Float[Tensor, "N T A"]:
        """Return what the noise process calls the target: velocity, or noise.

        Args:
            noised: noised actions, with known numbers in their place.
            times: 0 is data, 1 is noise.
        """
        time = self.embed_time(times)
        actions = self.embed_actions(noised, time)
        front = None
        if self.transformer.reading == "joint":
            front = join_parts(self.add_time(context.parts, time))
        elif self.params.time_conditioning == "concat":
            front = join_parts([(time.unsqueeze(1), None)])
        before = context.tokens if self.transformer.reading == "prefix" else front
        steps = place_steps(actions, context.step_mask, before)
        hidden = self.transformer(
            steps if front is None else append_steps(front, steps),
            context.tokens,
            time=time if self.is_modulated else None,
            cache=context.cache,
            num_outputs=actions.shape[1],
        )
        return self.output_layer(hidden)

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the squared error of the prediction at drawn times and noise, summed; the mean over draws."""
        R, shape = self.params.num_action_head_repeats, window.actions.shape[1:]
        # whatever the weights' precision
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
        """Go from noise, a function of each sample's seed, to actions; conditioning is read once."""
        noise = self._draw(key, "noise", window.actions.shape[1:])
        return self.sample_from(noise, conditioning, window, num_steps)

    @torch.no_grad()
    def sample_from(
        self, noise: Float[Tensor, "B T A"], conditioning: Conditioning, window: ActionWindow, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Go from this noise to actions."""
        context = self.embed_context(conditioning, window)
        if context.tokens is not None:
            context = context._replace(cache=self.transformer.cache_context(context.tokens))
        free, held = window.free_mask(), window.held_actions()
        return self.process.sample(
            lambda x, times: self._repeated(x, times, context).float(),
            noise,
            num_steps or self.process.params.num_inference_steps,
            lambda x: torch.where(free, x, held),
        )

    def compile_sampling(self, **options: Any) -> None:
        """Compile the prediction that each step of sampling makes."""
        self._repeated = torch.compile(self.predict, **options)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights."""
        super().init_weights()
        self.init_time_encoding()

    def init_time_encoding(self) -> None:
        """Draw the weights of the network behind the sines of the time."""
        init_maps(self.time_encoding[0], self.time_encoding[2])

    def _draw(self, key: DrawKey, purpose: str, shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
        """Normal numbers for each sample, fp32."""
        return draw_normals(key.samples, shape, seed=key.seed, purpose=f"{key.stage} {purpose}")


@register_action_head("flow_transformer")
@register_action_head("ddpm_transformer")
def create_flow_transformer(params: DenoisingHeadParams, widths: HeadWidths) -> FlowTransformer:
    """Build the head; its noise process makes the difference."""
    head = FlowTransformer(params, widths)
    head.init_weights()
    return head
