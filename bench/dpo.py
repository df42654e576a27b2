"""DPO steps a second beside TRL's DPOTrainer: the same weights, the same token ids, in one process, turn by turn.

    python bench/dpo.py                                 # CPU, fp32, a Llama of 8 M parameters, 4 pairs a step
    python bench/dpo.py --device cuda --size large --pairs 16 --steps 20 --precision bf16    # a GPU, 110 M parameters

A glade model of mixer softmax with SwiGLU and RMSNorm is transformers' LlamaForCausalLM: the weights are copied across.
Prompts have 512 tokens, completions 128, the one that ends the text counted. TRL runs with
precompute_ref_log_probs=True and without gradient checkpointing; both with AdamW at a constant learning rate, gradients
clipped at 1, without dropout.

No time is reported unless losses, rewards and margins of the first steps are those of TRL to 1e-4 in fp32: both began
with equal weights and took the same optimiser steps, so equal numbers say that masks, reference and gradients agree.
With --precision bf16 (matrix products; weights stay fp32, in both) these steps are run first, in fp32. A step's time is
from its batch to its updated weights; medians with the fastest and the slowest. Steps of both take turns.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from glade.data.preference import Pair
from glade.model.config import ModelConfig
from glade.model.lm import LanguageModel
from glade.train.align import weights_digest
from glade.train.align_config import DpoTrainSettings
from glade.train.dpo import Preferences, Steps
from glade.train.loop import StepResult, Trainer
from glade.train.optim import build_optimizer
from glade.train.passes import Direct, Recorded, why_not_recorded
from glade.train.preference_loss import sigmoid
from glade.train.reference import reference
from glade.train.run import precision_context

PROMPT, COMPLETION, BETA, LR = 512, 128, 0.1, 1e-4
SIZES = {
    "small": dict(dim=320, num_layers=4, num_heads=5, ffn_dim=896, vocab_size=8192),
    "large": dict(dim=768, num_layers=12, num_heads=12, ffn_dim=2048, vocab_size=32768),
}
# steps whose numbers must agree; later ones drift apart, since AdamW's first steps enlarge what rounding differs by
FIRST = 4
CHECKED = {"loss": "loss", "rewards/chosen": "rewards_chosen", "rewards/rejected": "rewards_rejected",
           "rewards/margins": "margin", "rewards/accuracies": "accuracy"}  # fmt: skip
COLUMNS = [
    "provider",
    "device",
    "threads",
    "precision",
    "size",
    "parameters",
    "pairs",
    "steps",
    "median_s",
    "fastest_s",
    "slowest_s",
]
COLUMNS += ["steps_per_s", "times_trl", "versions", "command"]


def llama(size: dict[str, int], seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=size["dim"],
        intermediate_size=size["ffn_dim"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_heads"],
        vocab_size=size["vocab_size"],
        max_position_embeddings=PROMPT + COMPLETION,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def as_glade(peer: LlamaForCausalLM, size: dict[str, int]) -> LanguageModel:
    """The same function with the same weights."""
    model = LanguageModel(ModelConfig(mixer="softmax", ffn="swiglu", norm="rmsnorm", norm_eps=1e-5, **size))
    names = {"embed_tokens": "embed", "input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn": "mixer", "mlp": "ffn", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
             "norm": "final_norm"}  # fmt: skip
    tensors = {
        ".".join(names.get(part, part) for part in name.split(".")): x.clone()
        for name, x in peer.model.state_dict().items()
    }
    model.load_state_dict(tensors)
    return model


def make_pairs(num: int, vocab_size: int) -> list[Pair]:
    """Random ids; id 0 pads (in TRL alone), 1 ends an answer."""
    generator = torch.Generator().manual_seed(1)

    def ids(num_tokens: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocab_size, (num_tokens,), generator=generator).tolist())

    return [Pair(ids(PROMPT), (*ids(COMPLETION - 1), 1), (*ids(COMPLETION - 1), 1)) for _ in range(num)]


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Id i is the word wi, so that a text has the ids one wants."""
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def peer_rows(pairs: list[Pair]) -> Dataset:
    def text(ids: tuple[int, ...]) -> str:
        return "".join(f" w{i}" for i in ids)

    # TRL adds the end of the text itself
    rows = [{"prompt": text(p.prompt), "chosen": text(p.chosen[:-1]), "rejected": text(p.rejected[:-1])} for p in pairs]
    return Dataset.from_list(rows)


class Ours:
    """glade's loop on the pairs in their order, step by step."""

    def __init__(self, model: LanguageModel, pairs: list[Pair], per_step: int, precision_name: str, cache: Path):
        device = model.embed.weight.device
        precision = precision_context(precision_name, device)
        known, _ = reference(
            model.eval(), weights_digest(model), pairs, cache=cache, precision_name=precision_name, precision=precision
        )
        settings = DpoTrainSettings(
            lr=LR, schedule="constant", warmup=0.0, beta1=0.9, beta2=0.999, weight_decay=0.0, batch_size=per_step
        )
        refusal = why_not_recorded(model, bf16=precision_name == "bf16")
        passes = Recorded(model, device) if device.type == "cuda" and refusal is None else Direct(model, device)
        preferences = Preferences(passes, pairs, known, partial(sigmoid, beta=BETA))
        model.train()
        self.trainer = Trainer(
            model=model,
            objective=InOrder(preferences, len(pairs), per_step, 1, 0),
            optimizer=build_optimizer(model, settings, LR),
            settings=settings,
            precision=precision,
            peak_lr=LR,
        )

    def step(self, number: int) -> StepResult:
        return self.trainer.step(number)


class InOrder(Steps):
    """Pairs as they come, which is what TRL's sequential sampling reads."""

    def chosen(self, step: int, part: int = 0, parts: int = 1) -> list[int]:
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))


class Turns(TrainerCallback):
    """After each step of TRL's, one of ours; times and metrics of both."""

    def __init__(self, ours: Ours, device: torch.device) -> None:
        self.ours, self.device = ours, device
        self.seconds: dict[str, list[float]] = {"trl": [], "glade": []}
        self.results: list[StepResult] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, *_args, **_kwargs) -> None:
        self.began = self.now()

    def on_step_end(self, *_args, **_kwargs) -> None:
        ended = self.now()
        self.seconds["trl"].append(ended - self.began)
        self.results.append(self.ours.step(len(self.results)))
        self.seconds["glade"].append(self.now() - ended)


def train(args: argparse.Namespace, precision: str, steps: int, folder: str) -> tuple[Turns, list[dict[str, float]]]:
    """So many steps of both, and what TRL logged of them."""
    device = torch.device(args.device)
    size = SIZES[args.size]
    pairs = make_pairs(args.pairs * steps, size["vocab_size"])
    peer = llama(size)
    turns = Turns(Ours(as_glade(peer, size).to(device), pairs, args.pairs, precision, Path(folder)), device)
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.pairs,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=PROMPT + COMPLETION,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=args.pairs,
        gradient_checkpointing=False,
        bf16=precision == "bf16",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = DPOTrainer(
        model=peer,
        args=config,
        train_dataset=peer_rows(pairs),
        processing_class=word_tokenizer(size["vocab_size"]),
        callbacks=[turns],
    )
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        ids = tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if ids != tuple(pair):
            raise SystemExit("TRL's token ids are not ours")
    trainer.train()
    return turns, [row for row in trainer.state.log_history if "rewards/margins" in row]


def check(logged: list[dict[str, float]], results: list[StepResult]) -> float:
    """The largest difference between their metrics and ours in the first steps."""
    largest = 0.0
    for step, (theirs, ours) in enumerate(zip(logged[:FIRST], results[:FIRST], strict=True), 1):
        mine = {"loss": ours.loss, **ours.metrics}
        for name, own in CHECKED.items():
            if step == 1 and own == "accuracy":
                continue  # no margin yet: TRL counts a tie as wrong, glade as half right
            difference = abs(theirs[name] - mine[own])
            largest = max(largest, difference)
            if difference > 1e-4:
                raise SystemExit(f"step {step}: {name} is {theirs[name]:.6f} with TRL, {mine[own]:.6f} with glade")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the matrix products timed")
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--steps", type=int, default=8, help="timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    steps = args.steps + args.warmup
    with tempfile.TemporaryDirectory() as folder:
        turns, logged = train(args, "fp32", FIRST if args.precision == "bf16" else max(FIRST, steps), folder)
        largest = check(logged, turns.results)
        margins = ", ".join(f"{r.metrics['margin']:+.5f}" for r in turns.results[:FIRST])
        print(f"losses, rewards and margins equal TRL's, largest difference {largest:.1e}; first margins {margins}")
        if args.precision == "bf16":
            turns, _ = train(args, "bf16", steps, folder)
    parameters = turns.ours.trainer.model.num_parameters()
    report(args, {name: seconds[args.warmup :] for name, seconds in turns.seconds.items()}, parameters)


def report(args: argparse.Namespace, seconds: dict[str, list[float]], parameters: int) -> None:
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name()
    versions = f"torch {torch.__version__}, trl {version('trl')}, transformers {transformers.__version__}"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "provider": name,
            "device": device,
            "threads": torch.get_num_threads(),
            "precision": args.precision,
            "size": args.size,
            "parameters": parameters,
            "pairs": args.pairs,
            "steps": len(values),
            "median_s": f"{medians[name]:.4f}",
            "fastest_s": f"{min(values):.4f}",
            "slowest_s": f"{max(values):.4f}",
            "steps_per_s": f"{1 / medians[name]:.3f}",
            "times_trl": f"{medians['trl'] / medians[name]:.2f}",
            "versions": versions,
            "command": " ".join(["python bench/dpo.py", *sys.argv[1:]]),
        }
        for name, values in seconds.items()
    ]
    for row in rows:
        print("  ".join(f"{key} {row[key]}" for key in COLUMNS[:-2]))
    if args.out:
        new = not args.out.exists()
        with open(args.out, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


if __name__ == "__main__":
    main()
