"""Read one's own images for a trained model: image files, folders of them, and IDX files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from harness.errors import UserError
from tasks.digits import read_idx

SIZE = (28, 28)


class OwnImages(NamedTuple):
    """Grayscale images, and their classes if they are labelled."""

    names: list[str]  # the path of an image; in an IDX file with its number
    images: Tensor  # uint8 (images, 1, 28, 28)
    labels: list[str]


def read_images(inputs: list[str], class_names: list[str], labelled: bool) -> OwnImages:
    """Read the images of files and folders; print how many are resized or look inverted.

    The label of an image file is the name of its folder. The labels of an IDX file of images are in
    another one, named as MNIST's are: train-images-idx3-ubyte and train-labels-idx1-ubyte. Raises
    `UserError`.
    """
    names = []
    images = []
    labels = []
    for path in map(Path, inputs):
        if "images-idx3" in path.name:
            content = read_idx(path, SIZE, largest=255)
            names += [f"{path}:{number}" for number in range(len(content))]
            images += map(Image.fromarray, content.numpy())
            if labelled:
                label_file = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
                classes = read_idx(label_file, (), largest=len(class_names) - 1)
                labels += [class_names[index] for index in classes]
            continue
        files = [path]
        if path.is_dir():
            suffixes = Image.registered_extensions()
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        names += map(str, files)
        images += map(_read_image, files)
        labels += [file.absolute().parent.name for file in files]
    if not images:
        raise UserError(f"no images in {', '.join(inputs)}")
    if others := sum(image.size != SIZE for image in images):
        print(f"{others} of {len(images)} images are not 28×28: they are resized.")
    stack = np.stack([image.resize(SIZE) for image in images])
    if light := sum(stack.mean((1, 2)) > 127):
        print(f"{light} of {len(images)} images are mostly light, but MNIST is white on black.")
    return OwnImages(names, torch.from_numpy(stack)[:, None], labels)


def _read_image(file: Path) -> Image.Image:
    """An upright grayscale image. Raises `UserError`."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))
        # Converted to "L", other images would lose what they show.
        if image.mode[0] in "IF" or image.convert("RGBA").getextrema()[3] != (255, 255):
            raise ValueError("save it without transparency, and with 8 bits a pixel")
        return image.convert("L")
    except Exception as error:  # Pillow raises arbitrary exceptions
        raise UserError(f"{file} can't be read as an image: {error}") from None
