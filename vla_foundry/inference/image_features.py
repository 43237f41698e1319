"""Keep what the image encoder made of images that a robot's next prediction looks at again (`reuse_image_features`)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.inference.cuda_graphs import GraphedSampler, Sample
from vla_foundry.models.backbones.vlm_foundry import VLMFoundryBackbone

# digest of an image's pixels -> its features (S, D) on the device, for what one robot has seen; used last comes last
Memory = dict[bytes, Tensor]


class ReusedFeatures:
    """Encodes the images that are new to their robots, and takes the features of the others from memory.

    Args:
        model: a policy whose images are encoded one by one, by its own vision-language model.
        capacity: images to keep of each robot.
        is_low: compute in bf16.
        cuda_graphs: replay the encoder as a CUDA graph, one for each number of new images.

    Raises:
        ValueError: the policy has another backbone.
    """

    def __init__(self, model: Any, *, capacity: int, is_low: bool, cuda_graphs: bool) -> None:
        backbone = model.vision_language_backbone
        if not isinstance(backbone, VLMFoundryBackbone):
            raise ValueError(
                f"reuse_image_features needs the backbone vlm_foundry_backbone, but the policy has "
                f"{type(backbone).__name__}. Leave it out."
            )
        self._model, self._capacity, self._is_low = backbone.model, capacity, is_low
        self._encode: Sample = GraphedSampler(self._run_encoder) if cuda_graphs else self._run_encoder

    @torch.no_grad()
    def _run_encoder(self, _: dict[str, Any], pixel_values: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n S D"]:
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self._is_low):
            return self._model.encode_images(pixel_values)

    def put(self, inputs: dict[str, Any], batch: Batch, memories: Sequence[Memory]) -> dict[str, Any]:
        """Return a model's inputs with features in place of images; where an image is missing, return them as they are.

        Args:
            inputs: output of RoboticsBatchHandler.prepare_sampling for the batch.
            batch: its images are uint8 on the host, equally many for each robot.
            memories: of the robots, in the order of the batch; they are updated. A robot may come twice.
        """
        images, mask = batch.get("pixel_values"), batch.get("image_mask")
        if images is None or not len(images) or (mask is not None and not mask.all()):
            return inputs
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]
        owners = [memory for memory in memories for _ in range(len(keys) // len(memories))]
        new = {
            (id(memory), key): i for i, (key, memory) in enumerate(zip(keys, owners, strict=True)) if key not in memory
        }
        observation = inputs["observation"]
        if new:
            places = list(new.values())
            # an index would be copied to the device
            fresh = torch.stack([observation["pixel_values"][i] for i in places])
            for i, feature in zip(places, self._encode({}, fresh), strict=True):
                owners[i][keys[i]] = feature
        features = []
        for key, memory in zip(keys, owners, strict=True):
            features.append(memory.pop(key))
            memory[key] = features[-1]
        for memory in memories:
            for key in list(memory)[: -self._capacity]:
                del memory[key]
        changed = {**observation, "pixel_values": None, "image_features": torch.stack(features)}
        return {**inputs, "observation": changed}
