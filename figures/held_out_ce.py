"""How well each arm predicts the terminal on the trajectories of another, stronger policy (paper: figure 3).

python figures/held_out_ce.py    draws it from the data of learning_curves.py; there is nothing else to run
"""

import argparse

import common
import learning_curves
import matplotlib.pyplot as plt
from learning_curves import LABELS, SCENES, of

BARS = "base", "grpo", "echo 0.05", "echo", "placebo_words", "placebo_outputs", "placebo", "floor"
PAPER = {  # (GRPO, ECHO) relative to the base, the range over figure 3's panels with Qwen3-8B and 14B
    "grpo": (0.92, 1.00),
    "echo": (0.24, 0.79),
}


def relative(lines: list[dict], scene: str, arm: str) -> list[float]:
    """CE after the last step over the base's, one number a seed."""
    first = common.by_seed(of(lines, scene, "grpo"), "observation_ce", step=0)
    mine = of(lines, scene, arm)
    steps = max((line["step"] for line in mine if "step" in line), default=None)  # the floor has no steps
    last = common.by_seed([x for x in mine if x.get("step") == steps], "observation_ce")
    return [last[seed] / first[seed] for seed in last if seed in first]


def main() -> None:
    lines = common.load(learning_curves.EXPERIMENT, learning_curves.jobs())
    scenes = [scene for scene in SCENES if of(lines, scene, "grpo")]
    bars = {scene: [b for b in BARS if b == "base" or relative(lines, scene, b)] for scene in scenes}
    widths = [len(names) for names in bars.values()]
    fig, axes = plt.subplots(
        1, len(scenes), figsize=(0.55 * sum(widths) + 1, 4.4), width_ratios=widths, squeeze=False, sharey=True
    )
    print("observation CE on the expert's trajectories after training / the base's, ± 95 % interval\n")
    print("| | " + " | ".join(SCENES[scene][4] for scene in scenes) + " |")
    print("|---" * (len(scenes) + 1) + "|")
    table = {arm: [] for arm in BARS[1:]}
    for ax, scene in zip(axes[0], scenes, strict=True):
        ax.axhline(1, color="#999999", lw=1)
        for arm in table:
            table[arm].append(common.interval(relative(lines, scene, arm)) if arm in bars[scene] else "")
        names = []
        for x, arm in enumerate(bars[scene]):
            values = [1.0] if arm == "base" else relative(lines, scene, arm)
            mean, half = common.mean_interval(values)
            ax.bar(x, mean, yerr=half if len(values) > 1 else None, color=common.COLOURS[arm], capsize=3)
            names.append(f"{arm.replace('_', ' ')}, {100 * (mean - 1):+.0f} %")
            if arm in PAPER:
                low, high = PAPER[arm]
                ax.fill_between([x - 0.45, x + 0.45], low, high, color="black", alpha=0.25, lw=0)
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
        common.style(ax, ylabel="observation CE / the base's" if ax is axes[0, 0] else "", ylim=(0, 2.5))
        ax.set_title(f"{SCENES[scene][4]}", fontsize=10)
    fig.suptitle("grey: the paper's range (Qwen3-8B and 14B, three task sets)", fontsize=9)
    fig.tight_layout()
    common.save(fig, "held_out_ce")
    for arm, cells in table.items():
        print(f"| {LABELS.get(arm, arm)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
