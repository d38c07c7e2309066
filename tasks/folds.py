"""Cross-validation: its options, and which examples are in a fold."""

import dataclasses
import random
from collections import Counter

from harness.errors import UserError
from harness.options import option


@dataclasses.dataclass(kw_only=True, frozen=True)
class Folds:
    """The options for cross-validation."""

    fold: int | None = option(
        None,
        "which of --folds to validate on, from 1",
        at_least=1,
    )
    folds: int | None = option(
        None,
        "parts for cross-validation",
        at_least=2,
    )

    def __post_init__(self) -> None:
        if (self.fold is None) != (self.folds is None):
            raise UserError("--fold and --folds go together: name both")
        if self.folds and self.fold > self.folds:
            raise UserError(f"--fold {self.fold}: there are only {self.folds} --folds")

    def split(self, labels: list) -> tuple[list[int], list[int]]:
        """The examples to train on and those of the fold, as indices in ascending order.

        They depend only on the labels and the number of folds. Folds are stratified: their sizes,
        and their numbers of examples of each class, differ by at most one. Raises `UserError` if a
        class has fewer examples than there are folds.
        """
        rarest, count = Counter(labels).most_common()[-1]
        if count < self.folds:
            raise UserError(f"--folds {self.folds}: the class {rarest} has {count} examples")
        order = list(range(len(labels)))
        random.Random(0).shuffle(order)
        order.sort(key=labels.__getitem__)  # a stable sort: each class stays shuffled
        valid = order[self.fold - 1 :: self.folds]
        train = set(order) - set(valid)
        return sorted(train), sorted(valid)
