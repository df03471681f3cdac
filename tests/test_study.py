"""launch/study: grids, matching results with jobs, statistics, and jobs that fail or are stopped; the jobs themselves are stubs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.study_jobs import (
    GRID,
    ROOT,
    SENTENCES,
    STUDY,
    found,
    grid,
    one_job,
    study,
    study_grid,
    study_regime,
    study_report,
    study_together,
)


def line(of: study_grid.Grid, job: study_grid.Job, score: float, **changes: Any) -> dict[str, Any]:
    return study_grid.line_of(job, found(score), study_grid.settings_of(of, job), {}, "2026-01-01") | changes


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


def whole(of: study_grid.Grid, scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Tuning that prefers 2e-4, then `scores` of the reported seeds."""
    lines = [line(of, study_grid.Job("t", m, 0, lr), lr) for m in scores for lr in (1e-4, 2e-4)]
    for method, values in scores.items():
        lines += [line(of, study_grid.Job("t", method, i + 1, 2e-4), value) for i, value in enumerate(values)]
    return lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0, 1]}, "tuning seed that is not reported"),
        ({"baseline": "vanila"}, "baseline among"),
        ({"methods": {"D": {"reserve_p": {"u": 0.3}}}}, "reserve_p of 'D' for each of"),
        ({"methods": {"D": {"lr_of": "E"}}}, "lr_of of 'D'"),
        ({"methods": {"D": {"lr_of": "E"}, "E": {"lr_of": "D"}}}, "tuned itself"),
        ({"tasks": {"t": SENTENCES | {"metric": "mcc"}}}, "metric of 't' among"),
        ({"tasks": {"t": SENTENCES | {"finetune": {"task": "regression"}}}}, "metric of 't' among"),
        ({"finetune": GRID["finetune"] | {"train_limit": 100}}, "that a job sets itself"),
        ({"task": {}}, "Extra inputs"),
    ],
)
def test_what_is_misspelt_is_refused(changes: dict[str, Any], says: str) -> None:
    grid()
    with pytest.raises(ValidationError, match=says):
        grid(**changes)


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_our_grids_are_whole(path: Path) -> None:
    ours = study_grid.read_grid(path)
    for task in ours.tasks:
        for job in study_grid.tuning_jobs(ours, task, ours.train_limits[0]):
            assert study_grid.settings_of(ours, job)["ds_config"].startswith("sha256:")


def test_the_page_shows_the_committed_results_and_no_others() -> None:
    expected = []
    for grid_name, results_name in [
        ("glue", "glue"),
        ("low_resource", "low_resource"),
        ("transfer", "transfer"),
        ("ablations", "transfer"),
    ]:
        ours = study_grid.read_grid(ROOT / "launch" / "study" / f"{grid_name}.yaml")
        results = study_grid.read_results(ROOT / "docs" / "evidence" / f"{results_name}.jsonl", ours)
        table = study_report.rows(ours, results)
        assert len(table) >= len(ours.methods)
        expected += ["| " + " | ".join(row) + " |" for row in table]
    lines = (ROOT / "docs" / "evidence.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith("| ") and not line.startswith(("| task |", "| --- |"))]
    assert shown == expected


SECOND = {
    "lm": ("tuning", "forgetting"),
    "lm_instruct": ("learning",),
    "bytes_glue": ("tuning", "report"),
    "regime": ("spread",),
    "flipped": ("spread",),
    "regime_cola": ("spread",),
    "together": ("together",),
}
"""The second study's grids, and what study.py prints of each, in the order of the pages."""
PAGES_OF = {"together": "combining.md"}
"""The others are on evidence_2.md."""


def printed(name: str, views: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Of what study.py prints of a grid's results, the lines that a page shows; of a table without rows nothing."""
    grid_file, results = ROOT / "launch" / "study" / f"{name}.yaml", folder / f"{name}.jsonl"
    blocks = []
    for view in views:
        capsys.readouterr()
        getattr(study, view)(grid_file, results, **({"markdown": True} if view == "report" else {}))
        blocks += [block.splitlines() for block in capsys.readouterr().out.split("\n\n")]
    whole_ = [block for block in blocks if not (block[0].startswith("| ") and len(block) == 2)]
    return [line for line in itertools.chain.from_iterable(whole_) if is_result(line)]


def is_result(line: str) -> bool:
    return line.startswith(("| ", "- Part ")) or "hours of run time" in line


def shown(page: str) -> list[str]:
    """A page's lines of results: tables of runs, verdicts, and how long it took."""
    return [line for line in page.splitlines() if is_result(line)]


@pytest.mark.parametrize("page", ["evidence_2.md", "combining.md"])
def test_the_second_study_s_pages_show_its_results_and_no_others(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After "## Results". A grid without a file has not run."""
    folder = ROOT / "docs" / "evidence"
    expected = []
    for name, views in SECOND.items():
        if PAGES_OF.get(name, "evidence_2.md") == page and (folder / f"{name}.jsonl").exists():
            expected += printed(name, views, folder, capsys)
    text = (ROOT / "docs" / page).read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    assert shown(text) == expected


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_views_of_few_runs_are_complete(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No seed: no table. One: means without intervals."""
    of = study_grid.read_grid(ROOT / "launch" / "study" / "together.yaml")
    jobs = [study_grid.Job("mrpc", "vanilla", 1 + seed, 0.0001, 1000) for seed in range(seeds)]
    write(tmp_path / "together.jsonl", [line(of, job, 0.5 + 0.1 * job.seed) for job in jobs])
    lines = printed("together", SECOND["together"], tmp_path, capsys)
    assert lines[-1] == f"{seeds} runs, {seeds / 3600:.1f} hours of run time"
    if seeds:
        mean = {1: "60.00", 2: "65.00 ± 7.07"}[seeds]
        assert lines[2] == f"| vanilla | 0.0001 | {seeds} | {mean} |  | 0 |  | 0 |  |  |"
    assert len(lines) == (4 if seeds else 1)


def test_the_scores_that_rates_are_chosen_by() -> None:
    lines = whole(grid(), {"vanilla": [0.5], "D": [0.5]})
    rows = study_report.tuning_rows(grid(), [r for r in lines if not (r["method"] == "D" and r["lr"] == 2e-4)])
    assert rows == [
        ["t (accuracy)", "all", "vanilla", "0.0001: 0.0001, 0.0002: 0.0002", "0.0002"],
        ["t (accuracy)", "all", "D", "0.0001: 0.0001, 0.0002: not run", ""],
    ]


def test_each_technique_with_a_child_and_without() -> None:
    methods = {"a": {"lr": 1e-4}, "a + D": {"lr": 2e-4}, "b": {"lr": 1e-4}}
    of = grid(methods=methods)
    scores = {"a": [0.5, 0.6, 0.7], "a + D": [0.52, 0.6, 0.74], "b": [0.1]}
    lines = [
        line(of, study_grid.Job("t", method, i + 1, methods[method]["lr"]), score)
        for method, of_seeds in scores.items()
        for i, score in enumerate(of_seeds)
    ]
    (row,) = study_together.rows(of, lines)
    # Differences of 2, 0 and 4 have a standard deviation of 2; t of two degrees of freedom is 4.303.
    interval = f"{2 - 4.303 * 2 / 3**0.5:+.2f} .. {2 + 4.303 * 2 / 3**0.5:+.2f}"
    assert row == ["a", "0.0001", "3", "60.00 ± 10.00", "0.0002", "3", "62.00 ± 11.14", "3", "+2.00", interval]


def test_the_second_study_s_results_are_of_its_grids() -> None:
    """Else the queue could not go on from them: its YAML files are as they were when its runs were made."""
    for name in SECOND:
        path = ROOT / "docs" / "evidence" / f"{name}.jsonl"
        if path.exists():
            ours = study_grid.read_grid(ROOT / "launch" / "study" / f"{name}.yaml")
            assert len(study_grid.read_results(path, ours)) == len(path.read_text().splitlines())


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", whole(grid(), {"vanilla": [0.5]}))
    assert len(study_grid.read_results(path, grid())) == 3
    longer = grid(finetune=GRID["finetune"] | {"epochs": 30})
    with pytest.raises(ValueError, match=r"epochs \(3, here 30\)"):
        study_grid.read_results(path, longer)


def test_other_grids_share_a_file_and_a_torn_line_is_lost_alone(tmp_path: Path) -> None:
    lines = whole(grid(), {"vanilla": [0.5, 0.6], "D": [0.7]})
    other = [r | {"method": "E"} for r in lines] + [r | {"task": "u"} for r in lines] + [lines[0] | {"train_limit": 9}]
    path = write(tmp_path / "r.jsonl", lines + other)
    path.write_text(path.read_text() + '{"task": "t", "me')
    assert study_grid.read_results(path, grid()) == lines


def test_the_best_rate_is_chosen_on_the_tuning_seed_and_a_diverged_run_never_wins() -> None:
    of = grid(tuning={"seed": 0, "lr": [1e-4, 2e-4, 4e-4]})
    scores = {1e-4: float("nan"), 2e-4: 0.5, 4e-4: 0.5}
    results = [line(of, study_grid.Job("t", "D", 0, lr), s) for lr, s in scores.items()]
    results += [
        line(of, study_grid.Job("t", "D", 1, 4e-4), 0.9),
        line(of, study_grid.Job("t", "vanilla", 0, 1e-4), 0.9),
    ]
    assert study_grid.best_lr(of, results) == {("t", None, "D"): 2e-4}, (
        "a tie goes to the smaller; vanilla is not complete"
    )


RATES = {
    "metric": "loss",
    "text_columns": "text",
    "also_eval": {"general": {"file": "general.jsonl"}},
    "finetune": {"task": "causal-lm"},
}


def test_rates_of_a_methods_own_and_a_multiple_of_anothers() -> None:
    """Losses: the lowest wins, and NaN never does. Tuning runs are shorter, and not tested on other domains."""
    methods = {"full": {"lr": [1e-5, 3e-5, 9e-5]}, "low": {"lr_of": "full", "lr_factor": 0.2}, "child": {}}
    tuning = GRID["tuning"] | {"finetune": {"max_steps": 5}, "also_eval": False}
    of = grid(tasks={"t": RATES}, methods=methods, tuning=tuning)
    jobs = study_grid.tuning_jobs(of, "t", None)
    assert {(j.method, j.lr) for j in jobs} == {
        *(("full", lr) for lr in (1e-5, 3e-5, 9e-5)),
        *(("child", lr) for lr in (1e-4, 2e-4)),
    }
    losses = {1e-5: 4.0, 3e-5: 3.0, 9e-5: float("nan"), 1e-4: 3.5, 2e-4: 3.6}
    results = [line(of, j, 0) | {"metrics": {"loss": losses[j.lr]}} for j in jobs]
    reported = study_grid.reported_jobs(of, "t", None, results)
    assert {(j.method, j.lr) for j in reported} == {("full", 3e-5), ("low", 6e-6), ("child", 1e-4)}
    short, whole_ = (study_grid.settings_of(of, j) for j in (jobs[0], reported[0]))
    assert short["max_steps"] == 5
    assert "max_steps" not in whole_
    assert "also_eval" not in short
    assert set(whole_["also_eval"]) == {"general"}


def test_a_rate_that_is_given_is_not_tuned() -> None:
    of = grid(methods={"a": {"lr": 3e-4}, "low a": {"lr_of": "a", "lr_factor": 0.5}, "b": {}})
    assert {j.method for j in study_grid.tuning_jobs(of, "t", None)} == {"b"}
    assert {(j.method, j.lr) for j in study_grid.reported_jobs(of, "t", None, [])} == {("a", 3e-4), ("low a", 1.5e-4)}


def test_flipped_labels(tmp_path: Path) -> None:
    """A draw of the seed's, of which a share has the other label; the second file is that share."""
    rows = [{"a": str(i), "b": "x", "label": i % 2} for i in range(50)]
    file = write(tmp_path / "train.jsonl", rows)

    def drawn(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        whole_, only = one_job.flipped(file, 0.4, 20, seed, tmp_path)
        read = [[json.loads(text) for text in path.read_text().splitlines()] for path in (whole_, only)]
        return read[0], read[1]

    whole_, only = drawn(1)
    wrong = [row for row in whole_ if row["label"] != int(row["a"]) % 2]
    assert (len(whole_), len(wrong)) == (20, 8)
    assert sorted(r["a"] for r in wrong) == sorted(r["a"] for r in only)
    assert all(row in whole_ for row in only)
    assert drawn(1) == (whole_, only)
    assert drawn(2)[0] != whole_


def test_flipped_labels_are_trained_on_and_asked_for(tmp_path: Path) -> None:
    start_inputs(tmp_path)
    of = grid(tasks={"t": SENTENCES | {"flip": 0.5}})
    job = study_grid.Job("t", "D", 1, 1e-4)
    options = one_job.options_of(of, job, str(tmp_path), tmp_path)
    assert options["train_file"] == tmp_path / "flipped-train.jsonl"
    assert options["also_eval"] == [f"flipped={tmp_path}/flipped-only.jsonl"]
    assert options["eval_file"] == tmp_path / "t" / "validation.jsonl"
    assert study_grid.settings_of(of, job)["flip"] == 0.5


def test_part_b_by_hand() -> None:
    """Beside vanilla at the same rate; a run that is not above the largest class has failed."""
    methods: dict[str, Any] = {
        "vanilla 1e-4": {"method": "plain", "lr": 1e-4},
        "vanilla 3e-4": {"method": "plain", "lr": 3e-4},
        "D 3e-4": {"method": "ChildTuning-D", "reserve_p": 0.3, "lr": 3e-4},
        "D 1e-4": {"method": "ChildTuning-D", "reserve_p": 0.3, "lr": 1e-4},
    }
    of = grid(tasks={"t": SENTENCES | {"failed_at": 0.5}}, methods=methods, seeds=[1, 2, 3, 4, 5, 6])
    scores = {
        "vanilla 1e-4": [0.7, 0.8],
        "vanilla 3e-4": [0.5, 0.9, 0.4, 0.8, 0.65],
        "D 3e-4": [0.7, 0.71, 0.72, 0.70, 0.72, float("nan")],
        "D 1e-4": [0.6, 0.6],
    }
    lines = [
        line(of, study_grid.Job("t", m, i + 1, methods[m]["lr"]), s) | {"also": {"flipped": {"accuracy": 0.25}}}
        for m, of_seeds in scores.items()
        for i, s in enumerate(of_seeds)
    ]
    finite = [r for r in lines if r["metrics"]["accuracy"] == r["metrics"]["accuracy"]]
    low, high, child, few = study_regime.rows(of, finite)
    assert low == ["t (accuracy)", "all", "vanilla 1e-4", "2", "75.00 ± 7.07", "0", "", "", "", "", "25.00 ± 0.00"]
    assert high[3:6] == ["5", "65.00 ± 20.62", "2"]
    assert child[3:8] == ["5", "71.00 ± 1.00", "0", "5", "+6.00"]
    # Distances from the medians, 65 and 71: 15, 25, 25, 15, 0 and 1, 0, 1, 1, 1.
    assert float(child[9]) == pytest.approx(_one_way([15, 25, 25, 15, 0], [1, 0, 1, 1, 1]), abs=1e-3)
    assert few[6:] == ["2", "-15.00", "", "", "25.00 ± 0.00"], (
        "two pairs have no interval, and few runs no test of spread"
    )
    assert study_regime.equal_spread([-1, 0, 1], [0, 0, 0]) > 0.1, "three runs cannot show a difference"
    assert study_regime.rows(of, lines)[2][5] == "1", "a run that has diverged has failed"


def _one_way(*groups: list[float]) -> float:
    """p of a one-way analysis of variance."""
    from scipy import stats

    everything = np.concatenate(groups)
    between = sum(len(g) * (np.mean(g) - everything.mean()) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(np.square(np.asarray(g) - np.mean(g)).sum() for g in groups) / (len(everything) - len(groups))
    return float(stats.f.sf(between / within, len(groups) - 1, len(everything) - len(groups)))


def test_a_part_of_a_grid_needs_the_tuning_of_its_own_methods_only() -> None:
    methods = {"a": {}, "low a": {"lr_of": "a", "lr_factor": 0.5}, "b": {}}
    of = grid(methods=methods)
    chosen = study.Chosen.of(of, "low a", "1,3")
    assert {j.method for j in study_grid.tuning_jobs(of, "t", None) if chosen.tunes(of, j)} == {"a"}
    assert study_grid.Job("t", "low a", 3, 1e-4) in chosen
    assert study_grid.Job("t", "low a", 2, 1e-4) not in chosen
    assert study_grid.Job("t", "b", 1, 1e-4) not in chosen
    for methods_, seeds in (("c", None), (None, "4")):
        with pytest.raises(ValueError, match="Remedy: name them as the grid does"):
            study.Chosen.of(of, methods_, seeds)


def test_a_job_without_the_launcher() -> None:
    of = grid(launcher={"none": True, "OMP_NUM_THREADS": 1})
    command = one_job.command_of(of, {"epochs": 3}, Path("r"))
    assert command[:2] == [sys.executable, str(ROOT / "launch" / "finetune.py")]
    environment = one_job.environment_of(of)
    assert environment["WORLD_SIZE"] == environment["OMP_NUM_THREADS"] == "1"
    assert "RANK" not in {k for k in one_job.environment_of(grid()) if k not in os.environ}


def test_the_folder_of_the_data_is_not_in_the_settings(tmp_path: Path) -> None:
    start_inputs(tmp_path)
    of = grid(finetune=GRID["finetune"] | {"model": "{data}/m"}, tasks={"t": SENTENCES | {"recorded": ["more"]}})
    (tmp_path / "more").write_text("x")
    job = study_grid.Job("t", "D", 1, 1e-4)
    assert one_job.options_of(of, job, str(tmp_path), tmp_path)["model"] == f"{tmp_path}/m"
    assert study_grid.settings_of(of, job)["model"] == "{data}/m"
    before = study_grid.data_of(of, job, str(tmp_path))
    assert set(before) == {"train.jsonl", "validation.jsonl", "more"}
    (tmp_path / "more").write_text("xy")
    assert study_grid.data_of(of, job, str(tmp_path))["more"] != before["more"]


def test_differences_are_paired_by_seed_device_and_versions() -> None:
    lines = whole(grid(), {"vanilla": [0.50, 0.52, 0.54], "D": [0.53, 0.52, 0.60]})
    vanilla, child = study_report.rows(grid(), lines)
    assert vanilla[:6] == ["t (accuracy)", "all", "vanilla", "0.0002", "3", "52.00 ± 2.00"]
    assert vanilla[6:] == [""] * 4
    assert child[6:8] == ["3", "+3.00"]
    # By hand: 3, 0 and 6 have a standard deviation of 3; t of two degrees of freedom is 4.303.
    assert child[9] == f"{3 - 4.303 * 3 / 3**0.5:+.2f} .. {3 + 4.303 * 3 / 3**0.5:+.2f}"
    lines[-1] = lines[-1] | {"device": "cuda"}
    assert study_report.rows(grid(), lines)[1][4:8] == ["3", "55.00 ± 4.36", "2", "+1.50"]
    turned = study_report.rows(grid(baseline="D"), lines)
    assert [row[7] for row in turned] == ["-1.50", ""]


def test_intervals_cover_what_the_page_says_they_cover() -> None:
    draws = np.random.default_rng(1).normal(size=(400, 5))
    covered = {f: np.mean([f(d)[0] < 0 < f(d)[1] for d in draws]) for f in (study_report.paired_t, _quick_bootstrap)}
    assert 0.92 < covered[study_report.paired_t] < 0.98
    assert 0.78 < covered[_quick_bootstrap] < 0.88


def _quick_bootstrap(differences: Any) -> tuple[float, float]:
    return study_report.bootstrap(differences, draws=1000)


@pytest.mark.parametrize("limits", [[None], [500, None]])
def test_the_plot_takes_a_study_that_is_not_finished(tmp_path: Path, limits: list[int | None]) -> None:
    of = grid(train_limits=limits)
    lines = whole(of, {"D": [0.5, 0.6], "vanilla": []})
    study_report.draw(of, lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="Remedy: run the grid on"):
        study_report.draw(of, lines[:4], tmp_path / "none.png")


# ---------------------------------------------------------------- jobs


def test_another_domain_holds_nothing_that_was_trained_on(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "label": 5.0}, {"a": "new", "b": "z", "label": 0.5}, {"a": "p", "b": "q", "label": 3}]
    (tmp_path / "d").mkdir()
    file = write(tmp_path / "d" / "validation.jsonl", rows)
    (tmp_path / "scratch").mkdir()
    seen = one_job.texts_of(write(tmp_path / "train.jsonl", [{"a": "k", "b": "y"}]), "a,b")
    kept = one_job.file_of(file, study_grid.Binarise(above=4, below=2), tmp_path / "scratch", without=seen)
    assert [json.loads(r) for r in kept.read_text().splitlines()] == [{"a": "new", "b": "z", "label": 0}]
    assert one_job.file_of(file, None, tmp_path / "scratch") == file


def test_the_hub_is_refused_for_what_needs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_job.check_data(grid(), "hub") == "hub"
    monkeypatch.chdir(tmp_path)
    assert one_job.check_data(grid(), "glue") == str(tmp_path / "glue")
    for changes, says in (
        ({"hub": {}}, "expected `hub:"),
        ({"binarise": {"above": 4, "below": 2}}, "without binarise"),
    ):
        with pytest.raises(ValueError, match=says):
            one_job.check_data(grid(tasks={"t": SENTENCES | changes}), "hub")


def test_gpus_take_turns() -> None:
    command = one_job.command_of(grid(), {"epochs": 3, "group_by_length": True}, Path("r"), gpu=5)
    assert "--include=localhost:5" in command
    assert not [part for part in command if "num_gpus" in part or "OMP" in part]
    assert command[-4:] == ["r", "--epochs", "3", "--group-by-length"]
    assert "--num_gpus=1" in one_job.command_of(grid(), {}, Path("r"))


def start_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    if not folder.exists():
        folder.mkdir()
        for name in ("train.jsonl", "validation.jsonl"):
            write(folder / name, [{"a": "k", "b": "y", "label": 0}])


def start_study(tmp_path: Path, endless: int = -1) -> subprocess.Popen[str]:
    start_inputs(tmp_path)
    places = {"data": str(tmp_path), "results": str(tmp_path / "r.jsonl"), "pid": str(tmp_path / "pid")}
    script = STUDY.format(root=str(ROOT), tests=str(ROOT / "launch" / "study"), endless=endless, **places)
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def test_a_job_that_fails_does_not_stop_the_others_and_is_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        process = start_study(tmp_path)
        _, said = process.communicate()
        assert process.returncode == 1
        assert "no luck" in said
        assert "2 jobs failed" in said
        # Once as it comes, of whichever job is the first, and in the output of the two that failed.
        assert [line.strip() for line in said.splitlines()].count("WARNING: too slow here") == 1 + 2
        jobs = [study_grid.job_of(r) for r in study_grid.read_results(tmp_path / "r.jsonl", grid())]
        assert len(jobs) == 4 + 4
        assert {j.seed for j in jobs} == {0, 1, 3}
        assert {j.lr for j in jobs if j.seed} == {2e-4}
    (tmp_path / "t" / "train.jsonl").write_text("{}")
    process = start_study(tmp_path)
    assert "on the data of --data" in process.communicate()[1]


def test_a_study_that_is_stopped_stops_its_jobs(tmp_path: Path) -> None:
    process = start_study(tmp_path, endless=1)
    pid = tmp_path / "pid"
    while not pid.exists() or not pid.read_text():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {process.wait(0.1)}")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert len(study_grid.read_results(tmp_path / "r.jsonl", grid())) == 4
