"""Train the demo model: a small Qwen3-type language model, from scratch, on plain text, on a CPU.

Text -> pieces of about 20 kB (optionally only the simplest ones) -> byte-level BPE -> Qwen3 -> an ordinary
Hugging Face folder in bf16 plus `training.json`. The learning rate follows the wall clock, so a run surely
ends. Every evaluation rewrites the model folder when the model is the best so far; a killed run that is
started again with the same command resumes from the last checkpoint in --work-dir.
On a machine that does other work too, set OMP_WAIT_POLICY=passive: threads then wait without spinning.
"""

import argparse
import dataclasses
import hashlib
import json
import lzma
import math
import os
import platform
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"
HEAD_DIM = 64
SEQUENCE_LENGTH = 256  # tokens a training window
FINAL_LENGTH = 512  # tokens a window in the last part of the run; also the model's maximum length
FINAL_SHARE = 0.15  # share of the time trained at FINAL_LENGTH
WARMUP_SHARE = 0.02  # share of the time with a rising learning rate
BATCH_TOKENS = 6144  # tokens an optimizer step
WEIGHT_DECAY = 0.1  # of Muon; AdamW uses none
MAX_WEIGHT_BYTES = 15_500_000
EXAMPLES = """examples:
  # the run behind benchmarks/demo/model
  python benchmarks/demo/train.py --text books.train.txt.xz --valid-text books.valid.txt \\
      --select-simple 0.25 --minutes 74 --intermediate-size 512 --compile --out model

  # a two-minute smoke run
  python benchmarks/demo/train.py --text book.txt --valid-text other.txt --minutes 2 --layers 2 --out tiny
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", nargs="+", type=Path, required=True, help="training text, UTF-8, plain or .xz")
    add("--valid-text", type=Path, required=True, help="held-out text, UTF-8, plain or .xz")
    add("--out", type=Path, required=True, help="model folder to write")
    add("--work-dir", type=Path, default=Path("/tmp/demo-train"), help="checkpoint and token cache")
    add("--minutes", type=float, default=75.0, help="wall-clock training time, tokenizing excluded")
    simple = "keep this share of the pieces: most common words, most dialogue, shortest sentences"
    add("--select-simple", type=float, default=1.0, metavar="FRACTION", help=simple)
    add("--vocab-size", type=int, default=4096)
    add("--hidden-size", type=int, default=256, help="a multiple of 128; heads of 64, half as many for kv")
    add("--intermediate-size", type=int, default=768)
    add("--layers", type=int, default=6)
    add("--matrix-lr", type=float, default=6e-3, help="peak rate of Muon (matrices of the blocks)")
    add("--other-lr", type=float, default=3e-3, help="peak rate of AdamW (embedding and norms)")
    add("--eval-minutes", type=float, default=5.0, help="minutes between evaluations")
    add("--eval-tokens", type=int, default=49152, help="tokens an evaluation reads; the last one reads all")
    add("--checkpoint-minutes", type=float, default=2.0, help="minutes between checkpoints")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile the loss (needs a C++ compiler)")
    args = parser.parse_args()
    for path in [*args.text, args.valid_text]:
        if not path.is_file():
            parser.error(f"{path} is not a file; give UTF-8 text, plain or .xz")
    if not 0 < args.select_simple <= 1:
        parser.error(f"--select-simple {args.select_simple} is not in (0, 1]; 1 keeps all text")
    if args.hidden_size % (2 * HEAD_DIM):
        parser.error(f"--hidden-size {args.hidden_size} is not a multiple of {2 * HEAD_DIM}")
    return args


# ---------------------------------------------------------------- data


def read_text(path: Path) -> str:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def split_pieces(text: str, size: int = 20_000) -> list[str]:
    """Cut `text` at paragraph ends into pieces of at least `size` characters (the last may be shorter)."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end].strip())
        start = end + 2
    return [piece for piece in pieces if piece]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def simplicity(piece: str, common: set[str]) -> tuple[float, float, float]:
    """Share of common words, quotation marks a word, and negative log of words a sentence."""
    words = words_of(piece)
    count = max(1, len(words))
    sentences = max(1, len(re.findall(r"[.!?]+", piece)))
    quotes = min(0.06, piece.count('"') / count)  # capped: more dialogue than in a novel is not simpler
    return sum(word in common for word in words) / count, quotes, -math.log(count / sentences)


def select_simple(train: list[str], valid: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Keep the simplest `fraction` of the training pieces, and the validation pieces that pass the same mark.

    A piece's score is the z-score of its share of the training text's 1000 most common words, plus half the
    z-scores of quotation marks a word and of negative log sentence length.
    """
    counts: Counter[str] = Counter()
    for piece in train:
        counts.update(words_of(piece))
    common = {word for word, _ in counts.most_common(1000)}
    features = np.array([simplicity(piece, common) for piece in train])
    valid_features = np.array([simplicity(piece, common) for piece in valid])
    scale = np.array([1.0, 0.5, 0.5]) / (features.std(0) + 1e-9)
    scores, valid_scores = ((rows - features.mean(0)) @ scale for rows in (features, valid_features))
    mark = np.quantile(scores, 1 - fraction)
    kept = [piece for piece, score in zip(train, scores, strict=True) if score >= mark]
    return kept, [piece for piece, score in zip(valid, valid_scores, strict=True) if score >= mark]


def train_tokenizer(pieces: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, pieces: list[str]) -> np.ndarray:
    """All pieces in one row of uint16 ids, an end-of-text token before each."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(pieces):
        ids += [0, *encoding.ids]
    return np.array(ids, dtype=np.uint16)


def prepare(args: argparse.Namespace) -> dict:
    """Tokenizer, token rows and facts about the data, cached in the work folder."""
    files = []
    for path in [*args.text, args.valid_text]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    cache = args.work_dir / f"data-{fingerprint(files, args.select_simple, args.vocab_size)}.pt"
    if cache.exists():
        return torch.load(cache, weights_only=False)
    train = [piece for path in args.text for piece in split_pieces(read_text(path))]
    valid = split_pieces(read_text(args.valid_text))
    sets = {"whole": valid}
    if args.select_simple < 1:
        train, selected = select_simple(train, valid, args.select_simple)
        sets |= {"selected": selected} if selected else {}
    tokenizer = train_tokenizer(train, args.vocab_size)
    data = {
        "files": files,
        "tokenizer": tokenizer.to_str(),
        "train": encode(tokenizer, train),
        "train_bytes": sum(len(piece.encode()) for piece in train),
        "valid": {name: encode(tokenizer, pieces) for name, pieces in sets.items()},
        "valid_bytes": {name: sum(len(piece.encode()) for piece in sets[name]) for name in sets},
    }
    save_atomically(cache, lambda path: torch.save(data, path))
    return data


def windows(tokens: np.ndarray, first: int, count: int, length: int, seed: int) -> torch.Tensor:
    """Training windows `first` to `first + count`, int64 [count, length + 1].

    Every epoch visits the starts, SEQUENCE_LENGTH apart, in a new order and from a new offset. The same
    arguments always give the same windows, so a resumed run goes on where it stopped.
    """
    stride = SEQUENCE_LENGTH
    per_epoch = (len(tokens) - length - 1 - stride) // stride
    rows = []
    for epoch in range(first // per_epoch, (first + count - 1) // per_epoch + 1):
        generator = np.random.default_rng([seed, epoch])
        starts = generator.permutation(per_epoch) * stride + generator.integers(stride)
        begin = max(first - epoch * per_epoch, 0)
        rows += [tokens[s : s + length + 1] for s in starts[begin : first + count - epoch * per_epoch]]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---------------------------------------------------------------- files


def fingerprint(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    save_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_model(model: Qwen3ForCausalLM, args: argparse.Namespace, data: dict, record: dict) -> None:
    """Write the model folder in bf16, each file atomically."""
    staging = args.work_dir / "staging"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    with torch.device("meta"):
        shell = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    shell.save_pretrained(staging, state_dict=weights)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(data["tokenizer"]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=FINAL_LENGTH,
    ).save_pretrained(staging)
    tokenizer_config = json.loads((staging / "tokenizer_config.json").read_text())
    # The class name that older transformers know too.
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(staging / "tokenizer_config.json", tokenizer_config)
    write_json(staging / "training.json", record)
    args.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        save_atomically(args.out / file.name, lambda path, file=file: path.write_bytes(file.read_bytes()))


# ---------------------------------------------------------------- training


@dataclasses.dataclass
class State:
    """All that changes while training, kept in the checkpoint beside weights and optimizer state."""

    step: int = 0
    windows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluations: list[dict] = dataclasses.field(default_factory=list)


def build_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // HEAD_DIM,
        num_key_value_heads=args.hidden_size // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=FINAL_LENGTH,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    size = 2 * model.num_parameters()
    if size > MAX_WEIGHT_BYTES:
        sys.exit(f"weights of {size} bytes exceed {MAX_WEIGHT_BYTES}; lower --layers or the sizes")
    return model


def token_loss(model: Qwen3ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats a token; batch int64 [sequences, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, data: dict, max_tokens: int | None = None) -> dict:
    """Loss of each validation set in nats a token and bits a byte, over evenly spread windows."""
    result, length = {}, SEQUENCE_LENGTH
    for name, row in data["valid"].items():
        count = (len(row) - 1) // length
        chosen = np.linspace(0, count - 1, min(count, (max_tokens or len(row)) // length)).astype(int)
        total = 0.0
        for part in np.array_split(chosen, max(1, len(chosen) // 16)):
            batch = np.stack([row[w * length : (w + 1) * length + 1] for w in part]).astype(np.int64)
            total += token_loss(model, torch.from_numpy(batch)).item() * len(part)
        loss = total / len(chosen)
        result[name] = {
            "nats_per_token": round(loss, 4),
            "bits_per_byte": round(loss / math.log(2) * len(row) / data["valid_bytes"][name], 4),
            "tokens": len(chosen) * length,
        }
    return result


def make_record(args: argparse.Namespace, data: dict, state: State, parameters: int) -> dict:
    """What `training.json` says; the command without folders in its paths."""
    command = shlex.join(["python", *(Path(word).name if "/" in word else word for word in sys.argv)])
    return {
        "command": command,
        "finished": False,
        "files": data["files"],
        "parameters": parameters,
        "train_tokens_available": len(data["train"]),
        "train_bytes_selected": data["train_bytes"],
        "tokens_seen": state.tokens,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / state.seconds),
        "validation": state.evaluations[-1]["validation"],
        "evaluations": state.evaluations,
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, int | float)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def rate_factor(progress: float) -> float:
    """Rises linearly to 1 over WARMUP_SHARE, then falls linearly to 0 at progress 1."""
    return min(progress / WARMUP_SHARE + 0.01, (1 - progress) / (1 - WARMUP_SHARE))


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    model, data, state = build_model(args), prepare(args), State()
    main_set = "selected" if "selected" in data["valid"] else "whole"
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = {  # and their peak rates
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"): args.matrix_lr,
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0): args.other_lr,
    }
    shape = fingerprint(data["files"], args.select_simple, model.config.to_dict())
    checkpoint = args.work_dir / f"checkpoint-{shape}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        state = State(**saved["state"])
        print(f"resumed at step {state.step}, {state.seconds / 60:.1f} minutes", flush=True)
    loss_fn = torch.compile(token_loss, dynamic=False) if args.compile else token_loss
    parameters, available = model.num_parameters(), len(data["train"])
    print(f"{parameters / 1e6:.2f} M parameters, {available / 1e6:.2f} M training tokens", flush=True)
    total = args.minutes * 60
    clock, next_checkpoint = time.monotonic() - state.seconds, state.seconds
    next_eval = state.seconds + args.eval_minutes * 60
    while state.seconds < total:
        progress = state.seconds / total
        length = FINAL_LENGTH if progress > 1 - FINAL_SHARE else SEQUENCE_LENGTH
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_factor(progress)
        count = BATCH_TOKENS // length
        batch = windows(data["train"], state.windows, count, length, args.seed)
        loss = loss_fn(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        state.windows += count
        state.tokens += count * length
        state.seconds = time.monotonic() - clock
        if state.step % 20 == 0:
            minutes, speed = state.seconds / 60, state.tokens / state.seconds
            print(
                f"{minutes:.1f} min  step {state.step}  loss {loss.item():.3f}  {speed:.0f} tokens/s",
                flush=True,
            )
        if state.seconds >= min(next_eval, total):
            validation = evaluate(model, data, args.eval_tokens)
            entry = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds)}
            state.evaluations.append(entry | {"validation": validation})
            print("evaluation", json.dumps(state.evaluations[-1]), flush=True)
            if validation[main_set]["nats_per_token"] < state.best_loss:
                state.best_loss = validation[main_set]["nats_per_token"]
                write_model(model, args, data, make_record(args, data, state, parameters))
            state.seconds = next_checkpoint = time.monotonic() - clock
            next_eval = state.seconds + args.eval_minutes * 60
        if state.seconds >= next_checkpoint:
            saved = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "state": dataclasses.asdict(state),
            }
            save_atomically(checkpoint, lambda path, saved=saved: torch.save(saved, path))
            next_checkpoint = state.seconds + args.checkpoint_minutes * 60
    best = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    record = json.loads((args.out / "training.json").read_text())
    record |= {"finished": True, "validation": evaluate(best, data)}
    write_json(args.out / "training.json", record | {"evaluations": state.evaluations})
    print("final", json.dumps(record["validation"]), flush=True)


if __name__ == "__main__":
    train(parse_args())
