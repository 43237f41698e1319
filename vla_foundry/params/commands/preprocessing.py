"""Params of `preprocess` for text, tokenizers and captioned images, and of `manifest`."""

from dataclasses import dataclass, field

from vla_foundry.config.schema import BaseParams, Location


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class JobParams(BaseParams):
    """What all preprocessing jobs share. The output depends on neither workers nor cluster; a killed run continues."""

    # folder to write to, local or s3://
    output: Location
    # parallel tasks; null: one per core; 0: no Ray, run tasks one by one in this process
    num_workers: int | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: str | None = None
    # replace an output folder that was written or started with another configuration
    overwrite: bool = False
    # stop the run if more than this fraction of the rows, or of the bytes, is bad
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        workers, fraction = self.num_workers, self.max_bad_fraction
        _require(workers is None or workers >= 0, f"num_workers must be 0 or more, got {workers}.")
        _require(0 <= fraction <= 1, f"max_bad_fraction must be between 0 and 1, got {fraction:g}.")
        _require(bool(self.output), "output is empty. Name a folder to write to.")


@dataclass(frozen=True, kw_only=True)
class TextJobParams(JobParams):
    """A job that reads documents."""

    # folders, patterns or files (.txt: one document each; .jsonl, .parquet: one a row; also .gz), local or s3://
    source: list[Location]
    # key (.jsonl) or column (.parquet) that holds the text
    text_key: str = "text"
    # seed of the order of documents
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.source), "source is empty. Name a folder, a pattern or a file with text.")
        _require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}.")


@dataclass(frozen=True, kw_only=True)
class PreprocessTextParams(TextJobParams):
    """Tokenize documents and pack them into records of seq_len + 1 tokens (modality `text`)."""

    # Hugging Face tokenizer: folder (local, s3://) or name
    tokenizer: Location
    # token that ends a document; null: the tokenizer's own
    eos_token: str | None = None
    # a record holds this many tokens and one more, the last target
    seq_len: int = 2048
    # most records in a shard
    samples_per_shard: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seq_len >= 1, f"seq_len must be 1 or more, got {self.seq_len}.")
        _require(self.samples_per_shard >= 1, f"samples_per_shard must be 1 or more, got {self.samples_per_shard}.")


@dataclass(frozen=True, kw_only=True)
class PreprocessTextUntokenizedParams(TextJobParams):
    """Write documents as samples of raw text (modality `text_untokenized`)."""

    # most samples in a shard
    samples_per_shard: int = 8192
    # a longer document becomes several samples, bytes of UTF-8
    max_sample_bytes: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.samples_per_shard >= 1, f"samples_per_shard must be 1 or more, got {self.samples_per_shard}.")
        _require(self.max_sample_bytes >= 64, f"max_sample_bytes must be 64 or more, got {self.max_sample_bytes}.")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerParams(BaseParams):
    """Train a byte-level BPE tokenizer and save it as a Hugging Face fast tokenizer folder."""

    # folders, patterns or files (.txt: one document each; .jsonl, .parquet: one a row; also .gz), local or s3://
    source: list[Location]
    # folder to write to, local or s3://
    output: Location
    # key (.jsonl) or column (.parquet) that holds the text
    text_key: str = "text"
    # vocabulary size, including special tokens and the 256 bytes
    vocab_size: int = 4096
    # token that ends a document
    eos_token: str = "<|endoftext|>"
    # padding token
    pad_token: str = "<|pad|>"
    # further special tokens
    special_tokens: list[str] = field(default_factory=list)
    # train on about this much text, chosen by the seed; null: on all
    max_bytes: int | None = 1_000_000_000
    # seed of the choice of text
    seed: int = 0
    # replace a tokenizer that was trained with another configuration
    overwrite: bool = False
    # stop the run if more than this fraction of the rows, or of the bytes, is bad
    max_bad_fraction: float = 0.01

    @property
    def all_special_tokens(self) -> list[str]:
        """Special tokens in order of their ids, from 0."""
        return [self.eos_token, self.pad_token, *self.special_tokens]

    def __post_init__(self) -> None:
        special = self.all_special_tokens
        _require(bool(self.source), "source is empty. Name a folder, a pattern or a file with text.")
        _require(all(special), "a special token is empty. Give each a name, such as <|endoftext|>.")
        _require(len(set(special)) == len(special), f"special tokens must differ: {', '.join(special)}.")
        smallest = 256 + len(special)
        _require(
            self.vocab_size >= smallest,
            f"vocab_size must be at least {smallest} (256 bytes and {len(special)} special tokens), "
            f"got {self.vocab_size}.",
        )
        _require(self.max_bytes is None or self.max_bytes > 0, f"max_bytes must be above 0, got {self.max_bytes}.")
        _require(
            0 <= self.max_bad_fraction <= 1, f"max_bad_fraction must be between 0 and 1, got {self.max_bad_fraction:g}."
        )


@dataclass(frozen=True, kw_only=True)
class ManifestBuildParams(BaseParams):
    """Index the tars of a folder and write their manifest."""

    # folder with tars, local or s3://
    folder: Location
    # replace a manifest that says something else
    overwrite: bool = False
    # tars processed in parallel
    num_threads: int = 8

    def __post_init__(self) -> None:
        _require(self.num_threads >= 1, f"num_threads must be 1 or more, got {self.num_threads}.")


@dataclass(frozen=True, kw_only=True)
class ManifestVerifyParams(BaseParams):
    """Check every shard of a folder against its manifest and its index."""

    # folder with a manifest, local or s3://
    folder: Location
    # tars processed in parallel
    num_threads: int = 8

    def __post_init__(self) -> None:
        _require(self.num_threads >= 1, f"num_threads must be 1 or more, got {self.num_threads}.")


@dataclass(frozen=True, kw_only=True)
class PreprocessImageCaptionParams(JobParams):
    """Write images and their captions as shards (modality `image_caption`)."""

    # folders of pairs (a.png with a.txt or a.json), or lists (.parquet, .csv, .tsv, .jsonl) of URLs or paths
    source: list[Location]
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
    # stop the run if more than this fraction of the URLs cannot be downloaded
    max_failed_downloads: float = 0.9
    # seconds to wait for one download
    download_timeout: int = 10
    # retries per download
    download_retries: int = 2
    # downloads at a time, in each of num_workers processes
    download_threads: int = 32
    # local folder for what is downloaded, until the shards are written; null: beside --output
    download_folder: Location | None = None
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
