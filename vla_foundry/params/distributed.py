"""How the model is spread over processes. Rank, world size and device are not here: see world.py."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import BaseParams, Bounds, Name, Size
from vla_foundry.params.facts import Facts

_LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class DistributedParams(BaseParams):
    """`--distributed.` How the model is spread over processes."""

    # shard parameters, gradients and optimizer state with FSDP2; false: DDP when there is more than one process
    fsdp: bool = False
    # groups of ranks that each hold the whole model, sharded within the group (HSDP): less memory is saved, but only
    # gradients cross groups. The number of nodes keeps all other traffic within nodes
    replicate_size: Size = 1
    # keep sharded parameters and optimizer state in host memory
    fsdp_cpu_offload: bool = False
    # free gathered parameters after a block's forward (less memory, one more all-gather)
    fsdp_reshard_after_forward: bool = False
    # process-group backends; auto: gloo on the CPU, and NCCL beside it on GPUs
    dist_backend: Literal["auto", "gloo", "nccl"] = "auto"
    # rendezvous of torch.distributed: env://, tcp://HOST:PORT, or file:///PATH on a file system that all ranks share
    dist_url: Name = "env://"
    # seconds after which a collective that does not return, or a rank that does not come, ends the run
    timeout_s: Annotated[float, Bounds(least=1, most=10**7)] = 1800.0

    def __post_init__(self) -> None:
        super().__post_init__()
        match = re.fullmatch(r"env://|tcp://(?:\[[\w:.%]+\]|[^/:]+):(\d{1,5})(?:/?\?.*)?|file:///.+", self.dist_url)
        if match is None or int(match[1] or 0) > _LARGEST_PORT:
            raise ValueError(f"dist_url '{self.dist_url}' must be env://, tcp://HOST:PORT or file:///PATH.")
        if self.fsdp_cpu_offload and not self.fsdp:
            raise ValueError("fsdp_cpu_offload is true, but only FSDP offloads. Set fsdp true, or leave it out.")
        if self.replicate_size > 1 and not self.fsdp:
            raise ValueError("replicate_size is for FSDP; DDP replicates anyway. Set fsdp true, or leave it out.")

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that the ranks form equal groups."""
        if facts.world_size % self.replicate_size:
            raise ValueError(
                f"{path}.replicate_size ({self.replicate_size}) does not divide the number of ranks "
                f"({facts.world_size}). Use the number of nodes."
            )
        return super().check(root, facts, path)
