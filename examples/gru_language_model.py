"""A language model of your own: its params and a factory, trained by the ordinary command (see CONTRIBUTING.md)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models import register_model
from vla_foundry.models.losses import language_model_loss
from vla_foundry.params import register_model_params
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import LanguageModelParams, TokenLimits


@register_model_params("gru")
@dataclass(frozen=True, kw_only=True)
class GRUParams(LanguageModelParams):
    """A recurrent language model."""

    # width of tokens and states
    hidden_dim: int = 64
    # recurrent layers
    n_layers: int = 1
    # rows of the token embedding
    vocab_size: int = 4096

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return its vocabulary; sequences may have any length."""
        return TokenLimits(vocab_size=self.vocab_size)


class GRULanguageModel(nn.Module):
    """Embedding, recurrent layers, output head."""

    def __init__(self, params: GRUParams) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(params.vocab_size, params.hidden_dim)
        self.layers = nn.GRU(params.hidden_dim, params.hidden_dim, params.n_layers, batch_first=True)
        self.output = nn.Linear(params.hidden_dim, params.vocab_size, bias=False)

    def forward(
        self, input_ids: Int[Tensor, "B T"], *, targets: Int[Tensor, "B T"], z_loss_coefficient: float = 0.0, **_: Any
    ) -> LossOutput:
        """Return the loss; a recurrent model reads across documents, so it ignores where they end."""
        states, _state = self.layers(self.embeddings(input_ids))
        return language_model_loss(states, self.output.weight, targets, z_loss_coefficient=z_loss_coefficient)


@register_model("gru")
def create_gru(params: GRUParams, load_pretrained: bool = True) -> GRULanguageModel:
    """Build the model with new weights."""
    return GRULanguageModel(params)
