"""Judge trained models: rollouts in simulators, success rates, errors of actions."""
