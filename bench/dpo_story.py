"""The whole story on real text: pretrain a GLA model, train it on preferences, compare before and after.

    python bench/dpo_story.py --text stories.txt.xz --pairs pairs.jsonl            # CPU-sized
    python bench/dpo_story.py --text stories.txt.xz --pairs pairs.jsonl --gpu      # GPU-sized

Each step is one command of the program, printed before it runs:

    glade train     a GLA model on the stories, the last 3 % of them held out in a file of their own
    glade dpo       on the pairs, one prompt's pairs on one side of the split
    glade compare   on prompts of this script's own: win rate, repetition, length, KL, held-out perplexity

The text is separated by <|endoftext|>. Perplexity is read on stories that neither step saw: pairs may be made of the
usual validation file, so that is never used.
"""

import argparse
import lzma
import subprocess
import sys
from pathlib import Path

END = "<|endoftext|>"
HELDOUT = 0.03
PROMPTS = [
    "The little fox found a red button in the snow.",
    "Mia wanted to build a boat out of paper.",
    "One morning the old clock did not ring.",
    "Tom and his sister heard a noise in the attic.",
    "A small green frog lived under the bridge.",
    "Grandma baked bread, but the oven was cold.",
    "There was a cloud that could not rain.",
    "Ben lost his blue hat in the park.",
    "The baker's dog could count to three.",
    "Lena opened the box and saw a tiny door.",
    "It was dark, and the lamp would not light.",
    "Two birds wanted the same warm nest.",
]
SIZES = {
    "cpu": {
        "train": ["--model.dim=128", "--model.num_layers=4", "--train.batch_tokens=4096", "--train.max_tokens=2.5e6"],
        "dpo": ["--train.epochs=1", "--train.batch_size=16"],
    },
    "gpu": {
        "train": ["--model.dim=512", "--model.num_layers=8", "--train.batch_tokens=65536", "--train.max_tokens=4e7"],
        "dpo": ["--train.epochs=2", "--train.batch_size=32"],
    },
}


def glade(*words: str) -> None:
    print(f"\n$ glade {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "glade", *words], check=True)


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """The stories as two files, to train on and held out."""
    content = lzma.decompress(text.read_bytes()) if text.suffix == ".xz" else text.read_bytes()
    stories = [story.strip() for story in content.decode("utf-8").split(END) if story.strip()]
    num = round(len(stories) * (1 - HELDOUT))
    parts = folder / "stories.txt", folder / "heldout.txt"
    for part, some in zip(parts, (stories[:num], stories[num:]), strict=True):
        part.write_text(f"\n{END}\n".join(some), encoding="utf-8")
    print(f"{num:,} stories to train on, {len(stories) - num:,} held out")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="stories, .txt or .txt.xz")
    parser.add_argument("--pairs", type=Path, required=True, help="rows of prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, default=Path("runs/story"), help="folder for everything")
    parser.add_argument("--gpu", action="store_true", help="the size for a GPU")
    args = parser.parse_args()
    size = SIZES["gpu" if args.gpu else "cpu"]
    args.out.mkdir(parents=True, exist_ok=True)
    stories, heldout = split(args.text, args.out)
    prompts = args.out / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    base, aligned, report = (str(args.out / name) for name in ("base", "dpo", "report"))
    data = [f"--data.corpus={stories}", f"--data.heldout_corpus={heldout}", "--data.tokenizer=bpe:2048"]
    glade("train", "--model.mixer=gla", *data, f"--run={base}", "--train.eval_every=100", *size["train"])
    # the completions of these pairs do not begin with the space that follows a prompt
    glade("dpo", base, str(args.pairs), "--data.separator= ", f"--run={aligned}", *size["dpo"])
    options = ["--names=base,dpo", "--num=4", "--max_new_tokens=100", f"--text={heldout}"]
    glade("compare", base, aligned, f"--prompts={prompts}", *options, f"--out={report}")


if __name__ == "__main__":
    main()
