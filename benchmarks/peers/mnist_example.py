"""Train MNIST as the official PyTorch example does: two 3×3 convolutions, dropout, Adadelta, batches of 64.

python -m benchmarks.peers.mnist_example DATA_DIR
"""

import sys
import time

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = 0.99


def main(data_dir: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    ).to(DEVICE)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    train, test = (
        torchvision.datasets.MNIST(data_dir, train=part, transform=transform)
        for part in (True, False)
    )
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    seconds, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < TARGET and epoch < 14:
        started = time.perf_counter()
        model.train()
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        seconds, epoch = seconds + time.perf_counter() - started, epoch + 1
        model.eval()
        with torch.no_grad():
            correct = [
                model(images.to(DEVICE)).argmax(1) == labels.to(DEVICE)
                for images, labels in DataLoader(test, batch_size=1000)
            ]
        accuracy = torch.cat(correct).float().mean().item()
    print(f"training {seconds:.3f} s, accuracy {accuracy:.4f}, epochs {epoch}")


if __name__ == "__main__":
    main(sys.argv[1])
