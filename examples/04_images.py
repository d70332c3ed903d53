"""Train a small residual net on Fashion-MNIST to 91 % and more on two cores.

    apt-get install dataset-fashion-mnist            # or the four files from github.com/zalandoresearch/fashion-mnist
    python examples/04_images.py
    python examples/04_images.py path/to/fashion-mnist
    python examples/04_images.py --data cifar path/to/cifar-10-batches-py      # or -bin

The loop is document 000's first one, with one difference: it looks at the test set after every epoch to decide when to
stop, which makes the test accuracy a choice among several. Here a tenth of the training images decides, and the test
images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from orbit.data.images import load_cifar10, load_fashion_mnist
from orbit.engine import Engine
from orbit.model import ConvBlock, ResBasicBlock
from orbit.plugin import EarlyStopping, GradientAccumulation, Mentor
from orbit.utils import auto_initialize, seed_everything

BATCH, ACCUMULATED, LR = 64, 2, 1e-2


def conv_net(channels: int, classes: int, width: int = 16) -> nn.Sequential:
    """A convolution, two residual blocks that halve the image, the mean over positions, a linear head."""
    return nn.Sequential(
        ConvBlock(channels, width),
        ResBasicBlock(width, 2 * width, stride=2),
        ResBasicBlock(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def batches(x: Tensor, y: Tensor, size: int, shuffle: bool = False) -> DataLoader:
    """A loader that cuts whole batches out of the tensors, instead of collating sample by sample."""
    data = TensorDataset(x, y)
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))


def main(folder: Path | None, cifar: bool = False, epochs: int = 5, width: int = 16) -> float:
    """The accuracy on the test images."""
    seed_everything(42)
    load = load_cifar10 if cifar else load_fashion_mnist
    where = () if folder is None else (folder,)
    every, test = load(*where, train=True), load(*where, train=False)
    order = torch.randperm(len(every))
    held_out = len(every) // 10
    val, train = every[order[:held_out]], every[order[held_out:]]
    statistics = train.statistics()
    train_loader = batches(train.normalised(statistics), train.labels, BATCH, shuffle=True)
    val_loader, test_loader = (batches(part.normalised(statistics), part.labels, 500) for part in (val, test))

    model = conv_net(train.pixels.shape[1], len(train.classes), width)
    auto_initialize(model)

    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    steps = epochs * math.ceil(len(train_loader) / ACCUMULATED)

    trainer = Engine(
        model=model,
        criterion=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps),
        plugins=[
            Mentor(),
            EarlyStopping(monitor="val_acc", patience=3),
            GradientAccumulation(steps=ACCUMULATED),
        ],
    )

    for _ in trainer.train(train_loader, num_epochs=epochs):
        trainer.auto_update()  # forward, backward, step, zero_grad

        if not trainer.is_epoch_end:
            continue

        for _ in trainer.eval(val_loader):
            trainer.auto_update()

    for _ in trainer.eval(test_loader):
        trainer.auto_update()
    accuracy = trainer.metrics["val_acc"]  # the metrics of the last eval()
    print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small residual net on images.")
    parser.add_argument("--data", choices=("fashion", "cifar"), default="fashion")
    parser.add_argument("folder", type=Path, nargs="?", help="where the images are")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    if given.data == "cifar" and given.folder is None:
        parser.error("--data cifar needs the folder of CIFAR-10's batches")
    try:
        main(given.folder, given.data == "cifar", given.epochs)
    except FileNotFoundError as missing:
        parser.exit(1, f"{missing}\n")
