"""Two real processes: equal to each other bit for bit, and to one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import read_log

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[1]
MODELS = ["vqvae-ema_vq", "vqvae2", "gpt"]
SAMPLING = ["dvaepp", "rbm"]  # with chains of their own on each process


def run_worker(folder: Path, num_processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the worker under plain torchrun.

    Without ACCELERATE_USE_CPU, accelerate by itself would make each process on a machine without a GPU believe that it
    is alone.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(WORKER), str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the runs of all models on one and on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    for num_processes in (1, 2):
        done = run_worker(folder / str(num_processes), num_processes, *MODELS, *SAMPLING)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_end_with_equal_weights_and_codebooks(runs, model):
    first, second = (load_file(runs / "2" / f"{model}-process{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("model", SAMPLING)
def test_two_processes_end_with_equal_weights_and_chains_of_their_own(runs, model):
    first, second = (load_file(runs / "2" / f"{model}-process{rank}.safetensors") for rank in (0, 1))
    chains = {name for name in first if name.endswith("chains")}
    assert len(chains) == 1
    assert {name for name in first if not torch.equal(first[name], second[name])} == chains


@pytest.mark.parametrize("model", SAMPLING)
def test_each_process_goes_on_with_its_own_chains(runs, model, tmp_path):
    for steps in ("3", "6"):  # the second call continues the first
        done = run_worker(tmp_path, 2, model, "--total_steps", steps)
        assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        name = f"{model}-process{rank}.safetensors"
        parts, whole = load_file(tmp_path / name), load_file(runs / "2" / name)
        assert [key for key in whole if not torch.equal(parts[key], whole[key])] == []


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_equal_one_with_the_same_global_batch(runs, model):
    two, one = (load_file(runs / number / f"{model}-process0.safetensors") for number in ("2", "1"))
    for name in one:
        # sums in another order; Adam divides by small second moments
        torch.testing.assert_close(one[name], two[name], atol=5e-5, rtol=1e-3, msg=name)


def test_the_log_of_two_processes_that_were_stopped_is_that_of_the_uninterrupted_ones(runs, tmp_path):
    done = run_worker(tmp_path, 2, "vqvae2", "--stop_at", "3")  # between two lines of the log
    assert "stopped by signal 15 at step 3" in done.stdout, done.stderr[-3000:]
    done = run_worker(tmp_path, 2, "vqvae2")
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read_log(folder / "vqvae2") for folder in (tmp_path, runs / "2")]
    values = [[(line["step"], k, v) for line in log for k, v in line.items() if "per_second" not in k] for log in logs]
    assert values[0] == values[1]


def test_a_sharded_prior_is_trained_and_continued_like_a_whole_one(runs, tmp_path):
    for steps in ("3", "6"):  # the second call continues the first
        done = run_worker(tmp_path, 2, "gpt", "--shard", "--total_steps", steps)
        assert done.returncode == 0, done.stderr[-3000:]
    sharded, whole = (load_file(folder / "gpt-process0.safetensors") for folder in (tmp_path, runs / "2"))
    for name in whole:  # sums in another order, as above
        torch.testing.assert_close(sharded[name], whole[name], atol=5e-5, rtol=1e-3, msg=name)


def test_another_number_of_processes_is_refused_unless_allowed(runs):
    done = run_worker(runs / "2", 1, "gpt", "--total_steps", "8")
    assert done.returncode != 0
    assert "trained on 2 processes and would continue on 1" in done.stderr
    done = run_worker(runs / "2", 1, "gpt", "--total_steps", "8", "--allow")
    assert done.returncode == 0, done.stderr[-3000:]


def test_processes_that_see_different_states_are_refused(runs):
    done = run_worker(runs / "2", 2, "vqvae2", "--total_steps", "8", "--elsewhere_on", "1")
    assert done.returncode != 0
    assert "the processes see different states" in done.stderr
    assert "(step 6, none); the folder must be on a disk that they share" in done.stderr


def test_a_loss_that_is_not_finite_on_one_process_stops_both_before_the_update(tmp_path):
    done = run_worker(tmp_path, 2, "gpt", "--poison_on", "1")
    assert done.returncode != 0
    assert done.stderr.count("step 3: loss nll is not finite") == 1
    assert done.stderr.count("step 3: the gradient is not finite") == 1
    folder = tmp_path / "gpt"
    reports = [json.loads((folder / f"nonfinite-step3-process{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["losses"] for report in reports] == [[], ["nll"]]
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000002"]


def test_an_error_on_one_process_ends_the_job(runs, tmp_path):
    done = run_worker(tmp_path, 2, "gpt", "--fail_on", "1")
    assert done.returncode != 0
    assert "asked to fail" in done.stderr


# Of a group of one process, which needs no launcher
ENDING = """
import atexit, sys
from pipelines.launch import exit_process
import torch.distributed as dist

atexit.register(print, "the interpreter closes down")
if sys.argv[1]:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
print("done")
exit_process(eval(sys.argv[2]))
"""


@pytest.mark.parametrize(("status", "code"), [("0", 0), ("143", 143), ("'error: no'", 1)])
@pytest.mark.parametrize("in_group", [True, False])
def test_one_of_several_processes_ends_without_closing_down_the_interpreter(tmp_path, status, code, in_group):
    store = str(tmp_path / "store") if in_group else ""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ENDING, store, status]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["done"] + ["the interpreter closes down"] * (not in_group)
    assert ("error: no" in done.stderr) == (code == 1)
