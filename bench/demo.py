"""What `make demo` could train in its minutes: held-out loss of several settings, each a run of `glade train`.

    python bench/demo.py                                   # all, four minutes each; wants the machine to itself
    python bench/demo.py --minutes 1 --only default gdn    # a first look
    python bench/demo.py --out bench/results/demo_cpu.csv

One run after the other, in the order given; the learning rate follows the clock, so that each uses its minutes whole.
The loss is over the whole held-out text.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SETTINGS = {
    "default": [],
    "gdn": ["--model.mixer=gdn"],
    "gla": ["--model.mixer=gla"],
    "gdn, lr 0.008": ["--model.mixer=gdn", "--train.lr=0.008"],
    "gdn, context 128": ["--model.mixer=gdn", "--data.context=128"],
    "gdn, batch 1024": ["--model.mixer=gdn", "--train.batch_tokens=1024"],
    "gdn, batch 4096, lr 0.006": ["--model.mixer=gdn", "--train.batch_tokens=4096", "--train.lr=0.006"],
    "gdn, 3 x 160": ["--model.mixer=gdn", "--model.num_layers=3", "--model.dim=160"],
    "gdn, 4 x 192": ["--model.mixer=gdn", "--model.dim=192"],
    "gdn, 6 x 128": ["--model.mixer=gdn", "--model.num_layers=6"],
    "gdn, 2 heads": ["--model.mixer=gdn", "--model.num_heads=2"],
    "gdn2, 2 heads": ["--model.num_heads=2"],
    "gdn, linear schedule to 0": ["--model.mixer=gdn", "--train.schedule=linear", "--train.min_lr=0"],
    "gdn, dropout 0.05": ["--model.mixer=gdn", "--model.dropout=0.05"],
    "softmax": ["--model.mixer=softmax"],
}
COLUMNS = ["name", "minutes", "heldout_loss", "bits_per_byte", "accuracy", "tokens", "steps", "tokens_per_s"]
COLUMNS += ["parameters", "device", "threads", "versions", "overrides", "command"]


def run(name: str, minutes: float, folder: Path) -> dict[str, object]:
    overrides = [*SETTINGS[name], f"--train.max_minutes={minutes}", "--train.eval_every=0", "--train.sample_tokens=0"]
    command = [sys.executable, "-m", "glade", "train", f"--run={folder / 'run'}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    results = found["results"]
    return {
        "name": name,
        "minutes": minutes,
        "heldout_loss": round(results["heldout"]["loss"], 4),
        "bits_per_byte": round(results["heldout"]["bits_per_byte"], 4),
        "accuracy": round(results["heldout"]["accuracy"], 4),
        "tokens": results["tokens"],
        "steps": results["step"],
        "tokens_per_s": round(results["tokens_per_s"]),
        "parameters": found["model"]["parameters"],
        "threads": results["threads"],
        "overrides": " ".join(SETTINGS[name]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, each")
    parser.add_argument("--device", default=platform.processor() or platform.machine(), help="how to call this machine")
    parser.add_argument("--out", type=Path, default=None, help="append rows to this file")
    args = parser.parse_args()
    common = {"device": args.device, "command": "python " + " ".join(sys.argv)}
    common["versions"] = f"torch {torch.__version__}, python {platform.python_version()}"
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            row = run(name, args.minutes, Path(folder))
        print(
            *(row[key] for key in ("name", "heldout_loss", "tokens", "tokens_per_s", "parameters")),
            sep="\t",
            flush=True,
        )
        if args.out is not None:
            fresh = not args.out.exists()
            with open(args.out, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if fresh:
                    writer.writeheader()
                writer.writerow(row | common)


if __name__ == "__main__":
    main()
