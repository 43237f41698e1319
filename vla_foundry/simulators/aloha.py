"""ALOHA in simulation (gym-aloha): two ViperX arms hand over a cube, or insert a peg; there is no expert.

gym-aloha renders its camera at every step, so pictures are not saved while the policy does not look.
"""

from vla_foundry.simulators.gymnasium import PresetSimulator
from vla_foundry.simulators.simulator import register_simulator


@register_simulator("aloha")
class AlohaSimulator(PresetSimulator):
    """ALOHA: the tasks transfer-cube and insertion."""

    presets = {
        "transfer-cube": ("gym_aloha:gym_aloha/AlohaTransferCube-v0", "simulators/aloha_transfer_cube.yaml"),
        "insertion": ("gym_aloha:gym_aloha/AlohaInsertion-v0", "simulators/aloha_insertion.yaml"),
    }

    def close(self) -> None:
        """Free the renderer, which gym-aloha would leave to the end of the process."""
        self._environment.unwrapped._env.close()
        super().close()
