"""Fine-tune on CoLA as Hugging Face does: dynamic padding, AdamW, and `Trainer` without logging and saving.

python -m benchmarks.peers.cola_trainer DATA_DIR MODEL EPOCHS SAMPLING
SAMPLING is random, the library's default, or group_by_length, with batches like ours.
"""

import sys
import time

import transformers
from torch.utils.data import Dataset

from tasks.sentences import ACCEPTABILITY, Sentences, load_corpus


class Encoded(Dataset):
    def __init__(self, part: Sentences, tokenizer: transformers.PreTrainedTokenizerBase):
        self.ids = tokenizer(part.sentences, truncation=True, max_length=128)["input_ids"]
        self.labels = [ACCEPTABILITY.index(label) for label in part.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.labels[index]}


def main(data_dir: str, name: str, epochs: str, sampling: str) -> None:
    corpus, tokenizer = (
        load_corpus("auto", data_dir),
        transformers.AutoTokenizer.from_pretrained(name),
    )
    train, valid = Encoded(corpus.train, tokenizer), Encoded(corpus.valid, tokenizer)
    options = transformers.TrainingArguments(
        output_dir="trainer",
        num_train_epochs=int(epochs),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_steps=0.1,  # a share, if below one
        train_sampling_strategy=sampling,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, options, collator, train, valid)
    started = time.perf_counter()
    trainer.train()
    print(f"training {time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
