"""The whole story on real text: pretrain a GLA model, train it on preferences, compare before and after.

    python bench/dpo_story.py --text stories.txt.xz --pairs pairs.jsonl            # CPU-sized
    python bench/dpo_story.py --text stories.txt.xz --pairs pairs.jsonl --gpu      # GPU-sized

Each step is one command of the program, printed before it runs:

    glade train     base: a GLA model on the stories, the last 3 % of them held out in a file of their own
    glade dpo       spoilt: on the pairs given, whose rejected answers are spoilt stories
    glade prefer    pairs of its own: a story as it goes on, and what the model makes of its beginning by taking the
                    most likely token each time (small models then repeat themselves)
    glade dpo       own: on these
    glade compare   base with each, on prompts of this script's own, sampled and greedy: repetition, win rate, KL,
                    held-out perplexity

The text is separated by <|endoftext|>. Perplexity is read on stories that no step saw: pairs may be made of the usual
validation file, so that is never used. An interrupted story goes on when its command is
repeated. No row of the pairs and no sample that begins with one is packed into --tar.
"""

import argparse
import json
import lzma
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glade.evals.repetition import rep_n

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
    "Sam had a kite with a very long tail.",
    "The snowman did not want the sun to come.",
    "Anna planted a seed and waited.",
    "A mouse found a piece of cheese behind the door.",
    "The train to the sea was late.",
    "Max and his father painted the fence.",
    "The moon looked into the window.",
    "Once there was a spoon that was never used.",
    "Rosa was afraid of the big slide.",
    "The kitten climbed to the top of the tree.",
    "On Monday it began to snow.",
    "The farmer had a lazy donkey.",
    "Leo wanted to learn how to swim.",
    "A yellow leaf fell on the water.",
    "The children made a tent out of blankets.",
    "Nina's balloon flew over the roof.",
    "The old bear could not sleep.",
    "There was a hole in the bucket.",
    "Peter found a coin on the way to school.",
    "The princess did not like cake.",
]
REP = (2, 3, 4)


@dataclass(frozen=True)
class Size:
    """Settings of each step."""

    vocab: int
    train: list[str]
    dpo: list[str]
    prefer: list[str]
    answers: int  # sampled for each prompt, by each model


_LONG = ("--data.context=512", "--train.batch_tokens=32768", "--train.max_tokens=2e7")
SIZES = {
    # half an hour on two cores
    "cpu": Size(
        2048,
        ["--model.dim=128", "--model.num_layers=4", "--train.batch_tokens=4096", "--train.max_tokens=8e6"],
        [],
        ["--num_prompts=1200", "--max_new_tokens=128"],
        4,
    ),
    # minutes on one large GPU; the text is small: dropout, and the best checkpoint, keep from learning it by heart
    "gpu": Size(
        4096,
        ["--model.dim=512", "--model.num_layers=8", "--model.dropout=0.1", *_LONG],
        ["--train.batch_size=32"],
        ["--num_prompts=4000", "--max_new_tokens=192", "--batch_size=512"],
        8,
    ),
    # seconds: everything runs, nothing is learned
    "check": Size(
        300,
        ["--model.dim=32", "--model.num_layers=2", "--train.batch_tokens=512", "--train.max_steps=4"],
        ["--train.max_steps=3", "--train.batch_size=4"],
        ["--num_prompts=30", "--max_new_tokens=24", "--unfinished=keep"],
        1,
    ),
}


class Story:
    """The steps in their folder."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.done = folder / "steps.json"
        self.seconds: dict[str, float] = json.loads(self.done.read_text()) if self.done.is_file() else {}

    def step(self, out: Path, *words: str) -> None:
        """One command, which leaves `out`: not repeated, and where it is a run that was interrupted, resumed."""
        print(f"\n$ glade {' '.join(words)}", flush=True)
        if out.name in self.seconds:
            print("done before", flush=True)
            return
        if (out / "checkpoints" / "last").is_dir():
            words = words[0], f"--run={out}", "--resume"
            print(f"$ glade {' '.join(words)}", flush=True)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "glade", *words], check=True)
        self.seconds[out.name] = round(time.monotonic() - began, 1)
        self.done.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")

    def train(self, stories: Path, heldout: Path) -> Path:
        run = self.folder / "base"
        data = [f"--data.corpus={stories}", f"--data.heldout_corpus={heldout}"]
        often = ["--train.eval_every=200", "--train.sample_tokens=0"]
        words = [*data, f"--data.tokenizer=bpe:{self.size.vocab}", f"--run={run}", *often, *self.size.train]
        self.step(run, "train", "--model.mixer=gla", *words)
        return run

    def align(self, base: Path, pairs: Path, name: str, *options: str) -> Path:
        run = self.folder / name
        words = [str(base), str(pairs), *options, f"--run={run}", "--train.sample_tokens=0", *self.size.dpo]
        self.step(run, "dpo", *words)
        return run

    def prefer(self, base: Path, stories: Path) -> Path:
        out = self.folder / "pairs" / "own.jsonl"
        words = [str(base), f"--out={out}", f"--corpus={stories}", "--num=1", "--temperature=0", "--max_words=12"]
        self.step(out, "prefer", *words, *self.size.prefer)
        return out

    def compare(self, base: Path, aligned: Path, prompts: Path, text: Path) -> None:
        ways = {"sampled": [f"--num={self.size.answers}", f"--text={text}"], "greedy": ["--temperature=0"]}
        for way, options in ways.items():
            out = self.folder / f"{aligned.name}-{way}"
            words = [str(base), str(aligned), f"--prompts={prompts}", "--max_new_tokens=128", *options]
            self.step(out, "compare", *words, f"--out={out}")


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


def repetition(pairs: Path) -> dict[str, list[float]]:
    """Mean rep-n of the answers of some pairs: what they reward."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    return {
        kind: [sum(rep_n(row[kind], n) for row in rows) / len(rows) for n in REP] for kind in ("chosen", "rejected")
    }


def summary(story: Story, pairs: dict[str, Path]) -> dict:
    """What all steps came to."""
    found: dict = {"seconds": story.seconds, "pairs": {name: repetition(path) for name, path in pairs.items()}}
    for name in ("base", *pairs):
        found[name] = json.loads((story.folder / name / "results.json").read_text())["results"]
    for name in pairs:
        for way in ("sampled", "greedy"):
            report = json.loads((story.folder / f"{name}-{way}" / "report.json").read_text())
            keys = ("measures", "scores", "kl", "heldout")
            found[name][way] = {key: report[key] for key in keys}
    return found


def show(found: dict, names: Sequence[str]) -> None:
    for name in names:
        heldout, rep = found[name]["heldout"], found["pairs"][name]
        print(f"\n{name}: held-out pairs {heldout['pairs']}, accuracy {heldout['accuracy']:.3f}, "
              f"margin {heldout['margin']:.2f}, kl {heldout['kl']:.3f}")  # fmt: skip
        print("  rep-2/3/4 %, chosen and rejected", *(_percent(rep[kind]) for kind in ("chosen", "rejected")))
        for way in ("sampled", "greedy"):
            part = found[name][way]
            before, after = (_percent([m[f"rep_{n}"] for n in REP]) for m in part["measures"])
            texts = part["heldout"] and [f"{h['perplexity']:.2f}" for h in part["heldout"]]
            print(
                f"  {way}: rep-2/3/4 % {before} to {after}, win rate {100 * part['scores']['win_rate']:.1f} %", end=""
            )
            print(f", perplexity {' to '.join(texts)}" if texts else "")


def _percent(shares: Sequence[float]) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def pack(folder: Path, tar: Path) -> None:
    """Curves, metrics, results, reports: no weights, and nothing that holds a row of the pairs."""
    names = ("curves.png", "metrics.jsonl", "results.json", "config.yaml", "report.html", "report.json")
    kept = [*folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("pairs/*.stats.json")]
    kept += [path for name in names for path in folder.glob(f"*/{name}")]
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w:gz") as archive:
        for path in sorted(kept):
            if path.name not in ("stories.txt", "heldout.txt"):
                archive.add(path, str(path.relative_to(folder)))
    print(f"{tar}: {tar.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="stories, .txt or .txt.xz")
    parser.add_argument("--pairs", type=Path, required=True, help="rows of prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, default=Path("runs/story"), help="folder for everything")
    parser.add_argument("--tar", type=Path, help="a .tar.gz for curves, reports and numbers")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--gpu", action="store_const", dest="size", const="gpu", help="the size for a GPU")
    sizes.add_argument("--check", action="store_const", dest="size", const="check", help="everything, of a tiny size")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stories, heldout = split(args.text, args.out)
    prompts = args.out / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    story = Story(SIZES[args.size or "cpu"], args.out)
    base = story.train(stories, heldout)
    # the completions of these pairs do not begin with the space that follows a prompt
    spoilt = story.align(base, args.pairs, "spoilt", "--data.separator= ")
    pairs = story.prefer(base, stories)
    own = story.align(base, pairs, "own")
    for aligned in (spoilt, own):
        story.compare(base, aligned, prompts, heldout)
    found = summary(story, {"spoilt": args.pairs, "own": pairs})
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found, ("spoilt", "own"))
    if args.tar:
        pack(args.out, args.tar)


if __name__ == "__main__":
    main()
