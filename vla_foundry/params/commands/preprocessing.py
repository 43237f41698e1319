"""Params of `preprocess` for text, tokenizers and captioned images, and of `manifest`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_foundry.config.schema import (
    BaseParams,
    Bounds,
    Count,
    Fraction,
    Location,
    Name,
    NonNegativeInt,
    NumThreads,
    NumTokens,
    NumWorkers,
    Size,
)


@dataclass(frozen=True, kw_only=True)
class JobParams(BaseParams):
    """Shared by all preprocessing jobs. The output does not depend on workers or cluster; a killed run resumes."""

    # folder to write to, local or s3://
    output: Location
    # parallel tasks; null: one per core; 0: no Ray, run tasks one by one in this process
    num_workers: NumWorkers | None = None
    # Ray cluster to run on ("auto", host:port); null: this machine
    ray_address: Name | None = None
    # replace an output folder that was written or started with another configuration
    overwrite: bool = False
    # stop the run if more than this fraction of the rows, or of the bytes, is bad
    max_bad_fraction: Fraction = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            raise ValueError("output is empty. Name a folder to write to.")


@dataclass(frozen=True, kw_only=True)
class TextJobParams(JobParams):
    """A job that reads documents."""

    # folders, patterns or files, local or s3://: .txt holds one document, .jsonl, .json and .parquet one per row; each
    # may be packed: .gz, .zst, .bz2, .xz
    source: list[Location]
    # key (JSON) or column (.parquet) that holds the text; meta.text is a key within a key
    text_key: str = "text"
    # seed of the order of documents
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("source is empty. Name a folder, a pattern or a file with text.")


@dataclass(frozen=True, kw_only=True)
class PreprocessTextParams(TextJobParams):
    """Tokenize documents and pack them into records of seq_len + 1 tokens (modality `text`)."""

    # Hugging Face tokenizer: folder (local, s3://) or name
    tokenizer: Location
    # token that ends a document; null: the tokenizer's own
    eos_token: str | None = None
    # a record holds this many tokens and one more, the last target
    seq_len: NumTokens = 2048
    # most records in a shard
    samples_per_shard: Count = 8192


@dataclass(frozen=True, kw_only=True)
class PreprocessTextUntokenizedParams(TextJobParams):
    """Write documents as samples of raw text (modality `text_untokenized`)."""

    # most samples in a shard
    samples_per_shard: Count = 8192
    # a longer document becomes several samples, bytes of UTF-8
    max_sample_bytes: Annotated[int, Bounds(least=64)] = 8192


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerParams(BaseParams):
    """Train a byte-level BPE tokenizer and save it as a Hugging Face fast tokenizer folder."""

    # folders, patterns or files, local or s3://: .txt holds one document, .jsonl, .json and .parquet one per row; each
    # may be packed: .gz, .zst, .bz2, .xz
    source: list[Location]
    # folder to write to, local or s3://
    output: Location
    # key (JSON) or column (.parquet) that holds the text; meta.text is a key within a key
    text_key: str = "text"
    # vocabulary size, including special tokens and the 256 bytes
    vocab_size: NumTokens = 4096
    # token that ends a document
    eos_token: str = "<|endoftext|>"
    # padding token
    pad_token: str = "<|pad|>"
    # further special tokens
    special_tokens: list[str] = field(default_factory=list)
    # train on about this much text, chosen by the seed; null: on all
    max_bytes: Count | None = 1_000_000_000
    # seed of the choice of text
    seed: NonNegativeInt = 0
    # replace a tokenizer that was trained with another configuration
    overwrite: bool = False
    # stop the run if more than this fraction of the rows, or of the bytes, is bad
    max_bad_fraction: Fraction = 0.01

    @property
    def all_special_tokens(self) -> list[str]:
        """Special tokens in order of their ids, from 0."""
        return [self.eos_token, self.pad_token, *self.special_tokens]

    def __post_init__(self) -> None:
        super().__post_init__()
        special = self.all_special_tokens
        smallest = 256 + len(special)
        if not self.source:
            raise ValueError("source is empty. Name a folder, a pattern or a file with text.")
        if not all(special):
            raise ValueError("a special token is empty. Give each a name, such as <|endoftext|>.")
        if len(set(special)) < len(special):
            raise ValueError(f"special tokens must differ: {', '.join(special)}.")
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must be at least {smallest}: 256 bytes and {len(special)} special "
                "tokens."
            )


@dataclass(frozen=True, kw_only=True)
class ManifestBuildParams(BaseParams):
    """Index the tars of a folder and write their manifest."""

    # folder with tars, local or s3://
    folder: Location
    # replace a manifest that says something else
    overwrite: bool = False
    # tars processed in parallel
    num_threads: NumThreads = 8


@dataclass(frozen=True, kw_only=True)
class ManifestVerifyParams(BaseParams):
    """Check every shard of a folder against its manifest and its index."""

    # folder with a manifest, local or s3://
    folder: Location
    # tars processed in parallel
    num_threads: NumThreads = 8


@dataclass(frozen=True, kw_only=True)
class ImageJobParams(JobParams):
    """A job that stores images."""

    # most samples in a shard
    samples_per_shard: Count = 2048
    # larger images are scaled down to this longer side, pixels; null: image files are kept as they are
    max_side: Size | None = None
    # quality of images that are scaled down
    jpeg_quality: Annotated[int, Bounds(least=1, most=100)] = 95
    # seed of the order of samples
    seed: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class PreprocessInterleavedParams(ImageJobParams):
    """Write documents of text and images in order as shards (modality `interleaved`)."""

    # folders of documents (.json), or lists of them (.jsonl, .parquet), in one of the layouts {"parts": [{"text": ...},
    # {"image": "a.jpg"}]}, {"texts": [...], "images": [...]} (OBELICS) and {"text_list": ..., "image_info": ...} (MMC4)
    source: list[Location]
    # folder that the names of images are relative to; null: that of the document or list
    image_folder: Location | None = None
    # leave out images that are missing or broken, and keep the rest of the document; false: the document is bad
    skip_bad_images: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("source is empty. Name a folder of documents, or a list of them.")


@dataclass(frozen=True, kw_only=True)
class PreprocessImageCaptionParams(ImageJobParams):
    """Write images and their captions as shards (modality `image_caption`)."""

    # folders of pairs (a.png with a.txt or a.json), or lists (.parquet, .csv, .tsv, .jsonl) of URLs or paths; images in
    # other formats than JPEG, PNG and WebP (GIF, BMP, TIFF, ...) are stored as PNG
    source: list[Location]
    # column or key of a list that holds the URL, or the path of a file, relative to the list
    url_key: str = "url"
    # column or key that holds the caption, in a list or in a pair's JSON
    caption_key: str = "caption"
    # write a sample for each caption of an image that has a list of them; false: training draws one whenever it reads
    # the sample (of URLs the first is kept)
    all_captions: bool = False
    # further columns of a list to keep, in the sample's JSON
    extra_keys: list[str] = field(default_factory=list)
    # stop the run if more than this fraction of the URLs cannot be downloaded
    max_failed_downloads: Fraction = 0.9
    # seconds to wait for one download
    download_timeout: Annotated[int, Bounds(least=1, most=86_400)] = 10
    # retries per download
    download_retries: Annotated[int, Bounds(least=0, most=1000)] = 2
    # downloads at a time, in each of num_workers processes
    download_threads: NumThreads = 32
    # local folder for what is downloaded, until the shards are written; null: beside --output
    download_folder: Location | None = None
    # the package that `uvx` runs to download, in an environment of its own
    img2dataset: Name = "img2dataset==1.47.0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("source is empty. Name a folder of images and captions, or a list of URLs or paths.")


@dataclass(frozen=True, kw_only=True)
class DownloadParams(BaseParams):
    """Copy published data to this machine: resumable, several files at a time, sizes and hashes checked."""

    # hf://datasets/owner/repo[@revision][/path], s3://bucket/prefix, https://host/folder/ with a listing, a
    # manifest.jsonl with its shards, or single files
    source: list[Location] = field(default_factory=list)
    # data of the paper: dclm (text), datacompdr (captions and image addresses); lbm-sim: robot data of `task`
    preset: Literal["dclm", "datacompdr", "lbm-sim"] | None = None
    # file with a URL on each line, and after it a SHA-256, if known
    url_list: Location | None = None
    # folder to write to
    output: Location | None = None
    # only files whose path below the source matches one of these, such as '*.tar'
    pattern: list[str] = field(default_factory=list)
    # files at a time
    num_workers: NumThreads = 8
    # check hashes where they are known; sizes are always checked
    verify: bool = True
    # download again what is complete
    force: bool = False
    # only show what would be downloaded
    dry_run: bool = False
    # the same as output: the name of the earlier downloader
    local_path: Location | None = None
    # the same as an s3:// source: the name of the earlier downloader
    s3_path: Location | None = None
    # tasks of the LBM simulation
    task: list[str] = field(default_factory=list)
    # version of the preprocessed LBM data
    version: Name = "v0.1.0"
    # raw recordings of the tasks (<task>.tar) in place of shards
    raw: bool = False
    # shards of whole episodes in place of single windows
    episodes: bool = False
    # the same as dry_run: the name of the earlier downloader
    list: bool = False
    # the 19 tasks that the paper evaluates
    all: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        wants_tasks = bool(self.task) or self.all
        if not (self.source or self.preset or self.url_list or self.s3_path or wants_tasks):
            raise ValueError("Give a source, such as hf://datasets/owner/repo, or --preset, --url_list or --task.")
        if self.preset == "lbm-sim" and not wants_tasks:
            raise ValueError("preset lbm-sim needs --task NAME, or --all true for the 19 tasks of the paper.")
        if (self.raw or self.episodes) and not wants_tasks:
            raise ValueError("raw and episodes choose among the data of tasks. Give --task NAME.")
        if any("/" in name or name in ("", ".", "..") for name in (*self.task, self.version)):
            raise ValueError("task and version are names, without '/'.")
        if (self.output is None) == (self.local_path is None):
            raise ValueError("Give --output FOLDER (or --local_path, the earlier name), once.")

    @property
    def folder(self) -> str:
        """The folder to write to."""
        return self.output or self.local_path or ""
