"""How the model is spread over processes. Rank, world size and device are not here: see world.py."""

from dataclasses import dataclass
from typing import Literal

from vla_foundry.config.schema import BaseParams


@dataclass(frozen=True, kw_only=True)
class DistributedParams(BaseParams):
    """`--distributed.` How the model is spread over processes."""

    # shard parameters, gradients and optimizer state with FSDP2; false: DDP when there is more than one process
    fsdp: bool = False
    # keep sharded parameters and optimizer state in host memory
    fsdp_cpu_offload: bool = False
    # free gathered parameters after a block's forward (less memory, one more all-gather)
    fsdp_reshard_after_forward: bool = False
    # process-group backends; auto: gloo on the CPU, and NCCL beside it on GPUs
    dist_backend: Literal["auto", "gloo", "nccl"] = "auto"
    # rendezvous of torch.distributed
    dist_url: str = "env://"
    # seconds after which a collective that does not return ends the run
    timeout_s: float = 1800.0
