"""Params of `serve`, and of client maps."""

import dataclasses
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import BaseParams, Bounds, Count, Finite, Location, Name, Positive, Size, Steps
from vla_foundry.params.commands.preprocessing_robotics import GripperParams
from vla_foundry.params.commands.runs import InferenceParams

_OF_A_CHECKPOINT = (
    "open_loop_steps",
    "num_inference_steps",
    "dataset",
    "use_ema",
    "precision",
    "compile",
    "cuda_graphs",
    "reuse_image_features",
)
Port = Annotated[int, Bounds(least=0, most=65535, fix="0 takes a free one.")]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address to listen on."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class ServeParams(InferenceParams):
    """Serve a policy to robots and simulators over the network."""

    # run folder (its newest checkpoint) or step folder; not with `policy`
    checkpoint: Location | None = None
    # any class with reset and act, as module:Class, in place of a checkpoint
    policy: str | None = None
    # keyword arguments of that class
    policy_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    # name of the policy for clients; null: the run's or the class's
    name: str | None = None
    # address to listen on; others than loopback need TLS and a token, or `insecure`
    host: str = "127.0.0.1"
    # gRPC port: our protocol and the LBM simulator's
    port: Port = 50051
    # websocket and HTTP port: / speaks openpi's protocol, /vla_eval the vla-eval harness's, /metrics Prometheus'; null:
    # none
    websocket_port: Port | None = 8000
    # certificate chain and private key (PEM files)
    tls_certificate: Location | None = None
    tls_key: Location | None = None
    # file with the token that clients must show
    token_file: Location | None = None
    # listen on any address without TLS and token
    insecure: bool = False
    # actions of each chunk to execute; null: half of them
    open_loop_steps: Count | None = None
    # sampling steps from noise to actions; null: as in the model's params
    num_inference_steps: Count | None = None
    # the robot's dataset: its name in a mixture, or its index where their image options differ
    dataset: Name | None = None
    # what the model computes in; auto: bf16 on a GPU, fp32 on the CPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # torch.compile each block: faster on a GPU, after a slow start
    compile: bool = False
    # replay predictions as CUDA graphs, one client at a time: fewer launches on a GPU
    cuda_graphs: bool = False
    # do not encode images again that earlier predictions of a client looked at: for image_indices before the current
    # step, where predictions come often enough to see a step twice
    reuse_image_features: bool = False
    # exact: a client's actions do not depend on the other clients; fast: waiting clients share a prediction;
    # auto: exact on the CPU, fast on a GPU
    batching: Literal["auto", "exact", "fast"] = "auto"
    # fast: how long a request waits for others, milliseconds
    batch_window_ms: Annotated[float, Bounds(least=0, most=10_000)] = 2.0
    # fast: clients that share a prediction
    batch_size: Size = 16
    # sessions at a time
    max_clients: Size = 64
    # a session without requests ends after this time, seconds
    session_timeout_s: Positive = 600.0
    # largest message, MiB
    max_message_mib: Annotated[int, Bounds(least=1, most=1024)] = 64
    # YAML file that says what websocket clients call the policy's cameras and fields: a path, or
    # client_maps/libero.yaml, client_maps/simpler.yaml, client_maps/calvin.yaml; null: they use the policy's own names
    client_map: Location | None = None
    # JSON lines file that every request is appended to, pictures included; null: none
    request_log: Location | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (self.policy is None):
            raise ValueError("Give either a checkpoint (a run folder) or a policy (module:Class).")
        if self.policy is not None:
            given = {name: getattr(self, name) for name in _OF_A_CHECKPOINT}
            foreign = [name for name, value in given.items() if value not in (None, "auto", False)]
            if foreign:
                raise ValueError(
                    f"{foreign[0]} is for checkpoints. Leave it out, or give policy_args that say the same."
                )
        if self.cuda_graphs and self.batching == "fast":
            raise ValueError("cuda_graphs serve one client at a time. Leave batching out, or give exact.")
        if self.policy is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.policy):
            raise ValueError(f"policy must be module:Class, such as my_package.policies:Wave, got '{self.policy}'.")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or none.")
        if not (self.is_guarded or self.insecure):
            raise ValueError(
                f"host '{self.host}' can be reached by others. Give tls_certificate, tls_key and token_file, or "
                "--insecure true to serve anyone who can reach it."
            )

    @property
    def is_guarded(self) -> bool:
        """True if only this machine can connect, or TLS and a token keep strangers out."""
        if self.tls_certificate is not None and self.token_file is not None:
            return True
        return is_loopback(self.host)


@dataclass(frozen=True, kw_only=True)
class PartMeaning(BaseParams):
    """What numbers mean, on one side of the connection."""

    # absolute, or delta: the change from the step before; null: neither matters
    representation: Literal["absolute", "delta"] | None = None
    # rotation format: axis_angle, quaternion_xyzw, euler_xyz, ...; null: not a rotation
    rotation: str | None = None
    # the ends of a gripper; null: not a gripper
    gripper: GripperParams | None = None
    # one unit of these numbers, in metres or radians
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        has_unit = self.rotation is None or self.rotation == "axis_angle" or self.rotation.startswith("euler_")
        if self.scale != 1 and not (has_unit and self.gripper is None):
            raise ValueError(f"scale ({self.scale:g}) is for distances and angles, not {self.rotation or 'a gripper'}.")


@dataclass(frozen=True, kw_only=True)
class ClientPartParams(PartMeaning):
    """Columns of a client's vector, what they mean there, and the policy's field that they are."""

    # field of the policy, or some of its columns: action, action[0:3]
    field: str
    # [first, end) of the client's vector
    columns: tuple[Steps, Steps]
    # observations: key of the client's vector
    key: str = "states"
    # rotations of another frame of the hand: the policy's matrix is the client's times this one (row by row)
    turn: tuple[Finite, ...] | None = None
    # actions: name of the part in the client's own description
    name: str = ""
    # what the policy's numbers mean, where the dataset's spec does not say it
    own: PartMeaning = dataclasses.field(default_factory=PartMeaning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.columns[0] < self.columns[1]:
            raise ValueError(f"columns {list(self.columns)} must be [first, end) with first < end.")
        if self.turn is not None and (
            len(self.turn) != 9 or self.rotation is None or self.representation != "absolute"
        ):
            raise ValueError("turn is a matrix of 9 numbers, for parts with a rotation and representation: absolute.")


@dataclass(frozen=True, kw_only=True)
class ClientMapParams(BaseParams):
    """A client map (`--client_map FILE`): what a client calls the policy's cameras and fields."""

    # camera of the policy -> the client's name of its picture
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)
    # cameras whose pictures the client mirrors left to right; they are turned back
    mirrored: list[str] = dataclasses.field(default_factory=list)
    # cameras whose pictures have another size at the client; they are scaled, which training did not do
    scaled: list[str] = dataclasses.field(default_factory=list)
    # columns of the client's vectors -> fields of the observation
    state: list[ClientPartParams] = dataclasses.field(default_factory=list)
    # fields of the action -> columns of the vector that the client expects
    actions: list[ClientPartParams]
    # the client's key of the instruction
    instruction: str = "task_description"
    # vla-eval: settings of the benchmark that the policy needs, such as {send_state: true}
    observation_params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        foreign = [name for name in (*self.mirrored, *self.scaled) if name not in self.cameras]
        if foreign:
            raise ValueError(f"mirrored and scaled name '{foreign[0]}', which is none of cameras.")
