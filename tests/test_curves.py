"""The second study's figures on made-up results whose answers are known by hand."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.study_jobs import ROOT, study_grid

sys.path.insert(0, str(ROOT / "launch" / "study"))
import curves
import verdicts

LM = study_grid.read_grid(ROOT / "launch" / "study" / "lm.yaml")
WHOLE, LORA_16, LORA_64 = 1000, 36, 145
"""Trainable elements."""


def result(method: str, seed: int, lr: float, losses: list[float], general: list[float]) -> dict[str, Any]:
    """A line whose evaluations are every 25 steps; `losses` begins with the untrained model's."""
    job = study_grid.Job("r8", method, seed, lr)
    points = []
    for i, (task, bbc) in enumerate(zip(losses, general, strict=True)):
        also = {"bbc": {"loss": bbc}, "brown": {"loss": bbc}, "answers": {"loss": bbc, "kl": 0.0}}
        points.append({"step": 25 * i, "metrics": {"loss": task}, "also": also})
    settings = study_grid.settings_of(LM, job)
    child = settings["method"] == "ChildTuning-D"
    return {
        **vars(job),
        "settings": settings,
        "metrics": points[-1]["metrics"],
        # Only full fine-tuning is evaluated before training.
        "curve": points if method == "full" else points[1:],
        "trainable": {"LoRA r=16": LORA_16, "LoRA r=64": LORA_64}.get(method, WHOLE),
        "density": settings["reserve_p"] if child else 1.0,
        "bf16": True,
        "optimizer_bytes": 12_000,
        "seconds": {"total": 1.0},
    }


def tuning(methods: dict[str, float]) -> list[dict[str, Any]]:
    """Of each method the given rate is best."""
    lines = []
    for method, best in methods.items():
        for lr in study_grid.tried(LM, method):
            lines.append(result(method, 0, lr, [5.0, 4.0 if lr == best else 4.5], [3.0, 3.0]))
    return lines


def example(seeds: int = 3, forgotten: float = -0.1) -> list[dict[str, Any]]:
    """Full gains 2 nats, so that 80 % is at 3.4; contrast's BBC there is `forgotten` more than full's 3.5."""
    rates = {
        "full": 5e-5,
        "LoRA r=16": 5e-4,
        "LoRA r=64": 5e-4,
        **dict.fromkeys(("ChildTuning-D p=.05", "ChildTuning-D p=.1", "contrast p=.05"), 2.5e-4),
    }
    lines = tuning(rates)
    for seed in range(1, seeds + 1):
        noise = 0.001 * seed
        arms = {
            # At 3.4 half-way from 3.8 to 3.0.
            "full": ([5.0, 3.8, 3.0], [3.9, 3.4, 3.6]),
            "contrast p=.05": ([5.0, 3.4, 3.1], [3.9, 3.5 + forgotten + noise, 3.7]),
            "ChildTuning-D p=.05": ([5.0, 3.8, 3.1], [3.9, 3.6 + noise**2, 4.0]),
            "ChildTuning-D p=.1": ([5.0, 3.7, 3.15], [3.9, 3.6, 4.0]),
            "LoRA r=16": ([5.0, 4.0, 3.5], [3.9, 3.6, 4.0]),
            "LoRA r=64": ([5.0, 4.0, 3.3 + noise], [3.9, 3.6, 3.8]),
        }
        lines += [result(method, seed, rates[method], *arm) for method, arm in arms.items()]
        lines.append(result("full x 0.2", seed, 1e-5, [5.0, 4.5, 4.2], [3.9, 3.85, 3.8]))
    return lines


def test_the_point_of_equal_learning_is_interpolated() -> None:
    points = [(5.0, 3.9), (4.0, 3.7), (3.0, 3.8)]
    assert curves.at_level(points, 3.5) == pytest.approx(3.75)
    assert curves.at_level(points, 5.0) == 3.9
    assert curves.at_level(points, 3.0) == pytest.approx(3.8)
    assert curves.at_level(points, 2.9) is None
    assert curves.at_level([(5.0, 1.0), (5.5, 9.0), (4.5, 2.0)], 4.5) == 2.0, "a rise at first is not learning"


def test_holm_by_hand() -> None:
    assert verdicts.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    p = [random.Random(0).random() for _ in range(6)]
    assert all(a >= b for a, b in zip(verdicts.holm(p), p, strict=True))


def test_the_table(tmp_path: Path) -> None:
    runs = curves.runs_of(LM, example())
    rows = {row[0]: row for row in curves.table(LM, runs)}
    full, low, lora, child = (rows[m] for m in ("full", "full x 0.2", "LoRA r=16", "contrast p=.05"))
    assert full[1:] == ["5e-05", "3", "12.00", "12.00", "6.00", "3.000 ± 0.000", "1.000 ± 0.000", *full[8:]]
    assert full[8] == "3.500 ± 0.000"
    assert low[1:3] == ["1e-05", "3"]
    assert low[8] == "not reached"
    assert lora[3:6:2] == [f"{LORA_16 * 14 / WHOLE:.2f}", f"{LORA_16 * 6 / WHOLE:.2f}"]
    assert child[3:6:2] == ["0.80", "6.00"], "5 % of 16 bytes; gradients and weights are sent whole"
    assert child[8] == "3.402 ± 0.001"
    curves.draw(LM, runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_learning_of_a_task_without_general_texts() -> None:
    """In fp32 an adapter has 4 bytes of its own, and gradients and weights have 4. Rates are given: none is at an edge."""
    grid = study_grid.read_grid(ROOT / "launch" / "study" / "lm_instruct.yaml")
    lines = []
    for method, end in {"full": 1.0, "LoRA r=16": 1.2, "ChildTuning-D p=.1": 1.1}.items():
        job = study_grid.Job("gsm8k", method, 1, grid.methods[method]["lr"])
        line = result(method, 1, job.lr, [2.0, end], [0.0, 0.0])
        for point in line["curve"]:
            point["also"] = {}
        density = grid.methods[method].get("reserve_p", 1.0)
        lines.append(
            line | vars(job) | {"settings": study_grid.settings_of(grid, job), "density": density, "bf16": False}
        )
    header, full, lora, child = curves.learning(grid, curves.runs_of(grid, lines))
    assert header[-2:] == ["GSM8K NLL at the end", "share of full's gain"]
    assert full == ["full", "0.0003", "1", "12.00", "12.00", "12.00", "1.000", "1.000"]
    assert lora == [
        "LoRA r=16",
        "0.003",
        "1",
        f"{LORA_16 * 16 / WHOLE:.2f}",
        "12.00",
        f"{LORA_16 * 12 / WHOLE:.2f}",
        "1.200",
        "0.800",
    ]
    assert child[3:] == ["1.60", "12.00", "12.00", "1.100", "0.900"]


def test_a_rate_at_the_edge_is_marked() -> None:
    lines = [*tuning({"full": 3e-4}), result("full", 1, 3e-4, [5.0, 3.0], [3.9, 3.8])]
    assert curves.table(LM, curves.runs_of(LM, lines))[1][1] == "0.0003 (highest tried)"


def test_seeds_without_full_fine_tuning_are_left_out() -> None:
    lines = [r for r in example() if not (r["method"] == "full" and r["seed"] == 2)]
    runs = curves.runs_of(LM, lines)
    assert set(runs["contrast p=.05"]) == {1, 3}


def test_contrasts_are_paired_and_corrected() -> None:
    rows = {row[0]: row for row in verdicts.contrasts(curves.runs_of(LM, example()))}
    _, pairs, difference, interval, p = rows["contrast p=.05 - full"]
    assert (pairs, difference) == ("3", "-0.098")
    # -.099, -.098 and -.097 have a standard deviation of .001; t of two degrees of freedom is 4.303.
    reach = 4.303 * 0.001 / 3**0.5
    assert interval == f"{-0.098 - reach:+.3f} .. {-0.098 + reach:+.3f}"
    assert float(p) < 0.01
    assert "ChildTuning-D p=.05 - LoRA r=16" not in rows, "LoRA r=16 does not get to 80 %"


def test_the_correction_is_over_all_four_contrasts() -> None:
    """Also where one has no pairs: else a missing arm would make the others more significant."""
    runs = curves.runs_of(LM, example())
    pairs = [verdicts.forgetting(runs, m) for m in ("contrast p=.05", "full")]
    by_itself = verdicts.p_value([pairs[0][seed] - pairs[1][seed] for seed in (1, 2, 3)])
    assert len(verdicts.adjusted_p(runs)) == 3
    del runs["ChildTuning-D p=.05"]
    assert verdicts.adjusted_p(runs) == {("contrast p=.05", "full"): pytest.approx(4 * by_itself)}


def test_the_secondary_figures() -> None:
    """In the example Brown's and the answers' NLL are BBC's, and the KL is 0."""
    runs = curves.runs_of(LM, example())
    first = verdicts.contrasts(runs)[1]
    name, pairs, brown, answers, kl = verdicts.secondary(runs)[1]
    assert [name, pairs] == first[:2]
    assert brown == answers == f"{first[2]} ({first[3]})"
    assert kl == "+0.000 (+0.000 .. +0.000)"


@pytest.mark.parametrize("method", ["ChildTuning-D p=.1", "ChildTuning-D p=.05", "contrast p=.05"])
def test_a_claim_does_not_stand_on_a_run_that_has_diverged(method: str) -> None:
    lines = example()
    for r in lines:
        if (r["method"], r["seed"]) == (method, 3):
            r["metrics"] = {"loss": float("nan")}
            r["curve"] = [point | {"metrics": r["metrics"]} for point in r["curve"]]
    said = verdicts.verdicts(curves.runs_of(LM, lines))
    of_method = [line for line in said if method in line or (method[0] == "c" and "contrast" in line)]
    of_method += said[:1] if method.endswith("p=.1") else []
    assert of_method
    assert all(line.endswith(": REFUTED.") or "Undecided" in line for line in of_method), of_method


def test_verdicts_follow_the_protocol() -> None:
    """A child that forgets .1 less is not refuted, one that forgets .01 less is; below three seeds nothing is decided."""
    gap, lora, large, forgets, control = verdicts.verdicts(curves.runs_of(LM, example()))
    # (3.15 - 3.0) / 2 is under a tenth.
    assert "+0.075" in gap
    assert gap.endswith(": not refuted.")
    for line in (lora, large, forgets):
        assert line.endswith(": not refuted."), line
    # The control ends at 4.2 with 3.8; contrast is there half-way from 3.9 to 3.4: at 3.65.
    assert control.endswith(": not refuted.")
    assert "-0.150" in control or "-0.149" in control
    assert verdicts.verdicts(curves.runs_of(LM, example(forgotten=-0.01)))[3].endswith(": REFUTED.")
    assert verdicts.verdicts(curves.runs_of(LM, example(forgotten=0.3)))[4].endswith(": REFUTED.")
    assert all("Undecided" in line for line in verdicts.verdicts(curves.runs_of(LM, example(seeds=2))))
    assert all("no seed" in line for line in verdicts.verdicts({}))


def test_lora_of_equal_bytes_lies_on_a_line_over_the_logarithm() -> None:
    runs = curves.runs_of(LM, example())
    small, large = runs["LoRA r=16"][1], runs["LoRA r=64"][1]
    low, high = curves.bytes_of(small), curves.bytes_of(large)
    assert curves.lora_at(low, small, large) == pytest.approx(small.learnt)
    assert curves.lora_at(high, small, large) == pytest.approx(large.learnt)
    between = curves.lora_at(float(np.sqrt(low * high)), small, large)
    assert between == pytest.approx((small.learnt + large.learnt) / 2)
