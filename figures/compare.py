"""One picture and one table of a few arms in one world, as several scripts need them."""

import common
import learning_curves
import matplotlib.pyplot as plt
import stats
import style
import tables


def draw(experiment: str, lines: list[dict], labels: dict[str, str], title: str) -> dict[str, str]:
    """lines: keys ARM/SEED. labels: by arm, grpo among them, from which the others are compared."""
    rows = [("", "step 0", "curve", "last", "greedy, last", "curve minus GRPO's, paired")]
    grpo = learning_curves.end(stats.of(lines, "grpo"))
    fig, ax = plt.subplots(figsize=(8, 6))
    for name, label in labels.items():
        if mine := stats.of(lines, name):
            style.curves(ax, mine, "pass_rate", style.COLOURS[name], label, top=1)
            last, ends = max(line["step"] for line in mine), learning_curves.end(mine)
            cells = [
                stats.by_seed(mine, "pass_rate", step=0),
                ends,
                stats.by_seed(mine, "pass_rate", step=last),
            ]
            cells += [
                stats.by_seed(mine, "pass_rate_greedy", step=last),
                dict(enumerate(stats.paired(grpo, ends) if name != "grpo" else [])),
            ]
            rows.append((label, *(stats.interval(list(cell.values())) for cell in cells)))
    style.axes(ax, xlabel="step", ylabel="pass rate, held-out tasks, sampled", ylim=(0, 1.02))
    ax.set_title(f"{title}, {style.seeds(lines)}", fontsize=11)
    style.legend(fig, [ax], 0.1, ncols=3)
    common.save(fig, experiment)
    return {experiment: tables.table(rows)}
