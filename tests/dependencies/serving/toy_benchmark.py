"""A benchmark of the vla-eval harness that replays recorded observations; it runs in the harness's environment."""

from pathlib import Path

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult

NUM_STEPS = 7


class ToyBenchmark(StepBenchmark):
    """Args: folder with observations.npz, where the actions go too."""

    render_backends = frozenset({"gpu", "cpu"})

    @classmethod
    def configure_render(cls, mode):
        return {}

    def __init__(self, folder, **params):
        super().__init__()
        self.folder, self.params = Path(folder), params
        self.data = dict(np.load(self.folder / "observations.npz"))
        self.actions = []

    def get_tasks(self):
        return [{"name": "lift"}]

    def reset(self, task):
        self.actions = []
        return {}

    def step(self, action):
        self.actions.append(np.asarray(action["actions"]))
        is_done = len(self.actions) == NUM_STEPS
        if is_done:
            np.save(self.folder / "actions.npy", np.stack(self.actions))
        return StepResult(obs={}, reward=0.0, done=is_done, info={})

    def make_obs(self, raw_obs, task):
        step = len(self.actions)
        fields = {name: values[step] for name, values in self.data.items() if values.ndim == 2}
        images = {name: values[step] for name, values in self.data.items() if values.ndim == 4}
        return {**fields, "images": images, "task_description": "lift the lid"}

    def check_done(self, step_result):
        return step_result.done

    def get_step_result(self, step_result):
        return {"success": True}

    def get_action_spec(self):
        return {}

    def get_observation_spec(self):
        return {}
