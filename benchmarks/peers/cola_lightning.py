"""Train CoLA as the Lightning tutorial does: sentences padded to 128 tokens, torchmetrics called on every batch.

python -m benchmarks.peers.cola_lightning DATA_DIR MODEL EPOCHS
"""

import sys
import time

import lightning
import torch
import torchmetrics
import transformers
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from tasks.sentences import ACCEPTABILITY, Sentences, load_corpus

NAMES = ["unacceptable", "acceptable"]
KIND = {"task": "multiclass", "num_classes": 2}


class Model(lightning.LightningModule):
    def __init__(self, name: str):
        super().__init__()
        self.bert = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2
        ).train()
        self.train_accuracy = torchmetrics.Accuracy(**KIND)
        self.valid_metrics = torch.nn.ModuleDict(
            {
                "accuracy": torchmetrics.Accuracy(**KIND),
                "precision_macro": torchmetrics.Precision(average="macro", **KIND),
                "precision_micro": torchmetrics.Precision(average="micro", **KIND),
                "recall_macro": torchmetrics.Recall(average="macro", **KIND),
                "recall_micro": torchmetrics.Recall(average="micro", **KIND),
                "f1": torchmetrics.F1Score(**KIND),
            }
        )
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        tokens, mask, labels = batch
        out = self.bert(input_ids=tokens, attention_mask=mask, labels=labels)
        accuracy = self.train_accuracy(out.logits.argmax(1), labels)
        self.log("train/loss", out.loss, prog_bar=True, on_epoch=True)
        self.log("train/acc", accuracy, prog_bar=True, on_epoch=True)
        return out.loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        tokens, mask, labels = batch
        out = self.bert(input_ids=tokens, attention_mask=mask, labels=labels)
        predictions = out.logits.argmax(1)
        self.log("valid/loss", out.loss, prog_bar=True, on_step=True)
        for name, metric in self.valid_metrics.items():
            self.log(f"valid/{name}", metric(predictions, labels), on_step=True, on_epoch=True)
        self.outputs.append((labels, out.logits))

    def on_validation_epoch_end(self) -> None:
        labels, logits = (torch.cat(parts) for parts in zip(*self.outputs))
        self.outputs.clear()
        chart = wandb.plot.confusion_matrix(
            y_true=labels.tolist(), preds=logits.argmax(1).tolist(), class_names=NAMES
        )
        self.logger.experiment.log({"confusion_matrix": chart})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def loader(
    part: Sentences, tokenizer: transformers.PreTrainedTokenizerBase, shuffle: bool
) -> DataLoader:
    encoded = tokenizer(
        part.sentences, truncation=True, padding="max_length", max_length=128, return_tensors="pt"
    )
    labels = torch.tensor([ACCEPTABILITY.index(label) for label in part.labels])
    return DataLoader(
        TensorDataset(encoded["input_ids"], encoded["attention_mask"], labels),
        batch_size=64,
        shuffle=shuffle,
    )


def main(data_dir: str, name: str, epochs: str) -> None:
    lightning.seed_everything(42)
    corpus, tokenizer = (
        load_corpus("auto", data_dir),
        transformers.AutoTokenizer.from_pretrained(name),
    )
    train, valid = loader(corpus.train, tokenizer, True), loader(corpus.valid, tokenizer, False)
    logger = WandbLogger(project="peer", offline=True)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(monitor="valid/loss", dirpath="models")
    trainer = lightning.Trainer(
        max_epochs=int(epochs),
        logger=logger,
        callbacks=[checkpoint],
        num_sanity_val_steps=0,
        accelerator="auto",
    )
    started = time.perf_counter()
    trainer.fit(Model(name), train, valid)
    print(f"training {time.perf_counter() - started:.3f} s")
    wandb.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
