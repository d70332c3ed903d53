"""What `trainer.log_images` takes, as a PIL image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from orbit.core.extras import need


def as_picture(name: str, image: Any) -> Any:
    """A PIL image of an image.

    Args:
        name: what an error calls it.
        image: a PIL image, an array (height, width) or (height, width, 1, 3 or 4), or a tensor (height, width) or
            (1, 3 or 4, height, width); numbers are bytes, or floats from 0 to 1, beyond which they are clipped.

    Raises:
        ValueError: it is none of these.
    """
    need("plot", "PIL")
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim == 3:
            image = np.moveaxis(image, 0, -1)
    if (
        not isinstance(image, np.ndarray)
        or image.ndim not in (2, 3)
        or image.shape[2:] not in ((), (1,), (3,), (4,))
    ):
        shape = getattr(image, "shape", None)
        raise ValueError(
            f"image {name!r} is a {type(image).__name__}{'' if shape is None else f' {tuple(shape)}'}; log "
            "a PIL image, an array (height, width[, channels]) or a tensor ([channels, ]height, width)"
        )
    if np.issubdtype(image.dtype, np.floating):
        image = (np.nan_to_num(image).clip(0, 1) * 255).round()
    image = image.clip(0, 255).astype(np.uint8)
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
