"""An image data set: a function from a split's name to images and labels.

ml2o evaluate --plugin examples/plugins/images.py --problem 'stripes[net=cnn,channels=4-8]' --optimizer pretrained
"""

import numpy as np

from ml2o_dist import register_images


@register_images("stripes", side=12, classes=3, tasks=2)
def stripes(split: str, data_root: str) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 12x12 images with a horizontal and a vertical stripe: in which third is each."""
    draws = np.random.RandomState({"train": 0, "validation": 1, "test": 2}[split])
    count = {"train": 600, "validation": 100, "test": 200}[split]
    labels = draws.randint(0, 3, (count, 2))
    images = draws.randint(0, 120, (count, 12, 12))
    for image, (row, column) in zip(images, labels, strict=True):
        image[4 * row + 1 : 4 * row + 3] += 100
        image[:, 4 * column + 1 : 4 * column + 3] += 100
    return np.minimum(images, 255).astype(np.uint8), labels
