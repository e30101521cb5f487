"""A local `transformers` model and the texts it runs on, and what its outputs lose under a recipe.

The model is evaluated in FP32, whatever dtype the checkpoint is stored in, so that the error shown is the recipe's and
not that of rounding activations to bfloat16. Texts run in small batches of similar length, padded on the right and
masked; padding counts nowhere, except that an outer scale computed over a whole activation tensor sees its batch.

Two kinds of model: a causal language model (compared on its logits) and everything else, called an encoder (compared
on its last hidden state).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from microscale.errors import InputError, MicroscaleError, MissingDependencyError

MAX_TOKENS = 512  # per text; longer ones are cut, and the report says how many were
BATCH = 8
_KEEP = 1 << 28  # FP32 values of the reference that are kept (1 GiB); beyond it they are computed again per recipe
_TEXTS = "give a text file with one text a line, or a list of strings"
_ROWS = 256  # tokens whose distributions are compared at once


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, int64 [B, T]; `texts` are the indices of the B texts."""

    texts: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model in evaluation mode, its tokenizer, and what kind it is."""

    module: torch.nn.Module
    tokenizer: Any
    architecture: str
    causal: bool

    def copy(self) -> torch.nn.Module:
        """Return a second module tree over the same parameters and buffers, for `quantize_` to change."""
        shared = [*self.module.parameters(), *self.module.buffers()]
        return copy.deepcopy(self.module, {id(t): t for t in shared})

    def batches(self, texts: Sequence[str], size: int = BATCH) -> tuple[list[Batch], int]:
        """Return the tokenized texts in batches of similar length, and how many texts were cut."""
        limit = min(MAX_TOKENS, _position_limit(self.module), int(min(self.tokenizer.model_max_length, MAX_TOKENS)))
        with _quiet(require_transformers()):  # it warns about long texts, which are about to be cut
            full = [self.tokenizer(text)["input_ids"] for text in texts]
        if not all(full):
            empty = next(i for i, ids in enumerate(full) if not ids)
            raise InputError(f"input text {empty + 1} has no tokens: {texts[empty]!r}", "leave it out")
        cut = [self.tokenizer(t, truncation=True, max_length=limit)["input_ids"] for t in texts]
        order = sorted(range(len(texts)), key=lambda i: len(cut[i]))
        pad = self.tokenizer.pad_token_id
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        made = [_pad_batch(group, cut, 0 if pad is None else pad) for group in groups]
        return made, sum(len(a) > len(b) for a, b in zip(full, cut, strict=True))

    def run(self, module: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Return each text's outputs over its attended tokens: FP32 [tokens, features], in the batch's order."""
        extra = {"use_cache": False} if self.causal else {}
        with torch.no_grad():
            output = module(input_ids=batch.ids, attention_mask=batch.mask, **extra)
        values = (output.logits if self.causal else output.last_hidden_state).float()
        return [row[mask.bool()] for row, mask in zip(values, batch.mask, strict=True)]


def _pad_batch(group: list[int], tokens: list[list[int]], pad: int) -> Batch:
    longest = max(len(tokens[i]) for i in group)
    ids = torch.tensor([tokens[i] + [pad] * (longest - len(tokens[i])) for i in group], dtype=torch.int64)
    mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in group], dtype=torch.int64)
    return Batch(tuple(group), ids, mask)


def _position_limit(module: torch.nn.Module) -> int:
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else MAX_TOKENS


# -- loading -----------------------------------------------------------------------------------------------------------


def require_transformers() -> Any:
    """Return the module `transformers`. Raises MissingDependencyError with the command that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"running a model on input texts needs transformers ({error})",
            "pip install 'transformers>=4.50', or leave out the inputs to compare weights only",
        ) from None
    return transformers


def read_texts(inputs: str | Path | Sequence[str]) -> list[str]:
    """Return the texts of a file, one per line, or of a sequence; blank ones are left out.

    Raises InputError for a file that cannot be read, and if no text is left.
    """
    if isinstance(inputs, str | Path):
        try:
            lines: Sequence[str] = Path(inputs).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InputError(f"cannot read the inputs {inputs}: {reason}", _TEXTS) from None
        source = str(inputs)
    else:
        lines, source = inputs, "inputs"
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{source} holds no text", _TEXTS)
    return texts


def load(folder: Path) -> TextModel:
    """Load a local model and its tokenizer with `transformers`, on CPU in FP32; nothing is downloaded.

    Raises MissingDependencyError, or InputError for a folder `transformers` cannot load or a kind that is not compared.
    """
    transformers = require_transformers()
    architecture = _architecture(folder)
    with _quiet(transformers), _LoadingErrors(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(f"{architecture} is an encoder-decoder, which compare does not run", _WEIGHTS_ONLY)
        causal = _is_causal(architecture)
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        module = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what it makes of a folder without tokenizer files
            raise InputError(f"{folder} has no tokenizer", f"add its files (tokenizer.json, ...), or {_WEIGHTS_ONLY}")
    return TextModel(module.eval(), tokenizer, architecture, causal)


class _LoadingErrors:
    """Turns what transformers raises over a folder it cannot load into an InputError; ours and the unexpected pass."""

    expected = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
    libraries = ("transformers", "huggingface_hub", "tokenizers", "safetensors")  # errors that these define

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, MicroscaleError):
            return
        if isinstance(error, self.expected) or type(error).__module__.partition(".")[0] in self.libraries:
            reason = " ".join(str(error).split()) or type(error).__name__
            shown = reason if len(reason) <= 300 else f"{reason[:300]}..."
            raise InputError(f"transformers cannot load {self.folder}: {shown}", _WEIGHTS_ONLY) from error


_WEIGHTS_ONLY = "leave out the inputs to compare weights only"


def _architecture(folder: Path) -> str:
    """The class name that config.json gives."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json, so there is no model to run on the inputs", _WEIGHTS_ONLY)
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["unknown"]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object: {error}", _WEIGHTS_ONLY) from None
    return str(names[0])


def _is_causal(architecture: str) -> bool:
    """True for ...ForCausalLM, and for the older names that transformers lists as such (GPT-2's)."""
    from transformers.models.auto import modeling_auto

    older = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return architecture.endswith("ForCausalLM") or architecture in older


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and notes off the terminal while loading, and put its settings back."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# -- comparing outputs -------------------------------------------------------------------------------------------------


class ReferenceOutputs:
    """The unquantized model's outputs by batch: kept while they are small, computed again where they are not."""

    def __init__(self, model: TextModel, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._size = 0

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        found = self._kept.get(index)
        if found is None:
            found = self.model.run(self.model.module, self.batches[index])
            size = sum(t.numel() for t in found)
            if self._size + size <= _KEEP:
                self._kept[index] = found
                self._size += size
        return found


@dataclasses.dataclass
class OutputErrors:
    """What a module's outputs lose against the reference, gathered batch by batch.

    `cosine` and `relative` are by text index. For a causal LM, `kl` sums KL(p || q) in nats over `tokens` tokens, and
    `entropy` the cross entropy of the `predicted` tokens that follow another.
    """

    cosine: dict[int, float] = dataclasses.field(default_factory=dict)
    relative: dict[int, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    kl: float = 0.0
    predicted: int = 0
    entropy: float = 0.0

    def add(self, batch: Batch, reference: list[torch.Tensor], outputs: list[torch.Tensor], causal: bool) -> None:
        """Count one batch in; both lists hold FP32 [tokens, features] per text."""
        for row, (index, p, q) in enumerate(zip(batch.texts, reference, outputs, strict=True)):
            a, b = p.double().flatten(), q.double().flatten()
            size = float(a.norm())
            self.cosine[index] = float(a @ b) / max(size * float(b.norm()), 1e-300)
            self.relative[index] = float((a - b).norm()) / max(size, 1e-300)
            self.tokens += len(p)
            if causal:
                self._add_distributions(p, q, batch.ids[row][batch.mask[row].bool()])

    def _add_distributions(self, p_logits: torch.Tensor, q_logits: torch.Tensor, ids: torch.Tensor) -> None:
        for start in range(0, len(ids), _ROWS):
            part = slice(start, start + _ROWS)
            log_p, log_q = (t[part].double().log_softmax(-1) for t in (p_logits, q_logits))
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            following = ids[start + 1 : start + _ROWS + 1]
            self.entropy -= float(log_q[: len(following)].gather(-1, following[:, None]).sum())
            self.predicted += len(following)

    @property
    def worst(self) -> int:
        """Index of the text with the lowest cosine; one with NaN outputs is lower than all."""
        return min(self.cosine, key=lambda i: self.cosine[i] if math.isfinite(self.cosine[i]) else -math.inf)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean cross entropy; None if no token follows another, or it is not finite."""
        return finite(_exp(self.entropy / self.predicted)) if self.predicted else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def finite(value: float) -> float | None:
    """Return the value, or None for NaN and infinity."""
    return value if math.isfinite(value) else None
