"""Params of `vla-foundry preprocess image_caption`."""

from dataclasses import dataclass, field

from vla_foundry.params.commands.preprocessing import JobParams


@dataclass(frozen=True, kw_only=True)
class PreprocessImageCaptionParams(JobParams):
    """Write images and their captions as shards (modality `image_caption`)."""

    # folders of pairs (a.png with a.txt or a.json), or lists (.parquet, .csv, .tsv, .jsonl) of URLs or paths
    source: list[str]
    # column or key of a list that holds the URL, or the path of a file, relative to the list
    url_key: str = "url"
    # column or key that holds the caption, in a list or in a pair's JSON
    caption_key: str = "caption"
    # further columns of a list to keep, in the sample's JSON
    extra_keys: list[str] = field(default_factory=list)
    # most samples in a shard
    samples_per_shard: int = 2048
    # larger images are scaled down to this longer side, pixels; null: image files are kept as they are
    max_side: int | None = None
    # quality of images that are scaled down, 1 .. 100
    jpeg_quality: int = 95
    # seed of the order of samples
    seed: int = 0
    # the run stops when more than this share of the URLs can not be downloaded
    max_failed_downloads: float = 0.9
    # seconds to wait for one download
    download_timeout: int = 10
    # how often a download is tried again
    download_retries: int = 2
    # downloads at a time, in each of num_workers processes
    download_threads: int = 32
    # local folder for what is downloaded, until the shards are written; null: beside --output
    download_folder: str | None = None
    # the package that `uvx` runs to download, in an environment of its own
    img2dataset: str = "img2dataset==1.47.0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("source is empty. Name a folder of images and captions, or a list of URLs or paths.")
        for name in ("samples_per_shard", "download_timeout", "download_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side must be 1 or more, got {self.max_side}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must be 1 .. 100, got {self.jpeg_quality}.")
        if self.seed < 0 or self.download_retries < 0:
            raise ValueError(f"seed ({self.seed}) and download_retries ({self.download_retries}) must be 0 or more.")
        if not 0 <= self.max_failed_downloads <= 1:
            raise ValueError(f"max_failed_downloads must be between 0 and 1, got {self.max_failed_downloads:g}.")
