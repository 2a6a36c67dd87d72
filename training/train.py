"""Train the mini Mixtral: 8 experts, top-2, 6 layers, with a load-balancing loss of each layer's own.

The unit is a step of 8 windows of 512 tokens. A window is cut from one domain's stream of documents, each of which
begins with BOS; attention is not cut at document ends inside a window. Which windows a step holds follows from the
seed and the step's number alone, so a resumed run goes on as an unbroken one would.

transformers' own balancing loss pools all layers before it compares experts, which lets single layers collapse while
the pool looks balanced (huggingface/transformers issues 28255 and 31464). Here it is Switch's loss, experts times
sum(share * mean probability), for each layer, averaged over layers.

Example:
    python training/train.py --corpus WORK/corpus --tokenizer WORK/tokenizer --output WORK/run --steps 5000
"""

import argparse
import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_corpus import read_documents
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

SEED = 20_240_108  # the day of the Mixtral paper
WINDOW, BATCH = 512, 8
SIZE_EXPONENT = 0.3  # a domain's share of training is its size to this power
PEAK_RATE, WARM_UP, LAST_RATE_SHARE = 1.8e-3, 150, 0.1
Z_LOSS = 1e-3
KEPT_PERCENTS = (1, 2, 5, 10, 20, 40, 70, 100)
LOG_EVERY, EVALUATE_EVERY, MOVING_STEPS = 10, 200, 50
CHECKPOINT_SECONDS = 180
LARGEST_IMBALANCE, IMBALANCE_FROM_STEP = 2.5, 1_000


def configuration(vocabulary: int) -> MixtralConfig:
    """The model's shape: 12 million parameters, of which a token uses 4 million."""
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        sliding_window=None,
        tie_word_embeddings=True,
        router_jitter_noise=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )


# Data


@dataclasses.dataclass(frozen=True)
class Streams:
    """Each domain's training tokens in one row, and the share of windows it gets."""

    domains: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]
    shares: np.ndarray

    def windows(self, step: int, steps: int) -> np.ndarray:
        """The windows of a step, shape (batch, window)."""
        drawn = self._drawn(steps)
        rows = []
        for slot in range(BATCH):
            domain, draw = drawn[step * BATCH + slot]
            stream = self.tokens[domain]
            count = len(stream) // WINDOW
            epoch, place = divmod(int(draw), count)
            order = np.random.default_rng((SEED, int(domain), epoch)).permutation(count)
            # Each epoch cuts its windows at another offset.
            offset = (epoch * 197) % (len(stream) - count * WINDOW + 1)
            start = int(order[place]) * WINDOW + offset
            rows.append(stream[start : start + WINDOW])
        return np.stack(rows).astype(np.int64)

    def _drawn(self, steps: int) -> np.ndarray:
        if steps not in _DRAWN:
            domains = np.random.default_rng(SEED).choice(len(self.domains), size=steps * BATCH, p=self.shares)
            draws = np.zeros_like(domains)
            for domain in range(len(self.domains)):
                places = domains == domain
                draws[places] = np.arange(places.sum())
            _DRAWN[steps] = np.stack([domains, draws], axis=1)
        return _DRAWN[steps]


_DRAWN: dict[int, np.ndarray] = {}


def load_streams(corpus: Path, tokenizer_folder: Path, cache: Path) -> Streams:
    """Tokenise the training shards, once."""
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    domains, tokens = [], []
    for shard in sorted((corpus / "train").glob("*.jsonl.zst")):
        domain = shard.name.removesuffix(".jsonl.zst")
        path = cache / f"{domain}.npy"
        if not path.exists():
            texts = [document["text"] for document in read_documents(shard)]
            np.save(path, np.concatenate([np.array(ids, np.uint16) for ids in tokenizer(texts)["input_ids"]]))
        domains.append(domain)
        tokens.append(np.load(path, mmap_mode="r"))
    sizes = np.array([len(stream) for stream in tokens], float) ** SIZE_EXPONENT
    return Streams(tuple(domains), tuple(tokens), sizes / sizes.sum())


def load_held_out(corpus: Path, tokenizer_folder: Path) -> dict[str, np.ndarray]:
    """Four windows of held-out tokens a domain, for the loss that is logged during training."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows: dict[str, list[int]] = {}
    for document in read_documents(corpus / "held-out.jsonl.zst"):
        ids = rows.setdefault(document["meta"]["pile_set_name"], [])
        if len(ids) < 4 * WINDOW:
            ids.extend(tokenizer(document["text"])["input_ids"])
    return {domain: np.array(ids[: 4 * WINDOW]).reshape(4, WINDOW) for domain, ids in rows.items()}


# Losses and schedule


def language_loss(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next token, in nats."""
    logits = F.linear(hidden[:, :-1], head).float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def router_losses(
    router_logits: tuple[torch.Tensor, ...], top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Switch's balancing loss averaged over layers, the z-loss averaged over layers, and loads (layer, expert)."""
    balance, z, loads = [], [], []
    for logits in router_logits:
        logits = logits.float()
        experts = logits.shape[-1]
        probabilities = torch.softmax(logits, dim=-1)
        chosen = torch.topk(probabilities, top_k, dim=-1).indices
        load = F.one_hot(chosen, experts).sum(dim=(0, 1)).float()
        balance.append(experts * ((load / load.sum()).detach() * probabilities.mean(dim=0)).sum())
        z.append(torch.logsumexp(logits, dim=-1).square().mean())
        loads.append(load.detach())
    return torch.stack(balance).mean(), torch.stack(z).mean(), torch.stack(loads)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def balance_coefficient(step: int, steps: int, first: float, later: float) -> float:
    """``first`` for 300 steps, then a line to ``later`` at step 600 and on to half of that at the end."""
    if step < 300:
        return first
    if step < 600:
        return first + (later - first) * (step - 300) / 300
    return later * (1 - 0.5 * (step - 600) / max(1, steps - 600))


# Training


class Trainer:
    """A bf16 model that computes, fp32 weights that the optimizer holds, and what is needed to go on later."""

    def __init__(self, vocabulary: int, compiled: bool) -> None:
        torch.manual_seed(SEED)
        self.model = MixtralForCausalLM(configuration(vocabulary))
        self.names, parameters = zip(*self.model.named_parameters(), strict=True)
        self.master = [parameter.detach().clone().float() for parameter in parameters]
        self.model.to(torch.bfloat16)
        self.model.set_experts_implementation("grouped_mm")
        self.parameters = list(self.model.parameters())
        matrices = [weight for weight in self.master if weight.ndim > 1]
        others = [weight for weight in self.master if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.losses = torch.compile(self._losses) if compiled else self._losses
        self.step = 0

    def _losses(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model.model(input_ids=ids, output_router_logits=True, use_cache=False)
        language = language_loss(outputs.last_hidden_state, self.model.lm_head.weight, ids)
        return language, *router_losses(outputs.router_logits, self.model.config.num_experts_per_tok)

    def update(self, ids: torch.Tensor, rate: float, coefficient: float) -> tuple[float, float, float, torch.Tensor]:
        """One step; returns the language loss, the balancing loss, the gradient's norm and the loads."""
        language, balance, z, loads = self.losses(ids)
        (language + coefficient * balance + Z_LOSS * z).backward()
        for weight, parameter in zip(self.master, self.parameters, strict=True):
            weight.grad = parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for weight, parameter in zip(self.master, self.parameters, strict=True):
                parameter.copy_(weight)
        return language.item(), balance.item(), float(norm), loads

    @torch.no_grad()
    def evaluate(self, held_out: dict[str, np.ndarray]) -> dict[str, float]:
        """Held-out loss of each domain, on a few windows."""
        return {domain: float(self._losses(torch.from_numpy(ids))[0]) for domain, ids in sorted(held_out.items())}

    def save_checkpoint(self, path: Path) -> None:
        """Write everything that resuming needs, then rename it into place."""
        state = {
            "master": self.master,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_checkpoint(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for weight, saved, parameter in zip(self.master, state["master"], self.parameters, strict=True):
                weight.copy_(saved)
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def save_model(self, folder: Path, tokenizer_folder: Path) -> None:
        """Write the bf16 model and the tokenizer as a folder that ``from_pretrained`` reads."""
        self.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


def train(arguments: argparse.Namespace) -> None:
    """Run to the last step, logging to ``log.jsonl``."""
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    streams = load_streams(arguments.corpus, arguments.tokenizer, arguments.output / "tokens")
    held_out = load_held_out(arguments.corpus, arguments.tokenizer)
    vocabulary = len(AutoTokenizer.from_pretrained(arguments.tokenizer))
    trainer = Trainer(vocabulary, compiled=not arguments.eager)
    checkpoint = output / "checkpoint.pt"
    if arguments.resume and checkpoint.exists():
        trainer.load_checkpoint(checkpoint)
    log = (output / "log.jsonl").open("a", encoding="utf-8")
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))

    steps = arguments.steps
    kept = {max(1, round(steps * percent / 100)): percent for percent in KEPT_PERCENTS}
    recent: list[torch.Tensor] = []
    high_since = [0] * trainer.model.config.num_hidden_layers
    started, saved, timed_step = time.monotonic(), time.monotonic(), trainer.step
    _write(log, {"event": "start", "step": trainer.step, "steps": steps, "domains": streams.domains,
                 "tokens": [len(stream) for stream in streams.tokens], "shares": streams.shares.round(4).tolist(),
                 "first": arguments.first_coefficient, "later": arguments.later_coefficient})  # fmt: skip
    while trainer.step < steps:
        step = trainer.step
        ids = torch.from_numpy(streams.windows(step, steps))
        coefficient = balance_coefficient(step, steps, arguments.first_coefficient, arguments.later_coefficient)
        loss, balance, norm, loads = trainer.update(ids, learning_rate(step, steps), coefficient)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}")
        trainer.step = step + 1
        recent = [*recent[-(MOVING_STEPS - 1) :], loads]
        if trainer.step % LOG_EVERY == 0 or trainer.step == 1:
            load = torch.stack(recent).sum(dim=0)
            imbalance = (load.amax(dim=1) / load.mean(dim=1)).tolist()
            for layer, value in enumerate(imbalance):
                high_since[layer] = high_since[layer] + LOG_EVERY if value > LARGEST_IMBALANCE else 0
            seconds = time.monotonic() - started
            speed = (trainer.step - timed_step) * BATCH * WINDOW / max(seconds, 1e-9)
            _write(log, {"step": trainer.step, "loss": round(loss, 4), "balance": round(balance, 4),
                         "norm": round(norm, 3), "rate": learning_rate(step, steps), "coefficient": coefficient,
                         "imbalance": [round(value, 3) for value in imbalance],
                         "least_share": [round(float(value), 4) for value in load.amin(dim=1) / load.sum(dim=1)],
                         "tokens_per_second": round(speed), "seconds": round(seconds)})  # fmt: skip
            if trainer.step > IMBALANCE_FROM_STEP and max(high_since) > 200:
                raise RuntimeError(f"a layer's imbalance stays above {LARGEST_IMBALANCE}: {imbalance}")
        if trainer.step % EVALUATE_EVERY == 0 or trainer.step == steps:
            _write(log, {"step": trainer.step, "held_out": trainer.evaluate(held_out)})
        if trainer.step in kept:
            trainer.save_model(output / "checkpoints" / f"pct-{kept[trainer.step]:03d}", arguments.tokenizer)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or trainer.step == steps or stopping:
            trainer.save_checkpoint(checkpoint)
            saved = time.monotonic()
        if stopping:
            break
    _write(log, {"event": "end", "step": trainer.step})


def _write(log, entry: dict) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first-coefficient", type=float, default=0.08)
    parser.add_argument("--later-coefficient", type=float, default=0.02)
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())
