"""Why a chain gives its teacher away, and what was tried against it, on the bundled model.

    python tools/study_hardening.py leak --out tools/results/hardening.json
    python tools/study_hardening.py layer --coupling 1 --normalise --ridge 1 --out tools/results/hardening.json

`leak`: how well a closed form does that knows the teacher's rows (gate and up) only up to noise. Each
row keeps the stated correlation of its pre-activation; the second layer is solved by ridge regression.
A lock is as hard as nothing at all once its rows are as far from the teacher's as the last line says.

`layer`: one decoder layer's chain, distilled from the teacher's units with a stronger coupling:

1. Block l reads `t = x + gain * s`; with --normalise `t` is brought back to the rms of `x`, which keeps
   strong couplings finite. --stream puts an elementwise non-linearity on `s` where it is read; --state widens the
   stream by so many dimensions that only blocks read and write, and takes units away for their parameters.
2. Loss: NMSE; --ridge adds a hinge on the error of the two closed-form attackers (stacked, linearised),
   each fitted on a part of the batch and scored on the rest, as a differentiable ridge solve (unlock-aware
   distillation); --linear adds a hinge on the share of the pre-activations that is linear in `x`.
3. Measured on held-out tokens: the lock's NMSE to the teacher, the attackers' NMSE to the lock and to the
   teacher, and that of collapses into K stages.

`ceiling`: what an attack costs that leaves the chains alone and trains all else (`frozen-dlr`), over the cheapest
on the original, from finished audits. No weights of the chains can make it dearer, as long as they compute what they
computed:

    python tools/study_hardening.py ceiling AUDIT [AUDIT ...] --out tools/results/hardening.json

Results are added to the file; the rest of it stays. tools/results/hardening.md says what they mean.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lockkit.attack.closed_form import Ridge, units_of
from lockkit.attack.rows import ROWS, read_rows
from lockkit.attack.target import cost_to_target
from lockkit.files import read_json, write_json
from lockkit.lock.modulewise import nmse
from lockkit.measure.metrics import Comparison
from lockkit.models.families import decoder_layers, family_of, mlp_weights
from lockkit.models.load import DEMO, load_config, load_model, load_tokenizer
from lockkit.text import documents, token_blocks
from lockkit.version import git_hash, versions

TRAIN_TOKENS, FIT_TOKENS, HELD_OUT_TOKENS = 200_000, 32_768, 8_192
DEPTH, HINGE_TOKENS, HINGE_EVERY = 32, 1536, 4
CORRELATIONS = (1.0, 0.95, 0.8, 0.6, 0.4, 0.2, 0.0)
RIDGES = (1e-6, 1e-4, 1e-2)


@torch.no_grad()
def mlp_inputs(model, rows: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's MLP inputs, `[tokens, hidden]`."""
    seen: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _m, args, into=into: into.append(args[0].flatten(0, 1)))
        for layer, into in zip(decoder_layers(model), seen, strict=True)
    ]
    for part in rows.split(8):
        model.model(part, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


@torch.no_grad()
def leak(model, family, train: torch.Tensor, evaluation: torch.Tensor) -> list[dict]:
    """KL to the original of a closed form from the teacher's rows plus noise."""
    inputs = mlp_inputs(model, train[: FIT_TOKENS // train.shape[1]])
    found = []
    for correlation in CORRELATIONS:
        generator, solved, errors = torch.Generator().manual_seed(0), copy.deepcopy(model), []
        for layer, x in zip(decoder_layers(solved), inputs, strict=True):
            y, weights = layer.mlp(x), mlp_weights(layer.mlp, family)
            for rows in (weights.up, weights.gate):
                noise = torch.randn(rows.shape, generator=generator)
                noise *= ((x @ rows.T).square().mean(0) / (x @ noise.T).square().mean(0)).sqrt()[:, None]
                rows.copy_(correlation * rows + math.sqrt(1 - correlation**2) * noise)
            ridge = Ridge(intercept=False)
            for index, (a, b) in enumerate(zip(x.split(2048), y.split(2048), strict=True)):
                ridge.add(units_of(weights, a, layer.mlp.act_fn), b, index % 8 == 7)
            down, _, _, error = ridge.solve()
            weights.down.copy_(down)
            errors.append(error)
        kl = Comparison()
        for ids in evaluation.split(4):
            kl.add(model(ids).logits[:, :-1], solved(ids).logits[:, :-1])
        found.append({"correlation": correlation, "kl_divergence": kl.kl_divergence, "errors": errors})
        print(f"correlation {correlation}: KL {kl.kl_divergence:.4f}", flush=True)
    return found


def ceiling(audits: list[Path]) -> list[dict]:
    """Cost to target of `frozen-dlr`, mean over its runs, over the cheapest attack on the original."""
    found = []
    for folder in audits:
        summary = read_json(folder / "summary.json", "AUDIT")
        made = read_rows(folder / ROWS)
        rows = [made[key] for key in summary["row_keys"] if key in made]
        for name, task in summary["tasks"].items():
            for resource in ("tokens", "flops"):
                costs = _costs([row for row in rows if row["task"] == name], task["target_loss"], resource)
                frozen = {model: costs.get((model, "frozen-dlr")) for model in ("locked", "original")}
                if all(frozen.values()):
                    least = min(cost for (model, _), spent in costs.items() if model == "original" for cost in spent)
                    figures = {model: sum(spent) / len(spent) / least for model, spent in frozen.items()}
                    found.append({"audit": folder.name, "task": name, "resource": resource} | figures)
                    print(found[-1])
    return found


def _costs(rows: list[dict], target: float, resource: str) -> dict[tuple[str, str], list[float]]:
    """What each run that reached `target` spent, by model and attack."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cost = cost_to_target(row, target) if row.get("curve") else None
        if cost:
            found.setdefault((row["model"], row["attack"]), []).append(cost[resource])
    return found


@dataclass
class Chain:
    """A gated chain as packed tensors: `read` [depth, width, 2 rank], `write` [depth, rank, width].

    `width` is the hidden size plus that of a state of the stream's own, which is 0 in `x`.
    """

    read: torch.Tensor
    write: torch.Tensor
    gain: float
    rms: float | None  # of x, if the blocks' input is normalised
    stream: str = "linear"

    def block_input(self, x: torch.Tensor, stream: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        if self.stream == "absolute":
            stream = stream.abs()
        elif self.stream == "tanh":  # about -1..1 as the next block reads it, before it is scaled back
            stream = torch.tanh(self.gain * stream) / self.gain
        t = torch.add(x, stream, alpha=self.gain * share)
        return t if self.rms is None else t * (self.rms / t.square().mean(-1, keepdim=True).sqrt())

    def run(self, x: torch.Tensor, share: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pre-activations of every block, and the stream before each and after the last."""
        stream, before = [torch.zeros_like(x)], []
        for read, write in zip(self.read, self.write, strict=True):
            before.append(self.block_input(x, stream[-1], share) @ read)
            stream.append(stream[-1] + gated(before[-1], 1) @ write)
        return before, stream


def gated(before: torch.Tensor, blocks: int) -> torch.Tensor:
    """Units of `blocks` blocks from their pre-activations, gate and up of each side by side."""
    parts = before.unflatten(-1, (blocks, 2, -1))
    return (F.silu(parts[..., 0, :]) * parts[..., 1, :]).flatten(-2)


def solve(a: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    gram = a.T @ a
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), a.T @ y)


def hinge(chain: Chain, x: torch.Tensor, before: list[torch.Tensor], out: torch.Tensor, cap: float) -> torch.Tensor:
    """By how much both attackers, fitted on two thirds of the batch, stay below an error of `cap` on the rest."""
    fit = len(x) * 2 // 3
    rows = (torch.cat(list(chain.read), 1), solve(x[:fit], torch.cat(before, 1)[:fit], 1e-4))
    total = x.new_zeros(())
    for first_layer in rows:
        units = gated(x @ first_layer, DEPTH)
        total = total + F.relu(cap - nmse(units[fit:] @ solve(units[:fit], out[:fit], 1e-3), out[fit:]))
    return total


def start(weights, x: torch.Tensor, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's units in blocks, and noise where they read and write the state.

    A state costs parameters: the units that add least on `x` are left out for it.
    """
    hidden = len(weights.down)
    energy = gated(x @ torch.cat([weights.gate, weights.up]).T, 1).square().mean(0) * weights.down.square().sum(0)
    rank = len(weights.up) * hidden // (hidden + state) // DEPTH
    kept = energy.topk(rank * DEPTH).indices.sort().values
    units = kept[torch.randperm(rank * DEPTH)].view(DEPTH, -1)
    read = torch.stack([torch.cat([weights.gate[u], weights.up[u]]).T for u in units])
    write = torch.stack([weights.down[:, u].T for u in units])
    noise = [torch.randn(*m.shape[:dim], state, *m.shape[dim + 1 :]) * m.std() for m, dim in ((read, 1), (write, 2))]
    return torch.cat([read, noise[0]], 1), torch.cat([write, noise[1]], 2)


def distil(teacher, weights, x: torch.Tensor, options: argparse.Namespace) -> Chain:
    """Train one layer's chain; see the top of this file."""
    sample = x[:4096]
    rms, out_rms = (v.square().mean().sqrt().item() for v in (sample, teacher(sample)))
    read, write = start(weights, sample, options.state)
    x = F.pad(x, (0, options.state))
    sizes = [m.square().mean().sqrt() for m in (read, write)]
    parameters = [(m / size).requires_grad_() for m, size in zip((read, write), sizes, strict=True)]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True)
    typical = None
    for step in range(options.steps):
        rate = options.learning_rate * min(1, (step + 1) / 15) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimiser.param_groups[0]["lr"] = rate
        chain = Chain(*(p * s for p, s in zip(parameters, sizes, strict=True)), options.coupling * rms / out_rms, None)
        chain.stream = options.stream
        chain.rms = rms if options.normalise else None
        hinged = options.ridge and step % HINGE_EVERY == 0 and step > 0.2 * options.steps
        batch = x[torch.randint(len(x), (HINGE_TOKENS if hinged else 512,))]
        before, stream = chain.run(batch, min(1.0, (step + 1) / (0.4 * options.steps)))
        with torch.no_grad():
            wanted = teacher(batch[:, : len(weights.down)])
        loss = nmse(stream[-1][:, : len(weights.down)], wanted)
        if options.linear:
            values = torch.cat(before[1:], 1)
            rest = values - batch @ solve(batch, values.detach(), 1e-4)
            linear = 1 - rest.square().mean(0) / values.square().mean(0)
            loss = loss + options.linear * F.relu(linear - 0.35).mean()
        if hinged:
            loss = loss + options.ridge * hinge(chain, batch, before, stream[-1], options.cap)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 2 * typical if typical else 1e9)
        if torch.isfinite(norm):
            typical = norm.item() if typical is None else 0.95 * typical + 0.05 * min(norm.item(), 2 * typical)
            optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss.item():.4f}", flush=True)
    chain.read, chain.write = (p.detach() * s for p, s in zip(parameters, sizes, strict=True))
    return chain


@torch.no_grad()
def collapsed(chain: Chain, x: torch.Tensor, held_out: torch.Tensor, stages: int, linearised: bool) -> torch.Tensor:
    """The output on `held_out` of the chain solved for `stages` stages on `x`; the best of several ridges."""
    (before, stream), (_, held_stream) = chain.run(x), chain.run(held_out)
    blocks, s, held_s = DEPTH // stages, torch.zeros_like(x), torch.zeros_like(held_out)
    for first in range(0, DEPTH, blocks):
        t, held_t = chain.block_input(x, s), chain.block_input(held_out, held_s)
        own = slice(first, first + blocks)
        rows = solve(t, torch.cat(before[own], 1), 1e-6) if linearised else torch.cat(list(chain.read[own]), 1)
        units, held_units = gated(t @ rows, blocks), gated(held_t @ rows, blocks)
        tried = [solve(units.double(), (stream[first + blocks] - s).double(), ridge).float() for ridge in RIDGES]
        errors = [(held_s + held_units @ w - held_stream[first + blocks]).square().mean() for w in tried]
        best = tried[int(torch.stack(errors).argmin())]
        s, held_s = s + units @ best, held_s + held_units @ best
    return held_s


@torch.no_grad()
def measure(chain: Chain, teacher, x: torch.Tensor, held_out: torch.Tensor) -> dict:
    hidden, state = x.shape[1], chain.read.shape[1] - x.shape[1]
    wanted = teacher(held_out)
    x, held_out = (F.pad(values, (0, state)) for values in (x, held_out))
    before, _ = chain.run(x)
    values = torch.cat(before, 1)
    linear = 1 - (values - x @ solve(x, values, 1e-6)).square().mean(0) / values.square().mean(0)
    out = chain.run(held_out)[1][-1][:, :hidden]
    figures = {"lock": nmse(out, wanted).item(), "linear_share": linear.mean().item()}
    for name, stages, linearised in (
        *(("stacked", 1, False), ("linearised", 1, True)),
        *((f"{stages} stages", stages, True) for stages in (4, 8)),
    ):
        attacked = collapsed(chain, x, held_out, stages, linearised)[:, :hidden]
        figures[name] = {"to_lock": nmse(attacked, out).item(), "to_teacher": nmse(attacked, wanted).item()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("leak", "layer", "ceiling"))
    parser.add_argument("audits", nargs="*", type=Path, help="folders of audits, for `ceiling`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--coupling", type=float, default=1.0, help="rms of gain * stream over rms of the input")
    parser.add_argument("--normalise", action="store_true")
    parser.add_argument("--stream", choices=("linear", "absolute", "tanh"), default="linear")
    parser.add_argument("--state", type=int, default=0, help="dimensions of the stream's own")
    parser.add_argument("--ridge", type=float, default=0.0, help="weight of the attackers' hinge")
    parser.add_argument("--cap", type=float, default=0.35, help="error above which an attacker is not pushed further")
    parser.add_argument("--linear", type=float, default=0.0, help="weight of the hinge on linear pre-activations")
    parser.add_argument("--learning-rate", type=float, default=0.012)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    record = read_json(options.out, "--out") if options.out.is_file() else {"schema": "lockkit-hardening/1"}
    made_by = {"commit": git_hash(), "versions": versions(), "machine": {"cores": os.cpu_count()}}
    if options.study == "ceiling":
        write_json(options.out, record | {"ceiling": made_by | {"rows": ceiling(options.audits)}})
        return
    torch.manual_seed(0)
    tokenizer, family = load_tokenizer(DEMO), family_of(load_config(DEMO))
    model = load_model(DEMO, torch.float32, "cpu")[0].requires_grad_(False)
    train = token_blocks(tokenizer, documents("stdlib", "distill"), 256, TRAIN_TOKENS)
    evaluation = token_blocks(tokenizer, documents("stdlib", "evaluate"), 256, HELD_OUT_TOKENS)
    if options.study == "leak":
        record["leak"] = made_by | {"rows": leak(model, family, train, evaluation)}
    else:
        teacher = decoder_layers(model)[options.layer].mlp
        x, held_out = (mlp_inputs(model, rows)[options.layer] for rows in (train, evaluation))
        chain = distil(teacher, mlp_weights(teacher, family), x, options)
        chosen = {k: v for k, v in vars(options).items() if k not in ("study", "audits", "out")}
        figures = measure(chain, teacher, x[:FIT_TOKENS], held_out)
        rows = [row for row in record.get("layers", []) if row["options"] != chosen]
        record["layers"] = [*rows, {"options": chosen, "figures": figures} | made_by]
        print(figures)
    write_json(options.out, record)


if __name__ == "__main__":
    main()
