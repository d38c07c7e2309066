"""Train MNIST as W&B's PyTorch tutorial does: DataLoader, ToTensor per image, wandb.watch every ten batches, ONNX.

python -m benchmarks.peers.mnist_tutorial DATA_DIR
"""

import sys
import time

import torch
import torchvision
import wandb
from torch import nn
from torch.utils.data import DataLoader, Subset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = {"epochs": 5, "batch_size": 128, "learning_rate": 0.005, "kernels": [16, 32], "slice": 5}


class ConvNet(nn.Module):
    def __init__(self, kernels: list[int]):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(1, kernels[0], 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.second = nn.Sequential(
            nn.Conv2d(kernels[0], kernels[1], 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.last = nn.Linear(7 * 7 * kernels[1], 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(images)).flatten(1))


def loader(data_dir: str, train: bool, config: wandb.Config) -> DataLoader:
    whole = torchvision.datasets.MNIST(
        data_dir, train=train, transform=torchvision.transforms.ToTensor()
    )
    part = Subset(whole, range(0, len(whole), config.slice))
    return DataLoader(part, batch_size=config.batch_size, shuffle=True, num_workers=2)


def main(data_dir: str) -> None:
    torch.manual_seed(1)
    with wandb.init(project="peer", config=CONFIG, mode="offline") as run:
        train, test = (loader(data_dir, part, run.config) for part in (True, False))
        model, loss_function = ConvNet(run.config.kernels).to(DEVICE), nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=run.config.learning_rate)
        run.watch(model, loss_function, log="all", log_freq=10)
        seen = batch = 0
        started = time.perf_counter()
        for epoch in range(run.config.epochs):
            for images, labels in train:
                images, labels = images.to(DEVICE), labels.to(DEVICE)
                loss = loss_function(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen, batch = seen + len(images), batch + 1
                if batch % 25 == 0:
                    run.log({"epoch": epoch, "loss": loss}, step=seen)
        seconds = time.perf_counter() - started
        model.eval()
        with torch.no_grad():
            correct = sum(
                (model(images.to(DEVICE)).argmax(1) == labels.to(DEVICE)).sum().item()
                for images, labels in test
            )
        accuracy = correct / len(test.dataset)
        run.log({"test_accuracy": accuracy})
        torch.onnx.export(model.cpu(), images.cpu(), "model.onnx")
        run.save("model.onnx")
    print(f"training {seconds:.3f} s, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
