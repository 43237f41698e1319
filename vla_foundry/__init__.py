"""Train language models, vision-language models and robot policies with one codebase and one training loop."""

__version__ = "0.1.0"
