"""Params of `vla-foundry quickstart`."""

from dataclasses import dataclass, field

from vla_foundry.config.base import BaseParams

STAGES = ("llm", "vlm", "vla")


@dataclass(frozen=True, kw_only=True)
class QuickstartParams(BaseParams):
    """The whole road on this machine, on data made here."""

    # stages to run, in order
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    # folder that everything is written to; a second run goes on from what is there
    output_dir: str = "quickstart_output"
    # evaluate the policy also with pictures of other episodes, with the wrong instruction, and trained from nothing
    ablations: bool = False
    # install the library that draws the simulator (libosmesa6, by apt-get) if there is none
    install_system_packages: bool = False
    # do every stage again
    overwrite: bool = False

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"stages '{unknown[0]}' is unknown. Choose from: {', '.join(STAGES)}.")
        if not self.stages:
            raise ValueError(f"stages is empty. Choose from: {', '.join(STAGES)}.")
        if self.stages != list(STAGES[: len(self.stages)]):
            given, right = ",".join(self.stages), ",".join(STAGES[: len(self.stages)])
            raise ValueError(
                f"stages [{given}] must begin [{right}]: each stage starts from what the one before it made. "
                "What is done already is kept and costs nothing."
            )
        if self.ablations and "vla" not in self.stages:
            raise ValueError("ablations is true, but stages has no vla. Add it, or leave ablations out.")
