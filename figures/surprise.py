"""One episode of the scripted expert, each terminal token shaded by the surprise of base, GRPO and ECHO.

    python figures/surprise.py                   redraws the picture from figures/data
    python figures/surprise.py --run runs/tiny   scores the episode with the checkpoints of a finished run
"""

import argparse
import json
import sys
from pathlib import Path

import common

from echo_min import checkpoint, report
from echo_min.config import Config
from echo_min.masking import Role
from echo_min.policy import load_policy
from echo_min.worlds import load_world
from eval import expert_transcripts, observation_logprobs

DATA = common.DATA / "surprise.json"


def run(folder: Path) -> None:
    config = Config.load(folder / "config.json")
    world = load_world(config.tasks.removeprefix("world:"))
    panels = {}
    for title in ("base", "grpo", "echo"):
        found = checkpoint.latest(folder / title)
        model, tokenizer = load_policy(found[1] if found else folder / title)
        transcript = expert_transcripts(tokenizer, world, config)[0]
        (logprobs,) = observation_logprobs(model, [transcript])
        tokens = report.tokens_with_surprise(tokenizer, transcript, logprobs)
        panels[title] = [(text, int(role), round(nats, 3)) for text, role, nats in tokens]
    common.DATA.mkdir(parents=True, exist_ok=True)
    DATA.write_text(json.dumps(panels) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a finished run with base, grpo and echo")
    args = parser.parse_args()
    if args.run:
        run(args.run)
    if not DATA.exists():
        sys.exit(f"{DATA} is missing; after make train: python figures/surprise.py --run runs/tiny")
    titles = {"base": "base policy", "grpo": "after GRPO", "echo": "after ECHO"}
    panels = {}
    for name, tokens in json.loads(DATA.read_text()).items():
        panels[titles[name]] = [(text, Role(role), nats) for text, role, nats in tokens]
    common.PNG.mkdir(parents=True, exist_ok=True)
    report.draw_transcripts(panels, common.PNG / "surprise.png", columns=40)
    print("figures/png/surprise.png")


if __name__ == "__main__":
    main()
