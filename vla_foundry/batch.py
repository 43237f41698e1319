"""The batch: every key, with shape, dtype and meaning; data pipelines produce batches, models consume them.

B batch rows, T tokens, S samples.

| key         | type         | meaning                                                                              |
|-------------|--------------|--------------------------------------------------------------------------------------|
| modality    | str          | "text", ...: one modality per microbatch                                              |
| dataset     | str          | which dataset of a mixture it is; absent otherwise                                    |
| positions   | int64 [S]    | positions of this microbatch's samples in the plan                                    |
| input_ids   | int32 [B, T] | tokens; values in padding are unspecified                                             |
| target_mask | bool [B, T]  | True where the token at this position is a supervised target; never at position 0     |
| documents   | Documents    | documents in each row, which must not attend to each other; absent: one per row       |
| dropped     | dict         | samples replaced while this microbatch was made: {reason: count}                      |

With images (modalities "image_caption" and "interleaved"):

| key            | type           | meaning                                                                         |
|----------------|----------------|---------------------------------------------------------------------------------|
| pixel_values   | uint8 [M, ...] | images [M, 3, H, W], or a Hugging Face processor's patches, in the order of their  |
|                |                | tokens in input_ids, row by row; scaled and normalised on the device            |
| image_mean     | 3 floats       | of red, green and blue in 0 .. 1, subtracted on the device                      |
| image_std      | 3 floats       | what they are divided by then                                                   |
| color_factors  | float32 [M, 4] | colour jitter, see images/colors.py; absent: none                                 |
| image_index    | int32 [M]      | the batch's image that each row of pixel_values is of; absent: each row is one    |
| (token types)  | int32 [B, T]   | mm_token_type_ids or token_type_ids, where a Hugging Face model takes them; 0 in  |
|                |                | padding                                                                         |
| (extras)       | Tensor         | what a Hugging Face model takes besides, by its own name, e.g. image_grid_thw   |

With robot data (modality "robotics"): the image keys, in rows of one sample each (padding on the right), and the keys
below. A window has T steps: `past` before the anchor, the anchor, `future` after it. A sample has N images,
time-major, within a time in the order of data.camera_names. Without language, input_ids and documents are absent.

| key             | type               | meaning                                                                      |
|-----------------|--------------------|------------------------------------------------------------------------------|
| image_mask      | bool [B, N]        | True where the image is visible; missing images are black                    |
| actions         | float32 [B, T, A]  | data.action_fields, concatenated and normalised, past steps included         |
| proprioception  | float32 [B, P, D]  | data.proprioception_fields, concatenated and normalised; P = past + 1 steps, |
|                 |                    | the last is the anchor; absent: no such fields                               |
| past_mask       | bool [B, T]        | True where the step is observed: before the anchor, within the episode       |
| future_mask     | bool [B, T]        | True where the step must be predicted: the anchor or later, within it        |
| is_padding      | bool [B, T]        | True where the step lies outside the episode; exactly one mask is True       |
| action_dim_mask | bool [B, A]        | True where the sample's robot has this dimension of the actions; others are 0 |
| intrinsics      | float32 [B,K,3,3]  | of data.intrinsics_fields at the anchor, for the pixels that the model gets   |
| extrinsics      | float32 [B,K,4,4]  | of data.extrinsics_fields at the anchor                                      |
| episode_ids     | list of B str      | the recording each sample comes from                                         |
| anchors         | int64 [B]          | the sample's frame in the recording                                          |
| shards          | list of B str      | the tar the sample was read from                                             |
| instructions    | list of B str      | the drawn instruction; "" without one                                        |

All tensors of a batch are on the CPU; the training loop moves them. S may differ from B: samples are packed into rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Batch: TypeAlias = dict[str, Any]

# a target with this value is not counted in a loss
IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of each row, by length, known on the host.

    Attention stays within a document, and rotary positions restart at 0 in each. Padding at the end of a row is a
    segment of its own.
    """

    # int32 [num_segments], the segments of row 0, then of row 1, ...; those of a row sum to T; all > 0
    lengths: np.ndarray
    # int32 [B], segments in each row
    num_per_row: np.ndarray
    # bool [num_segments], True where a segment is padding
    is_padding: np.ndarray

    @classmethod
    def of_counts(cls, counts: np.ndarray, num_tokens: int) -> "Documents":
        """Rows of `num_tokens` tokens with one document each, of counts[row] tokens, and padding after it."""
        pairs = np.stack([counts, num_tokens - counts], axis=1)  # (B, 2)
        return cls(
            lengths=pairs[pairs > 0].astype(np.int32),
            num_per_row=(pairs > 0).sum(1).astype(np.int32),
            is_padding=np.tile([False, True], (len(counts), 1))[pairs > 0],
        )

    def count_tokens(self) -> np.ndarray | None:
        """The number of tokens in each row that are not padding, int64 [B]; None if a row holds several documents."""
        rows = np.repeat(np.arange(len(self.num_per_row)), self.num_per_row)
        if np.bincount(rows[~self.is_padding], minlength=1).max() > 1:
            return None
        return np.bincount(rows, np.where(self.is_padding, 0, self.lengths), len(self.num_per_row)).astype(np.int64)

    def padding_mask(self) -> np.ndarray:
        """Bool [B, T], True at padding."""
        return np.repeat(self.is_padding, self.lengths).reshape(len(self.num_per_row), -1)

    def trimmed(self, num_tokens: int) -> "Documents":
        """The same rows, cut to their first `num_tokens` tokens."""
        rows = np.repeat(np.arange(len(self.num_per_row)), self.num_per_row)
        totals = np.cumsum(self.lengths)
        first = np.cumsum(self.num_per_row) - self.num_per_row
        row_starts = (totals - self.lengths)[first] if len(first) else first
        starts = totals - self.lengths - row_starts[rows]
        lengths = np.minimum(self.lengths, num_tokens - starts)
        keep = lengths > 0
        return Documents(
            lengths=lengths[keep].astype(np.int32),
            num_per_row=np.bincount(rows[keep], minlength=len(self.num_per_row)).astype(np.int32),
            is_padding=self.is_padding[keep],
        )


class LossOutput(NamedTuple):
    """A model's output when given targets. All are tensors on the model's device.

    `sum` is the loss summed over valid targets (scalar, with a gradient even if there are none); `count` their
    number (scalar); `logs` are further sums by name, divided by the count before they are logged.
    """

    sum: Any
    count: Any
    logs: dict[str, Any]


@dataclass(eq=False)
class LanguageModelOutput:
    """A language model's output without targets.

    `hidden_states` has one entry more than the model has blocks: entry 0 is the embedding, entry i the output of
    block i, and the last one is taken after the final norm.
    """

    # Tensor (B, T, V), or the last `logits_to_keep` positions of each row; None where the model has no output head
    logits: Any
    # tuple of Tensors (B, T, D); None unless asked for
    hidden_states: tuple[Any, ...] | None = None
    # keys and values so far: pass it to the next call of `decode`
    past_key_values: Any = None
