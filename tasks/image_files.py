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
    """Grayscale images, and the classes of labelled ones."""

    names: list[str]  # the path of an image; in an IDX file with its number
    images: Tensor  # uint8 (images, 1, 28, 28)
    labels: list[str]


def read_images(paths: list[Path], class_names: list[str], labelled: bool) -> OwnImages:
    """Read all images; says how many have another size, and how many look inverted.

    The label of an image file is the name of its folder. IDX files and those with the numbers of
    their classes have the names of MNIST's: train-images-idx3-ubyte, train-labels-idx1-ubyte.
    Raises `UserError`.
    """
    names = []
    images = []
    labels = []
    for path in paths:
        if "images-idx3" in path.name:
            content = read_idx(path, SIZE, largest=255)
            names += [f"{path}:{number}" for number in range(len(content))]
            images += [Image.fromarray(image) for image in content.numpy()]
            if labelled:
                label_file = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
                classes = read_idx(label_file, (), largest=len(class_names) - 1)
                labels += [class_names[index] for index in classes]
            continue
        files = [path]
        if path.is_dir():
            suffixes = Image.registered_extensions()
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        for file in files:
            try:
                image = ImageOps.exif_transpose(Image.open(file))
                # "L" would lose what is drawn.
                if image.mode[0] in "IF" or image.convert("RGBA").getextrema()[3] != (255, 255):
                    raise ValueError("save it without transparency, and with 8 bits a pixel")
                images.append(image.convert("L"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"{file} can't be read as an image: {error}") from None
            names.append(str(file))
            labels.append(file.absolute().parent.name)
    if not images:
        raise UserError(f"no images in {', '.join(map(str, paths))}")
    if others := sum(image.size != SIZE for image in images):
        print(f"{others} of {len(images)} images are not 28×28: they are resized.")
    stack = np.stack([image.resize(SIZE) for image in images])
    if light := int((stack.mean((1, 2)) > 127).sum()):
        print(f"{light} of {len(images)} images are mostly light, but MNIST is white on black.")
    return OwnImages(names, torch.from_numpy(stack)[:, None], labels)
