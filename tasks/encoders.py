"""Find and load an encoder and its tokenizer: from a directory, the Hub, or with random weights."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness import distributed
from harness.errors import UserError, warn_loudly
from harness.files import list_names, replacing_directory
from tasks.batching import TokenSet, inputs_of, tokenise
from tasks.downloads import one_line, why_unreachable
from tasks.text_files import Text

BERT_TINY = "google/bert_uncased_L-2_H-128_A-2"
Pretrained = tuple[PreTrainedModel, PreTrainedTokenizerBase]

transformers.logging.set_verbosity_error()  # `_load_pretrained` itself reports a replaced head
transformers.logging.disable_progress_bar()


def find_model(name: str | None, can_fetch: bool = False, run: str | None = None) -> str:
    """The model to use: `name`, that in the directory of a `run`, or by default BERT-tiny.

    `can_fetch`: whether the run can fetch an artifact from W&B, or has done so.

    A model from the Hub is downloaded unless it is completely cached. If that fails, BERT-tiny is
    replaced by "scratch" with a loud warning; a model named by the user raises `UserError`.
    """
    if run:
        path = Path(run, "model")
        if name not in (None, str(path)):
            raise UserError("--model and --init_from exclude each other: drop one of them")
        if not path.is_dir():
            raise UserError(f"--init_from {run}: there is no {path}")
        return str(path)
    wanted = name or BERT_TINY
    if wanted.startswith("wandb:") and not can_fetch:
        raise UserError(f"--model {wanted} is fetched from W&B, but this run is not online")
    if wanted == "scratch" or wanted.startswith("wandb:") or Path(wanted).is_dir():
        return wanted
    reason = _why_unavailable(wanted)
    if reason is None:
        return wanted
    problem = f"not in the hub's cache, and can't be downloaded: {reason}"
    advice = "pass a directory that contains one: --model DIR"
    if name:
        raise UserError(
            f"--model {one_line(name)} is not a directory, {problem}; {advice}, or --model scratch"
        )
    warn_loudly(
        f"{wanted} is {problem}.",
        "This run trains the same architecture from RANDOM weights instead (--model scratch).",
        f"To use a pretrained model, {advice}.",
    )
    return "scratch"


def _why_unavailable(name: str) -> str | None:
    """Download a model from the Hub unless it is completely cached; returns what went wrong."""
    if _why_not_loaded(name, local_files_only=True) is None:
        return None
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return why_unreachable(ENDPOINT) or _why_not_loaded(name, local_files_only=False)


def _why_not_loaded(name: str, local_files_only: bool) -> str | None:
    """Load a model and its tokenizer, which needs all their files; returns what went wrong."""
    try:
        AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        AutoModelForSequenceClassification.from_pretrained(name, local_files_only=local_files_only)
    except Exception as error:
        return one_line(error)[:200]
    return None


def load_model(
    name: str, sentences: list[Text], class_names: list[str], max_length: int
) -> Pretrained:
    """Load a classifier for `class_names`, and its tokenizer; the first two `sentences` test it.

    A trained head for the same names, apart from case, is kept: then the classes have its order,
    that of `model.config.id2label`. The tokenizer truncates at `max_length` tokens; that of
    "scratch" is learned from `sentences`. Raises `UserError` if the model can't be used.
    """
    try:
        if name == "scratch":
            model, tokenizer = _from_scratch(sentences, class_names)
        else:
            model, tokenizer = _load_pretrained(name, class_names)
        _prepare(model, tokenizer, max_length, sentences)
    except Exception as error:
        reason = one_line(error)
        # PyTorch's own message contains unsafe advice.
        if isinstance(error, SafetensorError) or "Weights only load failed" in reason:
            damage = "damaged, or only a git LFS pointer: try `git lfs pull`"
            reason = f"the file of its weights is {damage}"
        elif " " not in reason:  # KeyError: 'vocab'
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--model {one_line(name)} can't be used: {reason[:200]}") from None
    return model, tokenizer


def fetch_model(
    name: str,
    use_artifact: Callable[[str], Any],
    directory: Path,
    check: Callable[[str], Any],
) -> None:
    """Download the model of a W&B artifact, unless an earlier process of the run has done so.

    `name` is wandb:ENTITY/PROJECT/NAME:ALIAS. What `check` raises for is not kept. Raises
    `UserError`.
    """
    with distributed.rank_0_first():
        if distributed.rank() > 0 or directory.exists():
            return
        with replacing_directory(directory) as temporary:
            try:
                artifact = use_artifact(name.removeprefix("wandb:"))
                artifact.verify(artifact.download(str(temporary)))
                check(str(temporary))
            except Exception as error:  # W&B raises arbitrary exceptions
                reason = str(error).replace("--model ", "").replace(str(temporary), "it")
                raise UserError(f"--model {name} can't be used: {reason}") from None


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sentences: list[Text],
) -> None:
    """Set up padding and truncation, and check that the model accepts the tokenizer's output."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2
    if tokenizer.pad_token_id is None:
        raise ValueError("it has a tokenizer without a padding token: pass an encoder such as BERT")
    model.config.pad_token_id = tokenizer.pad_token_id
    # As in training: some models give different answers when padded on the left.
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max_length
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    for module_name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if module_name.endswith("position_embeddings") and padding is not None:
            limit -= padding + 1  # models like RoBERTa reserve the first positions
    if 0 < limit < max_length:
        raise ValueError(f"--max_length {max_length} is more than the model's limit, {limit}")
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"its tokenizer has ids up to {largest}, but the model has {rows} embeddings"
        )
    model.eval()
    token_set = tokenise(sentences[:2], [0, 1], tokenizer, max_length, model.device)
    with torch.no_grad():
        model(**inputs_of(token_set, torch.arange(2)))
    if attribute(model, token_set, 0, answer=1, label=0) is None:
        print("The model does not accept embeddings: there will be no attributions.")


def _from_scratch(sentences: list[Text], class_names: list[str]) -> Pretrained:
    """BERT-tiny's architecture (Turc et al., 2019) with random weights, and a new tokenizer."""
    pieces = learn_wordpieces(sentences)
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        # BERT's defaults (0.02, 0.1, 0.1) suit long pretraining: with them, only some seeds
        # learn agreement in ten epochs.
        initializer_range=128**-0.5,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
    )
    _name_classes(config, class_names)
    model = transformers.BertForSequenceClassification(config)
    return model, bert_tokenizer(pieces)


def bert_tokenizer(pieces: list[str]) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with this vocabulary, made as both transformers 4 and 5 accept."""
    backend = BertWordPieceTokenizer({piece: index for index, piece in enumerate(pieces)})
    tokenizer = Tokenizer.from_str(backend.to_str())
    return transformers.BertTokenizerFast(tokenizer_object=tokenizer)


def learn_wordpieces(sentences: list[Text]) -> list[str]:
    """A WordPiece vocabulary of all characters and the words that occur at least twice.

    It depends on `sentences` only; the trainers of the tokenizers library break ties at random.
    """
    normalizer = BertNormalizer()  # lower case, without accents
    splitter = BertPreTokenizer()
    words = Counter()
    for sentence in sentences:
        text = sentence if isinstance(sentence, str) else " ".join(sentence)
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += 1
    characters = sorted(set("".join(words)))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    pieces += [f"##{character}" for character in characters]
    pieces += sorted(word for word, count in words.items() if count >= 2 and len(word) > 1)
    return pieces


def _load_pretrained(name: str, class_names: list[str]) -> Pretrained:
    """Load from a directory or the Hub's cache; a head for other classes is replaced."""
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    if getattr(config, "summary_type", None) == "last":
        config.summary_type = "first"  # XLNet: in a batch, the last token may be padding
    spelling = {class_name.casefold(): class_name for class_name in class_names}
    old_names = [str(config.id2label[i]) for i in range(config.num_labels)]
    in_model_order = [spelling.get(old_name.casefold(), "") for old_name in old_names]
    keeps_head = sorted(in_model_order) == sorted(class_names)
    has_head = "ForSequenceClassification" in str(config.architectures)
    _name_classes(config, in_model_order if keeps_head else class_names)
    config.problem_type = "single_label_classification"
    config.torch_dtype = torch.float32  # or transformers 5 rounds to the type in config.json
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=config,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # Only the head, outside the base model, may be new, and the pooler, which masked LMs lack.
    base = f"{model.base_model_prefix}."
    initialized = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong = sorted(key for key in initialized if key.startswith(base) and "pooler" not in key)
    if wrong:
        raise ValueError(
            f"weights missing or not of the size in config.json: {len(wrong)}, first {wrong[0]}"
        )
    # If a directory has no tokenizer, AutoTokenizer creates one that has only special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError("it has no tokenizer: save it there too (tokenizer.save_pretrained)")
    if has_head and not keeps_head:
        print(
            f"The head of {name} has other labels, {list_names(old_names)}: "
            f"a new one with {len(class_names)} replaces it."
        )
        trained = model.base_model.state_dict()
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(trained)
    return model, tokenizer


def _name_classes(config: PretrainedConfig, class_names: list[str]) -> None:
    config.id2label = dict(enumerate(class_names))
    config.label2id = {class_name: label for label, class_name in config.id2label.items()}


def attribute(
    model: PreTrainedModel, token_set: TokenSet, index: int, answer: int, label: int
) -> Tensor | None:
    """How much each token of a sentence moved the decision towards `answer`, away from `label`.

    Gradient × input (Shrikumar et al., 2016), float32 (tokens,) on the CPU: the derivative of the
    difference of the two logits by a token's embedding, times that embedding, summed over its
    dimensions. None if the model doesn't accept embeddings.
    """
    inputs = inputs_of(token_set, torch.tensor([index]))
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    try:
        with torch.enable_grad():
            logits = model(inputs_embeds=embedded, **inputs).logits[0]
            (gradient,) = torch.autograd.grad(logits[answer] - logits[label], embedded)
    except (NotImplementedError, TypeError, ValueError):  # T5 and BART, Longformer, others
        return None
    return (gradient * embedded).sum(-1)[0].detach().cpu()


def train_used_rows(model: PreTrainedModel, tokens: list[Tensor]) -> None:
    """Train only the rows of the word embedding that occur in `tokens`, if less than half do.

    `tokens` are integers of any shape, on the model's device. The other rows get no gradient; the
    state dict still contains the whole matrix. BERT-tiny's embedding is nine tenths of its weights;
    CoLA uses a fifth of the rows.
    """
    embedding = model.get_input_embeddings()
    whole = embedding.weight.detach()
    used = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
    for part in tokens:
        used[part] = True
    parameters = model.named_parameters(remove_duplicate=False)
    uses = sum(weight is embedding.weight for _, weight in parameters)
    if type(embedding) is not nn.Embedding or uses > 1 or used.sum() >= len(used) / 2:
        return
    padding = embedding.padding_idx
    if padding is not None:
        used[padding] = True
        embedding.padding_idx = int(used[:padding].sum())
    row = torch.where(used, used.cumsum(0) - 1, -1)  # looking up -1 raises
    embedding.weight = nn.Parameter(whole[used])

    def save(_: nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
        whole[used] = embedding.weight.detach()
        state_dict[f"{prefix}weight"] = whole  # not a copy, like any other weight

    def load(_: nn.Module, state_dict: dict, prefix: str, *rest: Any) -> None:
        whole.copy_(state_dict[f"{prefix}weight"])
        state_dict[f"{prefix}weight"] = whole[used]

    embedding.register_forward_pre_hook(lambda _, inputs: row[inputs[0]])
    embedding.register_state_dict_post_hook(save)
    embedding.register_load_state_dict_pre_hook(load)
