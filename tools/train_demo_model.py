"""Train the bundled model `demo`, a small Qwen3, on the sources of the standard library; or a model of another family.

    python tools/train_demo_model.py --out lockkit/models/demo
    python tools/train_demo_model.py --family phi --hidden 192 --layers 6 --seed 1 --work .cache/phi --out phi

1. Train a byte-level BPE tokenizer on the `train` split.
2. Train the model, with Muon for the matrices of the decoder layers and AdamW for embeddings and
   norms. The learning rate warms up, is constant, and then falls linearly to zero.
3. Measure the perplexity of the model and of an interpolated unigram and bigram baseline on the `evaluate` split.
   Sample a function. Write weights (bfloat16), tokenizer and model card.

A module belongs to a split by a hash of its name (lockkit/text). So the model is not trained on the text that it is
measured on, nor on the text that lockkit later distils from. The same command resumes an interrupted run from `--work`.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lockkit.attack.config import audit_config
from lockkit.lock.config import LockConfig
from lockkit.measure.totals import perplexity
from lockkit.text import documents, split_of, token_blocks
from lockkit.training import shuffled_order
from lockkit.verify.config import VerifyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
PROMPT = 'def find_files(path, pattern):\n    """'


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/demo-model"),
        help="folder of the tokenizer and of the state of an interrupted run",
    )
    parser.add_argument("--family", default="qwen3", help="model type, as transformers names it")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--block", type=int, default=512, help="tokens per row")
    parser.add_argument("--tokens", type=int, help="tokens of each split, at most; by default all")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=40, help="steps over which the learning rate rises from 0")
    parser.add_argument(
        "--decay", type=float, default=0.4, help="share of the steps at the end over which the learning rate falls to 0"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder`, or train one there: byte-level BPE with Qwen2's pre-tokenization."""
    from tokenizers import trainers
    from transformers import AutoTokenizer, Qwen2Tokenizer

    if not (folder / "tokenizer.json").exists():
        tokenizer = Qwen2Tokenizer()
        from tokenizers.pre_tokenizers import ByteLevel

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        backend = tokenizer.backend_tokenizer
        backend.train_from_iterator((d.text for d in documents("stdlib", "train")), trainer)
        trained = json.loads(backend.to_str())["model"]
        Qwen2Tokenizer(
            vocab=trained["vocab"],
            merges=[tuple(merge) for merge in trained["merges"]],
            model_max_length=1024,
        ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        args.family,
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.02,
    )
    torch.manual_seed(args.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device)


class Muon(torch.optim.Optimizer):
    """Muon: momentum orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in float32.

    `torch.optim.Muon` computes in bfloat16. On a CPU without bfloat16 units, that takes twice as long as the whole
    backward pass. This class also computes matrices of the same shape together.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices."""
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                for p, buffer in zip(params, buffers, strict=True):
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                grads = torch.stack([p.grad.lerp(b, group["momentum"]) for p, b in zip(params, buffers, strict=True)])
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(grads), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Move the singular values of each matrix of `x`, `[n, rows, columns]`, towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for all other parameters."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    return [
        Muon(matrices, lr=args.muon_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, args: argparse.Namespace) -> float:
    """Share of the peak learning rate at a step."""
    decay_start = args.steps * (1 - args.decay)
    if step < args.warm_up:
        return (step + 1) / args.warm_up
    return 1.0 if step < decay_start else max(0.0, (args.steps - step) / (args.steps - decay_start))


def train(model: PreTrainedModel, rows: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    """Train `model` in place. The state is saved to `--work` every 100 steps."""
    optimizers = make_optimizers(model, args)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    state_file, step = args.work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"resuming from step {step}", flush=True)
    started, first = time.perf_counter(), step
    order = shuffled_order(len(rows), args.steps * args.batch, args.seed)
    while step < args.steps:
        factor = learning_rate_factor(step, args)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = rows[order[step * args.batch : (step + 1) * args.batch]].to(args.device)
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 20 == 0:
            speed = (step - first) * args.batch * args.block / (time.perf_counter() - started)
            print(f"step {step}/{args.steps} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        if step % 100 == 0 or step == args.steps:
            model.eval()
            print(f"step {step} held-out perplexity {perplexity(model, held_out[:32], 4):.2f}", flush=True)
            model.train()
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step},
                state_file.with_suffix(".tmp"),
            )
            state_file.with_suffix(".tmp").rename(state_file)


def beginnings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Perplexities on the beginning of the split `evaluate`, as each command measures them by default."""
    commands = {
        "verify": VerifyConfig().tokens,
        "lock": LockConfig().validation_tokens,
        "attack --suite standard": audit_config("standard").evaluation_tokens,
        "attack": audit_config("quick").evaluation_tokens,
    }
    found = []
    for command, tokens in commands.items():
        rows = token_blocks(tokenizer, documents("stdlib", "evaluate"), VerifyConfig().block_tokens, tokens)
        found.append(f"{perplexity(model, rows, 4):.2f} on {tokens:,} tokens (`lockkit {command}`)")
    return ", ".join(found)


def bigram_perplexity(train_rows: torch.Tensor, rows: torch.Tensor, vocab: int) -> float:
    """Perplexity of `w * bigram + (1 - w) * unigram`, from counts (those of unigrams plus 1), with the best `w`."""
    ids = train_rows.flatten()
    unigram = torch.bincount(ids, minlength=vocab).double() + 1
    unigram /= unigram.sum()
    pairs = collections.Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    first = torch.bincount(ids[:-1], minlength=vocab).double()
    left, right = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    seen = torch.tensor([pairs[p] for p in zip(left.tolist(), right.tolist(), strict=True)]).double()
    bigram = seen / first[left].clamp_min(1)
    return min(
        math.exp(-torch.log(w * bigram + (1 - w) * unigram[right]).mean().item())
        for w in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    )


def tidy(folder: Path) -> None:
    """Remove settings of this run from the tokenizer's configuration, and make the weights readable for all users."""
    file = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if value is not None}
    for key in ("backend", "is_local", "local_files_only"):
        kept.pop(key, None)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def write_card(args: argparse.Namespace, model: PreTrainedModel, figures: dict, sample: str) -> None:
    """Write the model card."""
    parameters = sum(p.numel() for p in model.parameters())
    c = model.config
    title, purpose = f"{args.out.name}: made as lockkit's demo was", "lockkit has a second model to be measured on"
    if args.out.name == "demo":
        title = "demo: the model that lockkit ships"
        purpose = "`lockkit lock demo`\nhas a real pretrained model to work on without a network"
    card = f"""---
license: apache-2.0
library_name: transformers
tags: [code, python, demo]
---
# {title}

A causal language model (`{args.family}`) of {parameters:,} parameters ({c.num_hidden_layers} layers, hidden size
{c.hidden_size}, MLP width {c.intermediate_size}, {c.num_attention_heads} heads, {c.num_key_value_heads} for keys
and values) with a byte-level BPE tokenizer of {c.vocab_size:,} tokens. It exists so that {purpose}. It writes text that looks like Python, not programs.

| | |
|---|---|
| data | sources and docstrings of the standard library of Python {platform.python_version()}, {figures["documents"]:,} modules in the split `train` |
| tokens | {figures["train_tokens"]:,} in that split, {figures["seen_tokens"]:,} seen ({args.steps:,} steps of {args.batch} x {args.block}) |
| held-out perplexity | **{figures["perplexity"]:.2f}** per token on {figures["evaluate_tokens"]:,} tokens of stdlib: all of the split `evaluate`, in rows of {args.block} |
| on the beginning of that split, in rows of {VerifyConfig().block_tokens} | {figures["beginnings"]} |
| unigram and bigram baseline | {figures["baseline"]:.1f} on the same tokens (interpolated counts of the training text, best weight) |
| optimiser | Muon (learning rate {args.muon_lr:g}) for layer matrices, AdamW ({args.adam_lr:g}) for the rest; warm-up {args.warm_up} steps, linear decay over the last {args.decay:.0%} |
| seed, precision | {args.seed}; trained in float32, stored in bfloat16 |
| machine | {figures["machine"]} |

Made by `{figures["command"]}`.

A module belongs to a split by a hash of its name (`lockkit/text`): 60 % `train`, and, never trained on,
`distill`, `validate`, `evaluate` and `finetune`. Tests (`test.*`) are used for training only.

A sample (temperature 0.6, seed {args.seed}), given the first two lines:

```python
{sample}
```
"""
    (args.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Train, score, and write the model and its card."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.work, args.vocab)
    train_rows = token_blocks(tokenizer, documents("stdlib", "train"), args.block, args.tokens)
    held_out = token_blocks(tokenizer, documents("stdlib", "evaluate"), args.block, args.tokens)
    print(f"{train_rows.numel():,} training tokens, {held_out.numel():,} held out", flush=True)
    model = make_model(args, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, train_rows, held_out, args)

    model = model.to(torch.bfloat16)
    model.generation_config.do_sample = False
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    tidy(args.out)
    model = model.float().eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").to(args.device)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 0, "max_new_tokens": 110}
    sample = tokenizer.decode(model.generate(**prompt, **sampling)[0])
    documents_seen = sum(split_of(d.name) == "train" for d in documents("stdlib", "train"))
    figures = {
        "documents": documents_seen,
        "train_tokens": train_rows.numel(),
        "seen_tokens": args.steps * args.batch * args.block,
        "evaluate_tokens": held_out.numel(),
        "perplexity": perplexity(model, held_out, 4),
        "beginnings": beginnings(model, tokenizer),
        "baseline": bigram_perplexity(train_rows, held_out.cpu(), args.vocab),
        "machine": f"{torch.cuda.get_device_name() if args.device == 'cuda' else f'{torch.get_num_threads()} CPU threads'}, torch {torch.__version__}",
        "command": "python " + " ".join(sys.argv),
    }
    write_card(args, model, figures, sample)
    print(json.dumps(figures, indent=1), sample, sep="\n")


if __name__ == "__main__":
    main()
