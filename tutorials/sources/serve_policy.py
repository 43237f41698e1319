# %% [markdown]
# # Serve a policy and drive it
#
# Under a minute on two CPU cores. The server answers over gRPC and over websockets (openpi's and vla-eval's protocols); its client
# needs numpy and grpcio, not torch, so it runs on the robot's computer. Here the policy is a class that waves; a trained run is
# served by `vla-foundry serve --checkpoint RUN`.

# %%
import os
import subprocess
import tempfile

os.chdir(tempfile.mkdtemp())

# %%
# %%writefile wave_policy.py
"""A policy without a model."""

import math

import numpy as np


class WavePolicy:
    """Moves the first joint up and down around where it was at the start."""

    def __init__(self, *, amplitude=0.1):
        self.amplitude, self.start, self.step = amplitude, None, 0

    def describe(self):
        """Say what clients must send, what they get, and how often."""
        return {"fields": {"observation.state": 3}, "actions": {"action": 3}, "fps": 10.0}

    def reset(self, seed):
        """Begin an episode."""
        self.start, self.step = None, 0

    def act(self, observation):
        """Return the action that follows an observation."""
        if self.start is None:
            self.start = observation.fields["observation.state"].astype(np.float64)
        action = self.start.copy()
        action[0] += self.amplitude * math.sin(2 * math.pi * self.step / 20)
        self.step += 1
        return {"action": action}


# %% [markdown]
# Ports of 0 are chosen by the system; the first line says which.

# %%
command = ["vla-foundry", "serve", "--policy", "wave_policy:WavePolicy", "--port", "0", "--websocket_port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
line = server.stdout.readline()
print(line)
address = line.split("grpc ")[1].split(",")[0]

# %% [markdown]
# The loop of a robot. An action comes by the deadline or not at all, and a robot never repeats an old one.

# %%
import numpy as np

from vla_foundry.client import RemotePolicy, RobotObservation

policy = RemotePolicy(address, timeout_s=5.0)
policy.reset(seed=0)
state, track = np.zeros(3, np.float32), []
for _ in range(40):
    action = policy.act(RobotObservation(images={}, fields={"observation.state": state}, instruction="wave"))["action"]
    # a perfect robot: it is where it was commanded to be
    state = action.astype(np.float32)
    track.append(float(state[0]))
policy.close()
[round(value, 3) for value in track[:10]]

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(5, 2))
plt.plot(track)
plt.xlabel("control step");

# %%
server.terminate()
server.wait(30)

# %% [markdown]
# - docs/serving.md: a LeRobot robot, other people's clients and harnesses, delays, real-time chunking, security.
# - `vla-foundry evaluate --policy_server HOST:PORT ...` evaluates a served policy as it does a checkpoint.
